//! The parts of a split virtqueue (section 2.7), with their addresses in the host's memory resolved once, so
//! that nothing is looked up for each descriptor.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bantam_memory::{GuestMemory, GuestRange, Word};
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// Size of a descriptor in bytes.
pub(super) const DESCRIPTOR_SIZE: usize = 16;
/// Size of a descriptor in 64-bit words.
const DESCRIPTOR_WORDS: usize = 2;
/// Size of an element of the used ring in 32-bit words.
const USED_ELEMENT_WORDS: usize = 2;
/// Flags of a ring, in words of 16 bits from its start.
const FLAGS: usize = 0;
/// Index of a ring, in words of 16 bits from its start.
const INDEX: usize = 1;
/// First element of the available ring, in words of 16 bits from its start.
const AVAILABLE_ELEMENTS: usize = 2;
/// First element of the used ring, in words of 32 bits from its start.
const USED_ELEMENTS: usize = 1;

/// A copy of a descriptor, read once (section 2.7.5).
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
/// The driver may change any of it at any time, so it is accessed only with atomic operations.
pub(super) struct Rings {
    size: u16,
    descriptors: GuestRange<u64>,
    /// Flags, index, elements of one 16-bit word each, and the event index.
    available: GuestRange<u16>,
    /// Flags, index, elements of four 16-bit words each, and the event index.
    used: GuestRange<u16>,
    /// The used ring up to the event index in 32-bit words, of which its elements consist.
    used_elements: GuestRange<u32>,
}

impl Rings {
    /// Finds the rings of `queue`, if each lies in one region of guest memory and is aligned as required
    /// (section 2.7).
    pub(super) fn new(queue: &Queue, memory: &Arc<GuestMemory>) -> Option<Rings> {
        let size = usize::from(queue.size());
        if !size.is_power_of_two() || !queue.desc_table().is_multiple_of(DESCRIPTOR_SIZE as u64) {
            return None;
        }
        let used_words = USED_ELEMENTS + size * USED_ELEMENT_WORDS;
        Some(Rings {
            size: queue.size(),
            descriptors: words(memory, queue.desc_table(), size * DESCRIPTOR_WORDS)?,
            available: words(memory, queue.avail_ring(), AVAILABLE_ELEMENTS + size + 1)?,
            used: words(memory, queue.used_ring(), used_words * 2 + 1)?,
            used_elements: words(memory, queue.used_ring(), used_words)?,
        })
    }

    /// Reads the descriptor at `index` of the table, if that is within the table.
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        let index = usize::from(index) * DESCRIPTOR_WORDS;
        let words = self.descriptors.get(index, Ordering::Relaxed)?;
        Some(Descriptor::from_words(words))
    }

    /// Reads `flags` of the available ring.
    pub(super) fn available_flags(&self) -> u16 {
        u16::from_le(self.available.load(FLAGS, Ordering::Relaxed))
    }

    /// Reads `idx` of the available ring. All that the driver wrote before it is visible after this.
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.available.load(INDEX, Ordering::Acquire))
    }

    /// Reads the head that the driver made available as number `index`, counted like `idx`.
    pub(super) fn available_head(&self, index: u16) -> u16 {
        let element = AVAILABLE_ELEMENTS + self.slot(index);
        u16::from_le(self.available.load(element, Ordering::Relaxed))
    }

    /// Reads `used_event`: the element of the used ring for which the driver wants an interrupt.
    pub(super) fn used_event(&self) -> u16 {
        let event = AVAILABLE_ELEMENTS + usize::from(self.size);
        u16::from_le(self.available.load(event, Ordering::Relaxed))
    }

    /// Writes elements of the used ring, the first one as number `index`, counted like `idx`, and then sets
    /// `idx` past them. Returns the new `idx`.
    #[inline]
    pub(super) fn add_used(&self, index: u16, used: &[(u16, u32)]) -> u16 {
        let mut index = index;
        for &(head, written) in used {
            let element = USED_ELEMENTS + self.slot(index) * USED_ELEMENT_WORDS;
            let words = [u32::from(head), written].map(u32::to_le);
            self.used_elements
                .store_unmarked(element, words, Ordering::Relaxed);
            index = index.wrapping_add(1);
        }
        // After everything that was written before.
        self.used
            .store_unmarked(INDEX, [index.to_le()], Ordering::Release);
        self.used.mark_all();
        index
    }

    /// Sets `flags` of the used ring.
    pub(super) fn set_used_flags(&self, flags: u16) {
        self.used.store(FLAGS, [flags.to_le()], Ordering::Relaxed);
    }

    /// Sets `avail_event`: the element of the available ring for which the driver is to ring the doorbell.
    pub(super) fn set_available_event(&self, index: u16) {
        let event = (USED_ELEMENTS + usize::from(self.size) * USED_ELEMENT_WORDS) * 2;
        self.used.store(event, [index.to_le()], Ordering::Relaxed);
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }
}

fn words<T: Word>(memory: &Arc<GuestMemory>, address: u64, len: usize) -> Option<GuestRange<T>> {
    GuestRange::new(memory.clone(), GuestAddress(address), len)
}

/// A descriptor table that a descriptor refers to (section 2.7.5.3).
pub(super) struct IndirectTable<'a>(GuestRange<u8, &'a GuestMemory>);

impl<'a> IndirectTable<'a> {
    /// Finds the table that `descriptor` refers to, if it lies in one region of `memory` and consists of a
    /// whole number of descriptors, at least one.
    pub(super) fn new(descriptor: Descriptor, memory: &'a GuestMemory) -> Option<Self> {
        let size = descriptor.len as usize;
        if size == 0 || !size.is_multiple_of(DESCRIPTOR_SIZE) {
            return None;
        }
        memory.range(descriptor.address, size).map(Self)
    }

    /// Reads the descriptor at `index`, if that is within the table.
    pub(super) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        let words = self.0.get_unaligned(usize::from(index) * DESCRIPTOR_SIZE)?;
        Some(Descriptor::from_words(words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_to_the_used_ring_is_in_the_dirty_log() {
        let regions = [(GuestAddress(0), 0x8000)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let mut queue = Queue::new(4).unwrap();
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        // Flags and index are in one page, the elements and the event index in the next.
        queue.set_used_ring_address(Some(0x3ffc), None);
        let rings = Rings::new(&queue, &memory).unwrap();
        memory.start_dirty_log().unwrap();
        let dirty = |write: &dyn Fn()| -> Vec<u64> {
            write();
            memory
                .take_dirty()
                .unwrap()
                .iter()
                .map(|page| page.0)
                .collect()
        };
        let add_used = || {
            rings.add_used(3, &[(1, 2)]);
        };
        assert_eq!(dirty(&add_used), [0x3000, 0x4000]);
        assert_eq!(dirty(&|| rings.set_used_flags(1)), [0x3000]);
        assert_eq!(dirty(&|| rings.set_available_event(1)), [0x4000]);
        let read = || {
            rings.descriptor(0);
            rings.available_flags();
            rings.available_head(rings.available_index());
            rings.used_event();
        };
        assert!(dirty(&read).is_empty());
    }
}
