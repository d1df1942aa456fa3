//! The parts of a split virtqueue (section 2.7) where they are in the host's memory, so that nothing
//! is looked up for each descriptor.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::GuestMemory;
use crate::guest_memory::host_address;

/// Size of a descriptor in bytes.
pub(super) const DESCRIPTOR_SIZE: usize = 16;
/// Size of an element of the used ring in bytes.
const USED_ELEMENT_SIZE: usize = 8;
/// Where the index of a ring follows its flags.
const INDEX: usize = 2;
/// Where the elements of a ring follow its index.
const ELEMENTS: usize = 4;

/// A descriptor as it was when it was read (section 2.7.5).
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: GuestAddress,
    pub(super) len: u32,
    flags: u16,
    /// Index of the next one in the table, if it has a next one.
    pub(super) next: u16,
}

impl Descriptor {
    fn from_words([address, rest]: [u64; 2]) -> Descriptor {
        let rest = u64::from_le(rest);
        Descriptor {
            address: GuestAddress(u64::from_le(address)),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    pub(super) fn has_next(self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_NEXT != 0
    }

    pub(super) fn is_writable(self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_WRITE != 0
    }

    pub(super) fn is_indirect(self) -> bool {
        u32::from(self.flags) & VRING_DESC_F_INDIRECT != 0
    }
}

/// Descriptor table, available ring and used ring of one queue.
///
/// The driver may change all of it at any time: it is only accessed by atomic operations.
pub(super) struct Rings {
    size: u16,
    descriptors: NonNull<u8>,
    available: NonNull<u8>,
    used: NonNull<u8>,
    /// Keeps the pointers valid.
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers are into guest memory, which is shared between threads already, and which
// this struct keeps alive.
unsafe impl Send for Rings {}

impl Rings {
    /// The rings of `queue`, if each is all in one region of guest memory and aligned as it should
    /// be (section 2.7).
    pub(super) fn new(queue: &Queue, memory: &Arc<GuestMemory>) -> Option<Rings> {
        let size = usize::from(queue.size());
        if !size.is_power_of_two() {
            return None;
        }
        let part = |address: u64, len: usize, alignment: usize| {
            host_address(memory, GuestAddress(address), len)
                .filter(|pointer| pointer.addr().get().is_multiple_of(alignment))
        };
        Some(Rings {
            size: queue.size(),
            descriptors: part(queue.desc_table(), size * DESCRIPTOR_SIZE, DESCRIPTOR_SIZE)?,
            // Either ring ends with an event index.
            available: part(queue.avail_ring(), ELEMENTS + size * 2 + 2, 2)?,
            used: part(
                queue.used_ring(),
                ELEMENTS + size * USED_ELEMENT_SIZE + 2,
                4,
            )?,
            _memory: memory.clone(),
        })
    }

    /// The descriptor at `index` of the table, if it has so many.
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: the table has `self.size` descriptors, and is aligned for its words.
        let words = unsafe {
            let words = self
                .descriptors
                .as_ptr()
                .cast::<u64>()
                .add(usize::from(index) * 2);
            [0, 1].map(|word| AtomicU64::from_ptr(words.add(word)).load(Ordering::Relaxed))
        };
        Some(Descriptor::from_words(words))
    }

    /// `flags` of the available ring.
    pub(super) fn available_flags(&self) -> u16 {
        u16::from_le(self.half(self.available, 0).load(Ordering::Relaxed))
    }

    /// `idx` of the available ring. What the driver wrote before it can be read after this.
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.half(self.available, INDEX).load(Ordering::Acquire))
    }

    /// The head that the driver made available as number `index`, counted as `idx` is.
    pub(super) fn available_head(&self, index: u16) -> u16 {
        let element = ELEMENTS + self.slot(index) * 2;
        u16::from_le(self.half(self.available, element).load(Ordering::Relaxed))
    }

    /// `used_event`: with which element of the used ring the driver wants an interrupt.
    pub(super) fn used_event(&self) -> u16 {
        let event = ELEMENTS + usize::from(self.size) * 2;
        u16::from_le(self.half(self.available, event).load(Ordering::Relaxed))
    }

    /// Writes the element of the used ring that is number `index`, counted as `idx` is.
    pub(super) fn set_used_element(&self, index: u16, head: u16, written: u32) {
        let element = ELEMENTS + self.slot(index) * USED_ELEMENT_SIZE;
        for (offset, value) in [(0, u32::from(head)), (4, written)] {
            // SAFETY: the ring has `self.size` elements of two words each, to which it is aligned.
            let word =
                unsafe { AtomicU32::from_ptr(self.used.as_ptr().add(element + offset).cast()) };
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    /// Sets `idx` of the used ring, behind all that was written before.
    pub(super) fn set_used_index(&self, index: u16) {
        self.half(self.used, INDEX)
            .store(index.to_le(), Ordering::Release);
    }

    /// Sets `flags` of the used ring.
    pub(super) fn set_used_flags(&self, flags: u16) {
        self.half(self.used, 0)
            .store(flags.to_le(), Ordering::Relaxed);
    }

    /// Sets `avail_event`: with which element of the available ring the driver is to ring the
    /// doorbell.
    pub(super) fn set_available_event(&self, index: u16) {
        let event = ELEMENTS + usize::from(self.size) * USED_ELEMENT_SIZE;
        self.half(self.used, event)
            .store(index.to_le(), Ordering::Relaxed);
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// The two bytes `offset` bytes behind the start of `ring`, one of this struct's, where `offset`
    /// is even and within it.
    fn half(&self, ring: NonNull<u8>, offset: usize) -> &AtomicU16 {
        // SAFETY: the ring is aligned to two bytes at least, and as valid as `self`.
        unsafe { AtomicU16::from_ptr(ring.as_ptr().add(offset).cast()) }
    }
}

/// A table of descriptors that a descriptor refers to (section 2.7.5.3).
pub(super) struct IndirectTable<'a> {
    pointer: NonNull<u8>,
    len: u16,
    memory: PhantomData<&'a GuestMemory>,
}

impl<'a> IndirectTable<'a> {
    /// The table that `descriptor` refers to, if it is all in one region of `memory` and has a whole
    /// number of descriptors, at least one.
    pub(super) fn new(descriptor: Descriptor, memory: &'a GuestMemory) -> Option<Self> {
        let size = descriptor.len as usize;
        if size == 0 || !size.is_multiple_of(DESCRIPTOR_SIZE) {
            return None;
        }
        Some(Self {
            pointer: host_address(memory, descriptor.address, size)?,
            len: u16::try_from(size / DESCRIPTOR_SIZE).unwrap_or(u16::MAX),
            memory: PhantomData,
        })
    }

    /// The descriptor at `index`, if there are so many.
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the table has `self.len` descriptors in guest memory, which outlives `self`.
        let bytes = unsafe {
            self.pointer
                .as_ptr()
                .add(usize::from(index) * DESCRIPTOR_SIZE)
        };
        let words = if bytes.addr().is_multiple_of(align_of::<u64>()) {
            // SAFETY: as above, and it is aligned.
            unsafe { bytes.cast::<[u64; 2]>().read_volatile() }
        } else {
            let mut words = [[0; 8]; 2];
            for (offset, byte) in words.as_flattened_mut().iter_mut().enumerate() {
                // SAFETY: as above; a byte is always aligned.
                *byte = unsafe { bytes.add(offset).read_volatile() };
            }
            words.map(u64::from_ne_bytes)
        };
        Some(Descriptor::from_words(words))
    }
}
