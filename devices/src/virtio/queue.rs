//! A virtqueue as a worker uses it: chains are taken from the available ring and returned by the
//! used ring (section 2.7).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioInterrupt;
use super::buffers::{BufferError, GuestBuffers};
use crate::GuestMemory;

/// Offset of the flags in the available ring (section 2.7.6).
const AVAILABLE_FLAGS: u64 = 0;
/// Offset of the index in the available ring.
const AVAILABLE_INDEX: u64 = 2;
/// Offset of the elements, of two bytes each, in the available ring; `used_event` follows them.
const AVAILABLE_RING: u64 = 4;
/// Offset of the index in the used ring (section 2.7.8).
const USED_INDEX: u64 = 2;
/// Offset of the elements in the used ring.
const USED_RING: u64 = 4;
/// Size of an element of the used ring in bytes.
const USED_ELEMENT_SIZE: u64 = 8;

/// How long one queue is served before other devices have their turn.
pub const MAX_TURN: Duration = Duration::from_millis(20);

/// What a driver did that makes a queue unusable until the device is reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings themselves cannot be used.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// What is wrong.
        source: virtio_queue::Error,
    },
    /// A chain does not end: a loop, a link or an indirect table that is out of range.
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
    /// Index of the first descriptor, by which the chain is returned.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: GuestBuffers,
    /// Where the device writes for the driver.
    pub writable: GuestBuffers,
    /// Address of the last writable byte, if there is any.
    pub last_writable_byte: Option<GuestAddress>,
}

impl Chain {
    /// Room for chains in `memory`.
    pub fn new(memory: &Arc<GuestMemory>) -> Chain {
        Chain {
            head: 0,
            readable: GuestBuffers::new(memory.clone()),
            writable: GuestBuffers::new(memory.clone()),
            last_writable_byte: None,
        }
    }
}

/// A virtqueue with its doorbell and the memory it lives in.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    /// Where the used ring ended when the driver was last thought of for an interrupt.
    considered_used: u16,
    doorbell: EventFd,
    memory: Arc<GuestMemory>,
}

impl AsRawFd for VirtQueue {
    /// The doorbell, readable once the driver has rung it.
    fn as_raw_fd(&self) -> RawFd {
        self.doorbell.as_raw_fd()
    }
}

impl VirtQueue {
    /// Queue number `index` of a device, set up by its driver as `queue` says.
    pub fn new(index: u16, queue: Queue, doorbell: EventFd, memory: Arc<GuestMemory>) -> VirtQueue {
        VirtQueue {
            index,
            considered_used: queue.next_used(),
            queue,
            doorbell,
            memory,
        }
    }

    /// Size in descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Consumes the rings of the doorbell so far.
    pub fn clear_doorbell(&self) {
        // The event is non-blocking: it fails only where nobody has rung.
        let _ = self.doorbell.read();
    }

    /// Rings the doorbell on the driver's behalf, for work that is put off to the next turn of the
    /// event loop.
    pub fn ring_doorbell(&self) {
        // It fails only when the counter is full, and then it is readable as wanted.
        let _ = self.doorbell.write(1);
    }

    /// Takes the next available chain into `chain`; `false` where there is none.
    ///
    /// # Errors
    /// When the driver has broken the rules of the rings. Nothing more can be taken then.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.readable.clear();
        chain.writable.clear();
        self.pop_behind(chain)
    }

    /// As [`VirtQueue::pop`], but puts the buffers of the chain behind those that `chain` holds
    /// already.
    ///
    /// # Errors
    /// As [`VirtQueue::pop`].
    pub fn pop_behind(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let queue = self.index;
        if !self.queue.ready() {
            return Ok(false);
        }
        let next = self
            .queue
            .iter(&*self.memory)
            .map_err(|source| QueueError::Ring { queue, source })?
            .next();
        let Some(mut descriptors) = next else {
            return Ok(false);
        };
        let head = descriptors.head_index();
        chain.head = head;
        chain.last_writable_byte = None;
        let mut count = 0;
        let mut has_next = true;
        for descriptor in descriptors.by_ref() {
            count += 1;
            has_next = descriptor.has_next();
            // No chain is longer than its queue, an indirect table included (section 2.7.5.3.1). A
            // driver that uses a smaller queue than it could is not held to that one's size, as
            // Linux does not hold itself to it.
            if count > self.queue.max_size() {
                has_next = true;
                break;
            }
            let pushed = if descriptor.is_write_only() {
                if descriptor.len() > 0 {
                    let last = descriptor
                        .addr()
                        .0
                        .wrapping_add(u64::from(descriptor.len() - 1));
                    chain.last_writable_byte = Some(GuestAddress(last));
                }
                chain.writable.push(descriptor.addr(), descriptor.len())
            } else if chain.last_writable_byte.is_some() {
                return Err(QueueError::Order { queue, head });
            } else {
                chain.readable.push(descriptor.addr(), descriptor.len())
            };
            pushed.map_err(|source| QueueError::Buffer {
                queue,
                head,
                source,
            })?;
        }
        // The iterator ends alike on the last descriptor and on one it cannot read.
        if has_next {
            return Err(QueueError::BrokenChain {
                queue,
                head,
                descriptors: count,
            });
        }
        Ok(true)
    }

    /// Whether a chain is available.
    ///
    /// # Errors
    /// When the available ring cannot be read.
    pub fn has_available(&self) -> Result<bool, QueueError> {
        let index = self.load(self.queue.avail_ring() + AVAILABLE_INDEX)?;
        Ok(self.queue.ready() && index != self.queue.next_avail())
    }

    /// Puts the chain taken last back, to be taken again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns the chain at `head` to the driver, with `written` bytes of its writable buffers
    /// filled.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.add_used_together(&[(head, written)])
    }

    /// Returns several chains, each as [`VirtQueue::add_used`] does: the driver sees none of them
    /// or all (section 2.7.8). They must be no more than the queue's size.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn add_used_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let ring = self.queue.used_ring();
        let mut next_used = self.queue.next_used();
        for &(head, written) in used {
            let slot = u64::from(next_used & (self.queue.size() - 1));
            let element = [u32::from(head).to_le(), written.to_le()];
            self.memory
                .write_obj(
                    element,
                    GuestAddress(ring + USED_RING + slot * USED_ELEMENT_SIZE),
                )
                .map_err(|error| self.ring_error(virtio_queue::Error::GuestMemory(error)))?;
            next_used = next_used.wrapping_add(1);
        }
        self.memory
            .store(
                next_used.to_le(),
                GuestAddress(ring + USED_INDEX),
                Ordering::Release,
            )
            .map_err(|error| self.ring_error(virtio_queue::Error::GuestMemory(error)))?;
        self.queue.set_next_used(next_used);
        Ok(())
    }

    /// Asks the driver not to ring the doorbell, as the queue is being looked at.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn disable_doorbell(&mut self) -> Result<(), QueueError> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue
            .disable_notification(&*self.memory)
            .map_err(|source| self.ring_error(source))
    }

    /// Asks the driver to ring the doorbell again. `true` when chains came in meanwhile, for which
    /// it may not have rung.
    ///
    /// # Errors
    /// When the rings cannot be accessed.
    pub fn enable_doorbell(&mut self) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue
            .enable_notification(&*self.memory)
            .map_err(|source| self.ring_error(source))
    }

    /// Serves the available chains: `handle` does what each asks for and says how many bytes of its
    /// writable buffers it filled. One interrupt tells the driver of them all.
    ///
    /// No more chains are served than the queue holds, and none is begun after [`MAX_TURN`], so that
    /// a driver that never stops leaves other devices their turn; for the rest the doorbell is rung
    /// again.
    ///
    /// # Errors
    /// When the driver has broken the rules of the rings, or those that `handle` knows.
    pub fn serve<E: From<QueueError>>(
        &mut self,
        chain: &mut Chain,
        interrupt: &VirtioInterrupt,
        mut handle: impl FnMut(&mut Chain) -> Result<u32, E>,
    ) -> Result<(), E> {
        self.disable_doorbell()?;
        let mut served = false;
        let result = self.serve_turn(chain, &mut served, &mut handle);
        // The driver hears of what was done, even when it has broken the rules after that.
        if served && self.needs_interrupt()? {
            interrupt.notify_used_buffer();
        }
        result
    }

    fn serve_turn<E: From<QueueError>>(
        &mut self,
        chain: &mut Chain,
        served: &mut bool,
        handle: &mut impl FnMut(&mut Chain) -> Result<u32, E>,
    ) -> Result<(), E> {
        let start = Instant::now();
        for _ in 0..self.queue.size() {
            if !self.pop(chain)? {
                break;
            }
            let written = handle(chain)?;
            self.add_used(chain.head, written)?;
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

    /// Whether the driver wants an interrupt for the chains returned since the last call
    /// (section 2.7.7.2).
    ///
    /// # Errors
    /// When the available ring cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        let used = self.queue.next_used();
        let added = used.wrapping_sub(std::mem::replace(&mut self.considered_used, used));
        if added == 0 {
            return Ok(false);
        }
        // What the driver wishes is read after it can see the used index: of the two sides, at
        // least one sees what the other wrote.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            let used_event = ring + AVAILABLE_RING + u64::from(self.queue.size()) * 2;
            let behind = used.wrapping_sub(self.load(used_event)?).wrapping_sub(1);
            return Ok(behind < added);
        }
        let flags = self.load(ring + AVAILABLE_FLAGS)?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    fn load(&self, address: u64) -> Result<u16, QueueError> {
        self.memory
            .load(GuestAddress(address), Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|error| self.ring_error(virtio_queue::Error::GuestMemory(error)))
    }

    fn ring_error(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Ring {
            queue: self.index,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};

    const DATA: u64 = 0x4000;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap())
    }

    fn buffer(offset: u64, len: u32, writable: bool) -> Buffer {
        let address = DATA + offset;
        Buffer {
            address,
            len,
            writable,
        }
    }

    /// A driver and its device with a queue of four descriptors.
    fn pair(event_index: bool) -> (TestDriver, VirtQueue, Chain) {
        let memory = memory();
        let driver = TestDriver::new(&memory, 0x1000, 4);
        const { assert!(0x1000 + RINGS_SIZE <= DATA) };
        let queue = driver.queue(0, event_index);
        (driver, queue, Chain::new(&memory))
    }

    #[test]
    fn a_chain_is_taken_whole_and_returned() {
        let (mut driver, mut queue, mut chain) = pair(false);
        assert!(!queue.pop(&mut chain).unwrap());
        let head = driver.offer(&[buffer(0, 3, false), buffer(8, 5, true), buffer(16, 6, true)]);
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!((chain.readable.len(), chain.writable.len()), (3, 11));
        assert_eq!(chain.last_writable_byte, Some(GuestAddress(DATA + 21)));
        queue.undo_pop();
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!((chain.head, chain.writable.len()), (head, 11));
        queue.add_used(head, 7).unwrap();
        assert_eq!(driver.take_used(), [(head, 7)]);
        assert!(!queue.pop(&mut chain).unwrap());
    }

    #[test]
    fn chains_are_taken_behind_one_another_and_returned_together() {
        let (mut driver, mut queue, mut chain) = pair(false);
        for _ in 0..5 {
            let first = driver.offer(&[buffer(0, 3, true)]);
            let second = driver.offer(&[buffer(8, 4, true), buffer(16, 5, true)]);
            chain.writable.clear();
            assert!(queue.pop_behind(&mut chain).unwrap());
            assert_eq!((chain.head, chain.writable.len()), (first, 3));
            assert!(queue.pop_behind(&mut chain).unwrap());
            assert_eq!((chain.head, chain.writable.len()), (second, 12));
            queue.add_used_together(&[(second, 1), (first, 2)]).unwrap();
            assert_eq!(driver.take_used(), [(second, 1), (first, 2)]);
        }
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        let (mut driver, mut queue, mut chain) = pair(false);
        driver.offer(&[buffer(0, 3, true), buffer(8, 5, false)]);
        let error = queue.pop(&mut chain).unwrap_err();
        assert!(
            matches!(error, QueueError::Order { head: 0, .. }),
            "{error}"
        );

        let (mut driver, mut queue, mut chain) = pair(false);
        driver.offer(&[buffer(0x4000, 1, true)]);
        let error = queue.pop(&mut chain).unwrap_err();
        assert!(
            matches!(error, QueueError::Buffer { head: 0, .. }),
            "{error}"
        );

        // A chain that is a loop, one whose link leads nowhere, and a head that is none.
        for (next, head) in [(0, 0), (4, 0), (0, 4)] {
            let (mut driver, mut queue, mut chain) = pair(false);
            driver.write_descriptor(0, buffer(0, 1, true), 1, next);
            driver.offer_head(head);
            let error = queue.pop(&mut chain).unwrap_err();
            assert!(matches!(error, QueueError::BrokenChain { .. }), "{error}");
        }

        let (mut driver, mut queue, mut chain) = pair(false);
        for _ in 0..5 {
            driver.offer_head(0);
        }
        let error = queue.pop(&mut chain).unwrap_err();
        assert!(matches!(error, QueueError::Ring { .. }), "{error}");
    }

    #[test]
    fn interrupts_come_when_the_driver_wants_them() {
        let (driver, mut queue, _) = pair(false);
        assert!(!queue.needs_interrupt().unwrap(), "nothing was returned");
        queue.add_used(0, 0).unwrap();
        assert!(queue.needs_interrupt().unwrap());
        driver.set_no_interrupt(true);
        queue.add_used(0, 0).unwrap();
        assert!(!queue.needs_interrupt().unwrap());
        driver.set_no_interrupt(false);
        assert!(
            !queue.needs_interrupt().unwrap(),
            "that chain was considered"
        );
    }

    #[test]
    fn interrupts_come_at_the_event_index() {
        let (driver, mut queue, _) = pair(true);
        queue.add_used(0, 0).unwrap();
        assert!(queue.needs_interrupt().unwrap(), "the first, at index 0");
        queue.add_used(0, 0).unwrap();
        assert!(!queue.needs_interrupt().unwrap(), "index 0 has passed");
        driver.set_used_event(4);
        queue.add_used_together(&[(0, 0), (1, 0)]).unwrap();
        assert!(
            !queue.needs_interrupt().unwrap(),
            "index 4 is not returned yet"
        );
        queue.add_used_together(&[(0, 0), (1, 0), (2, 0)]).unwrap();
        assert!(queue.needs_interrupt().unwrap(), "index 4 is among them");
        assert!(!queue.needs_interrupt().unwrap());
        // The index wraps.
        driver.set_used_event(u16::MAX);
        let mut interrupts = 0;
        for _ in 7..=u16::MAX {
            queue.add_used(0, 0).unwrap();
            interrupts += usize::from(queue.needs_interrupt().unwrap());
        }
        assert_eq!(interrupts, 1);
    }

    #[test]
    fn serving_suppresses_doorbells_and_interrupts_once() {
        let (mut driver, mut queue, mut chain) = pair(false);
        let counter = InterruptCounter::default();
        let interrupt = counter.interrupt();
        for _ in 0..3 {
            driver.offer(&[buffer(0, 8, true)]);
        }
        let serve = |chain: &mut Chain| -> Result<u32, QueueError> {
            assert!(!driver.wants_doorbell());
            Ok(chain.writable.write(b"x") as u32)
        };
        queue.serve(&mut chain, &interrupt, serve).unwrap();
        assert!(driver.wants_doorbell());
        assert_eq!(driver.take_used(), [(0, 1), (1, 1), (2, 1)]);
        assert_eq!(counter.take(), 1);
    }

    #[test]
    fn a_queue_that_is_not_set_up_leaves_memory_alone() {
        let memory = memory();
        memory
            .write_slice(&[0x5a; 0x8000], GuestAddress(0))
            .unwrap();
        let (queue, doorbell) = (Queue::new(4).unwrap(), EventFd::new(0).unwrap());
        let mut queue = VirtQueue::new(0, queue, doorbell, memory.clone());
        let counter = InterruptCounter::default();
        let mut chain = Chain::new(&memory);
        let serve = |_: &mut Chain| -> Result<u32, QueueError> { panic!("there is no chain") };
        queue
            .serve(&mut chain, &counter.interrupt(), serve)
            .unwrap();
        let mut bytes = vec![0; 0x8000];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0x5a));
        assert_eq!(counter.take(), 0);
    }
}
