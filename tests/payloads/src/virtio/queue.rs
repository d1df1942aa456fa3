//! Split virtqueues from the driver's side (section 2.7), with access to each of their words.

use alloc::alloc::{alloc_zeroed, handle_alloc_error};
use alloc::vec::Vec;
use core::alloc::Layout;
use core::ptr;
use core::sync::atomic::{Ordering, fence};

use super::Error;
use super::mmio::{MmioDevice, QueueAddresses};

/// Flag of a descriptor: its `next` is valid.
pub const DESCRIPTOR_NEXT: u16 = 1;
/// Flag of a descriptor: the device writes the buffer.
pub const DESCRIPTOR_WRITE: u16 = 2;
/// Flag of a descriptor: the buffer is a table of descriptors.
pub const DESCRIPTOR_INDIRECT: u16 = 4;

pub(super) const AVAILABLE_NO_INTERRUPT: u16 = 1;
pub(super) const USED_NO_NOTIFY: u16 = 1;
const PAGE_SIZE: usize = 4096;

/// One entry of a descriptor table.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Descriptor {
    /// Guest-physical address of the buffer.
    pub address: u64,
    /// Its size in bytes.
    pub length: u32,
    /// `DESCRIPTOR_` flags.
    pub flags: u16,
    /// Index of the next descriptor of the chain.
    pub next: u16,
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub fn readable<T>(value: &[T]) -> Self {
        Self {
            address: value.as_ptr() as u64,
            length: size_of_val(value) as u32,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable<T>(value: &mut [T]) -> Self {
        Self {
            address: value.as_mut_ptr() as u64,
            length: size_of_val(value) as u32,
            writable: true,
        }
    }

    fn descriptor(&self) -> Descriptor {
        let flags = if self.writable { DESCRIPTOR_WRITE } else { 0 };
        Descriptor {
            address: self.address,
            length: self.length,
            flags,
            next: 0,
        }
    }
}

/// A chain that the device has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Its first descriptor.
    pub head: u16,
    /// How many bytes the device says it wrote.
    pub length: u32,
}

/// A split virtqueue of the driver.
pub struct SplitQueue {
    index: u16,
    size: u16,
    event_index: bool,
    descriptors: *mut Descriptor,
    available: *mut u16,
    used: *mut u16,
    /// Available index up to which the device may have heard a doorbell.
    notified: u16,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
}

impl SplitQueue {
    /// An empty queue of `size` descriptors, a power of two, in memory of the heap.
    pub fn new(index: u16, size: u16, event_index: bool) -> Self {
        let table_size = usize::from(size) * size_of::<Descriptor>();
        let available_size = 2 * (3 + usize::from(size));
        let used_at = (table_size + available_size).next_multiple_of(4);
        let used_size = 2 * (3 + 4 * usize::from(size));
        let memory = allocate(used_at + used_size);
        let mut queue = Self {
            index,
            size,
            event_index,
            descriptors: memory.cast(),
            // SAFETY: both offsets are inside the allocation.
            available: unsafe { memory.add(table_size).cast() },
            // SAFETY: as above.
            used: unsafe { memory.add(used_at).cast() },
            notified: 0,
            next_available: 0,
            next_used: 0,
            free: Vec::with_capacity(usize::from(size)),
        };
        queue.restart(event_index);
        queue
    }

    /// Empties the queue for a device that has been reset.
    pub fn restart(&mut self, event_index: bool) {
        // SAFETY: the queue's own memory, which a device that was reset does not touch.
        unsafe {
            ptr::write_bytes(self.descriptors, 0, usize::from(self.size));
            ptr::write_bytes(self.available, 0, 3 + usize::from(self.size));
            ptr::write_bytes(self.used, 0, 3 + 4 * usize::from(self.size));
        }
        self.event_index = event_index;
        (self.notified, self.next_available, self.next_used) = (0, 0, 0);
        self.free.clear();
        self.free.extend((0..self.size).rev());
    }

    /// Returns which queue of its device it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Size in descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the addresses of its parts.
    pub fn addresses(&self) -> QueueAddresses {
        QueueAddresses {
            descriptors: self.descriptors as u64,
            available: self.available as u64,
            used: self.used as u64,
        }
    }

    /// Head of the chain that [`add`](Self::add) makes available next of `length` buffers; `None`
    /// when too few descriptors are free.
    pub fn next_head(&self, length: usize) -> Option<u16> {
        self.free.get(self.free.len().checked_sub(length)?).copied()
    }

    /// Makes a chain available, and returns its head. [`kick`](Self::kick) tells the device.
    ///
    /// # Errors
    ///
    /// If too few descriptors are free.
    pub fn add(&mut self, chain: &[Buffer]) -> Result<u16, Error> {
        if chain.is_empty() || chain.len() > self.free.len() {
            return Err(Error::QueueFull);
        }
        let first_taken = self.free.len() - chain.len();
        for (position, buffer) in chain.iter().enumerate() {
            let mut descriptor = buffer.descriptor();
            if let Some(&next) = self.free.get(first_taken + position + 1) {
                descriptor.flags |= DESCRIPTOR_NEXT;
                descriptor.next = next;
            }
            self.set_descriptor(self.free[first_taken + position], descriptor);
        }
        let head = self.free[first_taken];
        self.free.truncate(first_taken);
        self.make_available(head);
        Ok(head)
    }

    /// Makes a chain available through `table`, which takes one descriptor of the queue. The table
    /// has at least as many entries as the chain has buffers, and lives until the chain is used.
    ///
    /// # Errors
    ///
    /// If no descriptor is free or the table is too short.
    pub fn add_indirect(
        &mut self,
        table: &mut [Descriptor],
        chain: &[Buffer],
    ) -> Result<u16, Error> {
        if chain.is_empty() || chain.len() > table.len() {
            return Err(Error::QueueFull);
        }
        let head = self.free.pop().ok_or(Error::QueueFull)?;
        for (position, buffer) in chain.iter().enumerate() {
            table[position] = buffer.descriptor();
            if position + 1 < chain.len() {
                table[position].flags |= DESCRIPTOR_NEXT;
                table[position].next = position as u16 + 1;
            }
        }
        let descriptor = Descriptor {
            address: table.as_ptr() as u64,
            length: size_of_val(&table[..chain.len()]) as u32,
            flags: DESCRIPTOR_INDIRECT,
            next: 0,
        };
        self.set_descriptor(head, descriptor);
        self.make_available(head);
        Ok(head)
    }

    /// Notifies the device of chains made available since the last call, unless the device does not
    /// want that. Returns whether the doorbell was rung.
    pub fn kick(&mut self, device: &MmioDevice) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.notified, self.next_available);
        let wanted = if self.event_index {
            let event = self.read_used(2 + 4 * self.size);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.read_used(0) & USED_NO_NOTIFY == 0
        };
        self.notified = new;
        if wanted && new != old {
            device.notify(u32::from(self.index));
        }
        wanted && new != old
    }

    /// Whether the device has used a chain that was not taken yet.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// Takes the next element of the used ring unchecked: the head of a chain, and how many bytes
    /// the device reports to have written.
    pub fn take_used_element(&mut self) -> Option<(u32, u32)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = 2 + 4 * (self.next_used % self.size);
        let half = |offset| u32::from(self.read_used(slot + offset));
        let element = (half(0) | half(1) << 16, half(2) | half(3) << 16);
        self.next_used = self.next_used.wrapping_add(1);
        if self.event_index {
            self.write_available(2 + self.size, self.next_used);
        }
        Some(element)
    }

    /// Takes the next chain that the device has used, and frees its descriptors.
    ///
    /// # Errors
    ///
    /// If no chain that begins there was made available.
    pub fn take_used(&mut self) -> Result<Option<Used>, Error> {
        let Some((id, length)) = self.take_used_element() else {
            return Ok(None);
        };
        if id >= u32::from(self.size) || self.free.contains(&(id as u16)) {
            return Err(Error::WrongChain(id));
        }
        let head = id as u16;
        let mut next = head;
        loop {
            self.free.push(next);
            let descriptor = self.descriptor(next);
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                break;
            }
            next = descriptor.next;
        }
        Ok(Some(Used { head, length }))
    }

    /// Asks the device for interrupts, or not to raise any.
    pub fn want_interrupts(&mut self, wanted: bool) {
        if self.event_index {
            // The event is one behind the used index, which reaches it again only after its whole
            // range.
            let event = if wanted {
                self.next_used
            } else {
                self.next_used.wrapping_sub(1)
            };
            self.write_available(2 + self.size, event);
        } else {
            self.write_available(0, if wanted { 0 } else { AVAILABLE_NO_INTERRUPT });
        }
        fence(Ordering::SeqCst);
    }

    /// Reads an entry of the descriptor table; `index` is less than the size.
    pub fn descriptor(&self, index: u16) -> Descriptor {
        assert!(index < self.size);
        // SAFETY: inside the table.
        unsafe { self.descriptors.add(usize::from(index)).read_volatile() }
    }

    /// Writes an entry of the descriptor table, unchecked; `index` is less than the size.
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        assert!(index < self.size);
        // SAFETY: inside the table.
        unsafe {
            self.descriptors
                .add(usize::from(index))
                .write_volatile(descriptor);
        }
    }

    /// Makes the chain that begins at `head` available, unchecked.
    pub fn make_available(&mut self, head: u16) {
        self.write_available(2 + self.next_available % self.size, head);
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Sets the index of the available ring, unchecked.
    pub fn set_available_index(&mut self, index: u16) {
        fence(Ordering::Release);
        self.next_available = index;
        self.write_available(1, index);
    }

    /// Index of the available ring.
    pub fn available_index(&self) -> u16 {
        self.next_available
    }

    /// Index of the used ring, as the device wrote it.
    pub fn used_index(&self) -> u16 {
        self.read_used(1)
    }

    fn write_available(&mut self, word: u16, value: u16) {
        // SAFETY: the callers' words are inside the ring, its event word included.
        unsafe { self.available.add(usize::from(word)).write_volatile(value) }
    }

    fn read_used(&self, word: u16) -> u16 {
        // SAFETY: the callers' words are inside the ring, its event word included.
        unsafe { self.used.add(usize::from(word)).read_volatile() }
    }
}

fn allocate(size: usize) -> *mut u8 {
    let layout = Layout::from_size_align(size, PAGE_SIZE).expect("a queue has a sane size");
    // SAFETY: the size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    memory
}
