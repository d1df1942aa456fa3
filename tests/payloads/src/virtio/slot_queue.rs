//! The fast way to drive a split virtqueue (section 2.7): the driver builds its chains once, in its
//! slots, and makes them available again and again. No descriptor is ever freed.

use core::sync::atomic::{Ordering, fence};

use super::queue::{
    AVAILABLE_NO_INTERRUPT, DESCRIPTOR_INDIRECT, Descriptor, SplitQueue, USED_NO_NOTIFY,
};
use super::transport::Doorbell;

/// How far ahead the used event is set so that the device does not reach it, and after how many
/// chains it is set again. A queue has far fewer chains than this.
const EVENT_DISTANCE: u16 = 0x8000;
const EVENT_RENEWAL: u16 = 0x4000;

/// A chain that the device reports as used.
#[derive(Debug, Clone, Copy)]
pub struct UsedElement {
    /// Its first descriptor, which the driver has to check.
    pub head: u32,
    /// How many bytes the device says it wrote.
    pub length: u32,
}

/// A split virtqueue whose chains are made once.
pub struct SlotQueue {
    /// Owner of the rings' memory.
    split: SplitQueue,
    doorbell: Doorbell,
    event_index: bool,
    mask: u16,
    /// Flags and index of the available ring, then its heads, then the used event.
    available: *mut u16,
    /// Flags and index of the used ring, then its elements, then the available event.
    used: *const u16,
    /// Available index that the device has seen or was told of.
    published: u16,
    next_available: u16,
    next_used: u16,
    suppressed_at: u16,
    doorbells: u64,
}

impl SlotQueue {
    /// Drives `split`, which is empty.
    pub(super) fn new(split: SplitQueue, event_index: bool, doorbell: Doorbell) -> Self {
        let addresses = split.addresses();
        Self {
            mask: split.size() - 1,
            available: addresses.available as *mut u16,
            used: addresses.used as *const u16,
            split,
            doorbell,
            event_index,
            published: 0,
            next_available: 0,
            next_used: 0,
            suppressed_at: 0,
            doorbells: 0,
        }
    }

    /// Size in descriptors.
    pub fn size(&self) -> u16 {
        self.split.size()
    }

    /// Returns how often the doorbell was rung.
    pub fn doorbells(&self) -> u64 {
        self.doorbells
    }

    /// The descriptor table, of [`size`](Self::size) entries.
    pub fn descriptors(&self) -> *mut Descriptor {
        self.split.addresses().descriptors as *mut Descriptor
    }

    /// Makes descriptor `head` refer to a table of `length` descriptors, which is never moved.
    pub fn set_indirect(&mut self, head: u16, table: *const Descriptor, length: u32) {
        self.split.set_descriptor(
            head,
            Descriptor {
                address: table as u64,
                length: length * size_of::<Descriptor>() as u32,
                flags: DESCRIPTOR_INDIRECT,
                next: 0,
            },
        );
    }

    /// Makes descriptor `head` a chain of one buffer.
    pub fn set_single(&mut self, head: u16, descriptor: Descriptor) {
        self.split.set_descriptor(head, descriptor);
    }

    /// Puts the chain that begins at `head` into the available ring; [`publish`](Self::publish) lets
    /// the device see it. No more chains are there at a time than the queue has descriptors.
    #[inline]
    pub fn push(&mut self, head: u16) {
        let word = 2 + (self.next_available & self.mask);
        // SAFETY: an entry of the ring, as the index is masked.
        unsafe { self.available.add(usize::from(word)).write_volatile(head) };
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Lets the device see what was pushed, and rings the doorbell if the device wants that (section
    /// 2.7.10).
    #[inline]
    pub fn publish(&mut self) {
        let (old, new) = (self.published, self.next_available);
        if new == old {
            return;
        }
        fence(Ordering::Release);
        // SAFETY: the index of the available ring.
        unsafe { self.available.add(1).write_volatile(new) };
        self.published = new;
        // The device must see the index before the driver reads the device's event, or both sides
        // may sleep.
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self.read_used(2 + 4 * self.size());
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.read_used(0) & USED_NO_NOTIFY == 0
        };
        if wanted {
            self.doorbells += 1;
            self.doorbell.ring();
        }
    }

    /// Returns the index of the used ring, as the device wrote it.
    #[inline]
    pub fn used_index(&self) -> u16 {
        self.read_used(1)
    }

    /// Returns whether the device has used a chain that was not taken yet.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// Takes the next chain that the device had used when its index was `used_index`.
    #[inline]
    pub fn take_before(&mut self, used_index: u16) -> Option<UsedElement> {
        if self.next_used == used_index {
            return None;
        }
        fence(Ordering::Acquire);
        let element = 1 + 2 * usize::from(self.next_used & self.mask);
        let words = self.used.cast::<u32>();
        // SAFETY: an element of the ring, as the index is masked; the ring is aligned to 4 bytes.
        let element = unsafe {
            UsedElement {
                head: words.add(element).read_volatile(),
                length: words.add(element + 1).read_volatile(),
            }
        };
        self.next_used = self.next_used.wrapping_add(1);
        Some(element)
    }

    /// Asks the device for no interrupts.
    pub fn suppress_interrupts(&mut self) {
        if self.event_index {
            self.suppressed_at = self.next_used;
            let event = self.next_used.wrapping_add(EVENT_DISTANCE);
            self.write_available(2 + self.size(), event);
        } else {
            self.write_available(0, AVAILABLE_NO_INTERRUPT);
        }
    }

    /// Keeps interrupts suppressed while the queue is driven without them: the device's index comes
    /// round to any event.
    #[inline]
    pub fn keep_interrupts_suppressed(&mut self) {
        if self.next_used.wrapping_sub(self.suppressed_at) >= EVENT_RENEWAL {
            self.suppress_interrupts();
        }
    }

    /// Asks the device for an interrupt when it uses the next chain. It may have done so already:
    /// look at [`has_used`](Self::has_used) afterwards.
    pub fn request_interrupt(&mut self) {
        self.suppressed_at = self.next_used;
        if self.event_index {
            self.write_available(2 + self.size(), self.next_used);
        } else {
            self.write_available(0, 0);
        }
        fence(Ordering::SeqCst);
    }

    fn write_available(&mut self, word: u16, value: u16) {
        // SAFETY: the callers' words are inside the ring, its event word included.
        unsafe { self.available.add(usize::from(word)).write_volatile(value) }
    }

    #[inline]
    fn read_used(&self, word: u16) -> u16 {
        // SAFETY: the callers' words are inside the ring, its event word included.
        unsafe { self.used.add(usize::from(word)).read_volatile() }
    }
}
