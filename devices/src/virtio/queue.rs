//! The device's side of a virtqueue: chains are taken from the available ring and returned in the used ring
//! (section 2.7).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use bantam_memory::{BufferError, GuestBuffers, GuestMemory};
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::DriverLink;
use super::rings::{IndirectTable, Rings};
use crate::worker::QueueProgress;

/// How long one queue is served before other devices get their turn.
pub const MAX_TURN: Duration = Duration::from_millis(20);

/// A fault of a driver that makes a queue unusable until the device is reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A ring or the descriptor table is not in one region of guest memory, or not aligned.
    #[error("queue {queue}: its rings are not in guest memory")]
    Rings {
        /// Index of the queue.
        queue: u16,
    },
    /// More chains are available than the queue has descriptors.
    #[error("queue {queue}: {count} descriptor chains are available, more than it has descriptors")]
    TooManyAvailable {
        /// Index of the queue.
        queue: u16,
        /// How many.
        count: u16,
    },
    /// A chain has no end: it loops, or a link or an indirect table is out of range.
    #[error(
        "queue {queue}: the descriptor chain at {head} is broken after {descriptors} descriptors"
    )]
    BrokenChain {
        /// Index of the queue.
        queue: u16,
        /// Index of the chain's first descriptor.
        head: u16,
        /// How many descriptors could be read.
        descriptors: u16,
    },
    /// A buffer for the driver to read follows one for it to write (section 2.7.4.2).
    #[error(
        "queue {queue}: the descriptor chain at {head} has a readable buffer after a writable one"
    )]
    Order {
        /// Index of the queue.
        queue: u16,
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A buffer is not in guest memory.
    #[error("queue {queue}: in the descriptor chain at {head}, {source}")]
    Buffer {
        /// Index of the queue.
        queue: u16,
        /// Index of the chain's first descriptor.
        head: u16,
        /// Which buffer.
        source: BufferError,
    },
}

/// The buffers of one descriptor chain. One value serves many chains, so that taking a chain
/// allocates nothing.
pub struct Chain {
    /// Index of the first descriptor, which identifies the chain when it is returned.
    pub head: u16,
    /// Buffers that the driver has written for the device.
    pub readable: GuestBuffers,
    /// Buffers that the device writes for the driver.
    pub writable: GuestBuffers,
    /// Address of the last writable byte, if there is any.
    pub last_writable_byte: Option<GuestAddress>,
}

impl Chain {
    /// Makes room for the buffers of chains in `memory`.
    pub fn new(memory: &Arc<GuestMemory>) -> Chain {
        Chain {
            head: 0,
            readable: GuestBuffers::new(memory.clone()),
            writable: GuestBuffers::new(memory.clone()),
            last_writable_byte: None,
        }
    }
}

/// A virtqueue with its doorbell and the memory that it is in.
pub struct VirtQueue {
    index: u16,
    /// Most descriptors that the driver could have chosen.
    max_size: u16,
    size: u16,
    event_index: bool,
    /// `None` if the driver left the queue unused.
    rings: Option<Rings>,
    /// Number of chains taken so far, which wraps.
    next_available: u16,
    /// Heads of chains that were put back in an order other than that in which they were taken. The last one
    /// is for the position before `substitutes_end`, and each of the others for the position before that of
    /// the next.
    substitutes: Vec<u16>,
    substitutes_end: u16,
    /// Number of chains that the driver had made available when its index was last read.
    seen_available: u16,
    /// Number of chains returned so far, which wraps.
    next_used: u16,
    /// The used index when an interrupt was last considered.
    considered_used: u16,
    doorbell: EventFd,
    memory: Arc<GuestMemory>,
}

impl AsRawFd for VirtQueue {
    /// Returns the doorbell, which is readable once the driver has rung it.
    fn as_raw_fd(&self) -> RawFd {
        self.doorbell.as_raw_fd()
    }
}

impl VirtQueue {
    /// Makes queue number `index` of a device, set up by its driver as `queue` says.
    ///
    /// # Errors
    /// If its rings are not in guest memory.
    pub fn new(
        index: u16,
        queue: &Queue,
        doorbell: EventFd,
        memory: Arc<GuestMemory>,
    ) -> Result<VirtQueue, QueueError> {
        let rings = if queue.ready() {
            let rings = Rings::new(queue, &memory);
            Some(rings.ok_or(QueueError::Rings { queue: index })?)
        } else {
            None
        };
        Ok(VirtQueue {
            index,
            max_size: queue.max_size(),
            size: queue.size(),
            event_index: queue.event_idx_enabled(),
            rings,
            next_available: queue.next_avail(),
            substitutes: Vec::new(),
            substitutes_end: 0,
            seen_available: queue.next_avail(),
            next_used: queue.next_used(),
            considered_used: queue.next_used(),
            doorbell,
            memory,
        })
    }

    /// Whether the driver uses the queue.
    pub fn is_set_up(&self) -> bool {
        self.rings.is_some()
    }

    /// Returns its size in descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns its index among the queues of the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Returns how far it has come. All chains that were taken must have been returned or put back.
    pub fn progress(&self) -> QueueProgress {
        QueueProgress {
            next_available: self.next_available,
            next_used: self.next_used,
        }
    }

    /// Clears the doorbell.
    pub fn clear_doorbell(&self) {
        // The event is non-blocking: the read fails only if the doorbell was not rung.
        let _ = self.doorbell.read();
    }

    /// Rings the doorbell on the driver's behalf, for work that is left to the next turn of the event loop.
    pub fn ring_doorbell(&self) {
        // It fails only if the counter is full, and then the doorbell is readable already.
        let _ = self.doorbell.write(1);
    }

    /// Takes the next available chain into `chain`; `false` if there is none, or the content of guest memory has been lost.
    ///
    /// # Errors
    /// If the driver has broken the rules of the rings. The offending chain stays in the queue, so no more
    /// chains can be taken.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.readable.clear();
        chain.writable.clear();
        self.pop_behind(chain)
    }

    /// Takes the next available chain like [`VirtQueue::pop`], but appends its buffers to those that `chain`
    /// holds already.
    ///
    /// # Errors
    /// Those of [`VirtQueue::pop`].
    pub fn pop_behind(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.has_available()? {
            return Ok(false);
        }
        let substitute = self.next_substitute();
        let Some(rings) = &self.rings else {
            return Ok(false);
        };
        chain.head = substitute.unwrap_or_else(|| rings.available_head(self.next_available));
        chain.last_writable_byte = None;
        self.take_buffers(rings, chain)?;
        // Zeroes in the place of what the driver wrote could be another request, or be written to a disk.
        if !chain.readable.await_pages() {
            return Ok(false);
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Returns the head to take in place of the next one in the available ring, if there is one.
    #[inline]
    fn next_substitute(&mut self) -> Option<u16> {
        if self.substitutes.is_empty() {
            return None;
        }
        let head = self.substitutes().first().copied();
        if head.is_none() {
            // They would be used again once the positions have wrapped.
            self.substitutes.clear();
        }
        head
    }

    /// Returns the heads that are taken next, in place of those in the available ring.
    ///
    /// A device that returns chains out of order may put back some that are not the last that it took. The
    /// available ring, which only the driver may write, then does not say which these are.
    pub(super) fn substitutes(&self) -> &[u16] {
        let count = usize::from(self.substitutes_end.wrapping_sub(self.next_available));
        let taken = self.substitutes.len().checked_sub(count);
        taken.map_or(&[], |taken| &self.substitutes[taken..])
    }

    /// Sets the [`VirtQueue::substitutes`] of a queue that had come as far as this one.
    pub(super) fn set_substitutes(&mut self, heads: Vec<u16>) {
        self.substitutes_end = self.next_available.wrapping_add(heads.len() as u16);
        self.substitutes = heads;
    }

    /// Puts back all chains that were taken and not returned, to be taken again in the order of `heads`,
    /// whatever order they were taken in.
    pub(super) fn put_back(&mut self, mut heads: Vec<u16>) {
        let count = heads.len() as u16;
        heads.extend_from_slice(self.substitutes());
        self.next_available = self.next_available.wrapping_sub(count);
        // Usually they are the chains in the ring, and are then taken again in the ring's order.
        if self.are_in_ring(&heads) {
            heads.clear();
        }
        self.set_substitutes(heads);
    }

    /// Whether the chains next in the ring are those of `heads`, in any order.
    fn are_in_ring(&self, heads: &[u16]) -> bool {
        let Some(rings) = &self.rings else {
            return heads.is_empty();
        };
        let positions =
            (0..heads.len() as u16).map(|index| self.next_available.wrapping_add(index));
        let mut in_ring: Vec<u16> = positions.map(|place| rings.available_head(place)).collect();
        let mut heads = heads.to_vec();
        in_ring.sort_unstable();
        heads.sort_unstable();
        in_ring == heads
    }

    /// Adds the buffers of the chain at `chain.head` to `chain`.
    fn take_buffers(&self, rings: &Rings, chain: &mut Chain) -> Result<(), QueueError> {
        let (queue, head) = (self.index, chain.head);
        let broken = |descriptors| QueueError::BrokenChain {
            queue,
            head,
            descriptors,
        };
        let mut table: Option<IndirectTable<'_>> = None;
        let mut index = head;
        // No chain is longer than its queue, including an indirect table (section 2.7.5.3.1). If a driver
        // uses a smaller queue than it could, chains are still allowed up to the maximum size, as Linux does
        // not observe the smaller one.
        for count in 0..self.max_size {
            let read = |index| match &table {
                Some(table) => table.descriptor(index),
                None => rings.descriptor(index),
            };
            let mut descriptor = read(index).ok_or(broken(count))?;
            if descriptor.is_indirect() {
                // A table within a table, or one that is followed by more descriptors, is invalid.
                if table.is_some() || descriptor.has_next() {
                    return Err(broken(count));
                }
                let indirect = IndirectTable::new(descriptor, &self.memory);
                let indirect = indirect.ok_or(broken(count))?;
                descriptor = indirect.descriptor(0).ok_or(broken(count))?;
                if descriptor.is_indirect() {
                    return Err(broken(count));
                }
                table = Some(indirect);
            }
            let (address, len) = (descriptor.address, descriptor.len);
            let pushed = if descriptor.is_writable() {
                if len > 0 {
                    let last = address.0.wrapping_add(u64::from(len - 1));
                    chain.last_writable_byte = Some(GuestAddress(last));
                }
                chain.writable.push(address, len)
            } else if chain.last_writable_byte.is_some() {
                return Err(QueueError::Order { queue, head });
            } else {
                chain.readable.push(address, len)
            };
            pushed.map_err(|source| QueueError::Buffer {
                queue,
                head,
                source,
            })?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(broken(self.max_size))
    }

    /// Whether a chain is available. None is if the content of guest memory has been lost.
    ///
    /// # Errors
    /// If the driver claims that more chains are available than possible.
    pub fn has_available(&mut self) -> Result<bool, QueueError> {
        let is_available =
            self.seen_available != self.next_available || self.available_count()? > 0;
        Ok(is_available && !self.memory.is_lost())
    }

    /// Returns how many chains are available.
    ///
    /// # Errors
    /// Those of [`VirtQueue::has_available`].
    pub fn available_count(&mut self) -> Result<u16, QueueError> {
        let Some(rings) = &self.rings else {
            return Ok(0);
        };
        let index = rings.available_index();
        let count = index.wrapping_sub(self.next_available);
        if self.memory.is_lost() {
            return Ok(0);
        }
        if count > self.size {
            let queue = self.index;
            return Err(QueueError::TooManyAvailable { queue, count });
        }
        self.seen_available = index;
        Ok(count)
    }

    /// Puts back the chain taken last, to be taken again.
    pub fn undo_pop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Returns the chain at `head` to the driver, with `written` bytes of its writable buffers
    /// filled.
    #[inline]
    pub fn add_used(&mut self, head: u16, written: u32) {
        self.add_used_together(&[(head, written)]);
    }

    /// Returns several chains like [`VirtQueue::add_used`]: the driver sees none of them or all (section
    /// 2.7.8). There must not be more than the queue's size.
    #[inline]
    pub fn add_used_together(&mut self, used: &[(u16, u32)]) {
        let Some(rings) = &self.rings else { return };
        self.next_used = rings.add_used(self.next_used, used);
    }

    /// Asks the driver not to ring the doorbell, as the queue is being served.
    pub fn disable_doorbell(&mut self) {
        // With event indices there is nothing to do: once the driver has rung, the index that was asked for
        // has passed.
        if let Some(rings) = &self.rings
            && !self.event_index
        {
            rings.set_used_flags(VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    /// Asks the driver to ring the doorbell again. Returns `true` if chains came in meanwhile, for which it
    /// may not have rung.
    ///
    /// # Errors
    /// Those of [`VirtQueue::has_available`].
    pub fn enable_doorbell(&mut self) -> Result<bool, QueueError> {
        if !self.ask_for_doorbell(self.next_available) {
            return Ok(false);
        }
        self.has_available()
    }

    /// Asks for the doorbell like [`VirtQueue::enable_doorbell`], but leaves `count` available chains in the
    /// queue, and asks for the doorbell when there are more. Returns `true` if there are more already.
    ///
    /// # Errors
    /// Those of [`VirtQueue::has_available`].
    pub(super) fn enable_doorbell_behind(&mut self, count: u16) -> Result<bool, QueueError> {
        if !self.ask_for_doorbell(self.next_available.wrapping_add(count)) {
            return Ok(false);
        }
        Ok(self.available_count()? > count)
    }

    /// Asks for the doorbell when the driver makes available the chain that is number `next`; `false` if
    /// it does not use the queue.
    fn ask_for_doorbell(&self, next: u16) -> bool {
        let Some(rings) = &self.rings else {
            return false;
        };
        if self.event_index {
            rings.set_available_event(next);
        } else {
            rings.set_used_flags(0);
        }
        // The available index is read only after the driver can see the request for the doorbell, so at least
        // one of the two sides sees what the other wrote.
        fence(Ordering::SeqCst);
        true
    }

    /// Serves the available chains: `handle` does the work of each chain and returns how many bytes of its
    /// writable buffers it filled. One interrupt tells the driver of them all.
    ///
    /// At most as many chains are served as the queue holds, and none is begun after [`MAX_TURN`], so that
    /// other devices get their turn even if a driver never stops. The doorbell is rung again for the rest.
    ///
    /// # Errors
    /// If the driver has broken the rules of the rings, or those that `handle` checks. The offending chain
    /// stays in the queue.
    pub fn serve<E: From<QueueError>>(
        &mut self,
        chain: &mut Chain,
        link: &DriverLink,
        handle: impl FnMut(&mut Chain) -> Result<u32, E>,
    ) -> Result<(), E> {
        self.serve_while(chain, link, || Ok(true), handle)
    }

    /// Serves chains like [`VirtQueue::serve`] while `may_go_on`, which is called before each chain, returns
    /// `true`. If it returns `false`, the doorbell is left disabled: the caller has to have the queue served
    /// again.
    ///
    /// # Errors
    /// Those of [`VirtQueue::serve`] and of `may_go_on`.
    pub(super) fn serve_while<E: From<QueueError>>(
        &mut self,
        chain: &mut Chain,
        link: &DriverLink,
        mut may_go_on: impl FnMut() -> Result<bool, E>,
        mut handle: impl FnMut(&mut Chain) -> Result<u32, E>,
    ) -> Result<(), E> {
        self.disable_doorbell();
        let mut served = false;
        let result = self.serve_turn(chain, &mut served, &mut may_go_on, &mut handle);
        // The driver is told of what was done, even if it broke the rules afterwards.
        if served {
            self.notify_driver(link);
        }
        result
    }

    fn serve_turn<E: From<QueueError>>(
        &mut self,
        chain: &mut Chain,
        served: &mut bool,
        may_go_on: &mut impl FnMut() -> Result<bool, E>,
        handle: &mut impl FnMut(&mut Chain) -> Result<u32, E>,
    ) -> Result<(), E> {
        let start = Instant::now();
        for _ in 0..self.size {
            if !may_go_on()? {
                return Ok(());
            }
            if !self.pop(chain)? {
                break;
            }
            let written = match handle(chain) {
                Ok(written) => written,
                Err(error) => {
                    self.undo_pop();
                    return Err(error);
                }
            };
            self.add_used(chain.head, written);
            *served = true;
            if start.elapsed() >= MAX_TURN {
                break;
            }
        }
        if self.enable_doorbell()? {
            self.ring_doorbell();
        }
        Ok(())
    }

    /// Notifies the driver of the chains returned since the last call, if it wants an interrupt for them.
    pub fn notify_driver(&mut self, link: &DriverLink) {
        if self.needs_interrupt() {
            link.notify_used_buffer(self.index);
        }
    }

    /// Whether the driver wants an interrupt for the chains returned since the last call
    /// (section 2.7.7.2).
    pub fn needs_interrupt(&mut self) -> bool {
        let used = self.next_used;
        let added = used.wrapping_sub(std::mem::replace(&mut self.considered_used, used));
        let Some(rings) = &self.rings else {
            return false;
        };
        if added == 0 {
            return false;
        }
        // The driver's wish is read only after the driver can see the used index, so at least one of the two
        // sides sees what the other wrote.
        fence(Ordering::SeqCst);
        if self.event_index {
            let behind = used.wrapping_sub(rings.used_event()).wrapping_sub(1);
            return behind < added;
        }
        u32::from(rings.available_flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }
}

/// Returns how far each of `count` queues has come, given the queues that a worker has: it takes nothing from
/// the others.
pub(super) fn progress_of<'a>(
    count: usize,
    queues: impl IntoIterator<Item = &'a VirtQueue>,
) -> Vec<QueueProgress> {
    let mut all = vec![QueueProgress::default(); count];
    for queue in queues {
        if let Some(progress) = all.get_mut(usize::from(queue.index())) {
            *progress = queue.progress();
        }
    }
    all
}

#[cfg(test)]
mod tests;
