//! The driver's side of a virtqueue, for tests of the device's side.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::{io, mem};

use bantam_memory::GuestMemory;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::transport::mmio::MmioLink;
use super::{DriverLink, Notify, QueueSet, VirtQueue};
use crate::InterruptLine;
use crate::worker::QueueProgress;

/// Offset of the available ring from the descriptor table; room for 256 descriptors.
const AVAILABLE: u64 = 0x1000;
/// Offset of the used ring from the descriptor table.
const USED: u64 = 0x2000;
/// Size of the memory that the rings take, in bytes.
pub const RINGS_SIZE: u64 = 0x3000;

/// A buffer as a driver describes it.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A driver with one queue of up to 256 descriptors, whose rings are in the [`RINGS_SIZE`] bytes
/// of memory at `base`.
pub struct TestDriver {
    memory: Arc<GuestMemory>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
    doorbell: EventFd,
}

impl TestDriver {
    pub fn new(memory: &Arc<GuestMemory>, base: u64, size: u16) -> TestDriver {
        TestDriver {
            memory: memory.clone(),
            base,
            size,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
            doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// Makes the device's side, as the driver sets it up.
    pub fn queue(&self, index: u16, event_index: bool) -> VirtQueue {
        self.queue_from(index, event_index, QueueProgress::default())
    }

    /// Makes the device's side, which goes on from `progress`.
    pub fn queue_from(&self, index: u16, event_index: bool, progress: QueueProgress) -> VirtQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.base + AVAILABLE))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.base + USED))
            .unwrap();
        queue.set_event_idx(event_index);
        queue.set_next_avail(progress.next_available);
        queue.set_next_used(progress.next_used);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        let doorbell = self.doorbell.try_clone().unwrap();
        VirtQueue::new(index, &queue, doorbell, self.memory.clone()).unwrap()
    }

    /// Returns the size of the queue in descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the addresses of the descriptor table, the available ring and the used ring.
    pub fn rings(&self) -> [u64; 3] {
        [self.base, self.base + AVAILABLE, self.base + USED]
    }

    /// Moves the driver to `memory`, a copy of the memory that it was in.
    pub fn move_to(&mut self, memory: &Arc<GuestMemory>) {
        self.memory = memory.clone();
    }

    /// Returns the head of the chain that [`TestDriver::offer`] makes available next.
    pub fn next_head(&self) -> u16 {
        self.next_descriptor % self.size
    }

    /// Makes a chain of `buffers` available and returns its head. Descriptors are used in turn: the test must
    /// not have more of them in use than there are.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_head();
        for (position, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor % self.size;
            self.next_descriptor = (index + 1) % self.size;
            let mut flags = 0;
            if buffer.writable {
                flags |= VRING_DESC_F_WRITE as u16;
            }
            if position + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT as u16;
            }
            let next = self.next_descriptor;
            self.write_descriptor(index, *buffer, flags, next);
        }
        self.offer_head(head);
        head
    }

    /// Writes a descriptor without changing anything else.
    pub fn write_descriptor(&self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let address = self.base + u64::from(index) * 16;
        self.store(address, buffer.address);
        self.store(
            address + 8,
            u64::from(buffer.len) | u64::from(flags) << 32 | u64::from(next) << 48,
        );
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.store(self.base + AVAILABLE + 4 + slot * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.store(self.base + AVAILABLE + 2, self.next_available);
    }

    /// Returns the head and length of each chain that the device has returned since the last call.
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let end: u16 = self.load(self.base + USED + 2);
        let mut used = Vec::new();
        while self.next_used != end {
            let element = self.base + USED + 4 + u64::from(self.next_used % self.size) * 8;
            used.push((self.load::<u32>(element) as u16, self.load(element + 4)));
            self.next_used = self.next_used.wrapping_add(1);
        }
        used
    }

    /// With event indices: asks for an interrupt once the device has returned chain number `index` of all,
    /// counted from zero.
    pub fn set_used_event(&self, index: u16) {
        self.store(self.base + AVAILABLE + 4 + u64::from(self.size) * 2, index);
    }

    /// Without event indices: turns interrupts off, or on again.
    pub fn set_no_interrupt(&self, no_interrupt: bool) {
        self.store(self.base + AVAILABLE, u16::from(no_interrupt));
    }

    /// Without event indices: whether the device wants the doorbell to be rung.
    pub fn wants_doorbell(&self) -> bool {
        self.load::<u16>(self.base + USED) == 0
    }

    /// With event indices: returns the chain, counted from zero, at which the device wants the doorbell to be
    /// rung.
    pub fn available_event(&self) -> u16 {
        self.load(self.base + USED + 4 + u64::from(self.size) * 8)
    }

    pub fn ring_doorbell(&self) {
        self.doorbell.write(1).unwrap();
    }

    fn store<T: vm_memory::AtomicAccess>(&self, address: u64, value: T) {
        self.memory
            .store(value, GuestAddress(address), Ordering::Release)
            .unwrap();
    }

    fn load<T: vm_memory::AtomicAccess>(&self, address: u64) -> T {
        self.memory
            .load(GuestAddress(address), Ordering::Acquire)
            .unwrap()
    }
}

/// Counts the notifications of a driver.
#[derive(Clone, Default)]
pub struct InterruptCounter(Arc<Notifications>);

#[derive(Default)]
struct Notifications {
    count: AtomicUsize,
    configuration_changes: AtomicUsize,
    queues: Mutex<QueueSet>,
}

impl InterruptCounter {
    /// Returns how many interrupts there were since the last call.
    pub fn take(&self) -> usize {
        self.0.count.swap(0, Ordering::SeqCst)
    }

    /// Returns how many of the interrupts since the last call were for a change of the configuration. Those
    /// of an [`InterruptCounter::mmio_link`] are not known.
    pub fn take_configuration_changes(&self) -> usize {
        self.0.configuration_changes.swap(0, Ordering::SeqCst)
    }

    /// Returns the queues that the interrupts since the last call were for. Those of an
    /// [`InterruptCounter::mmio_link`] are not known.
    pub fn take_queues(&self) -> QueueSet {
        mem::take(&mut *self.0.queues.lock().unwrap())
    }

    /// Makes the link of a device to its driver, whose notifications are counted here.
    pub fn link(&self) -> Arc<DriverLink> {
        Arc::new(DriverLink::new(
            "device".to_string(),
            Arc::new(self.clone()),
        ))
    }

    /// Makes the link of a device behind a transport to its driver, whose interrupts are counted here.
    pub fn mmio_link(&self) -> MmioLink {
        MmioLink::new("device".to_string(), Box::new(self.clone()))
    }
}

impl Notify for InterruptCounter {
    fn used_buffers(&self, queues: QueueSet) -> io::Result<()> {
        assert!(!queues.is_empty());
        self.0.queues.lock().unwrap().extend(queues.iter());
        self.trigger()
    }

    fn configuration_change(&self) -> io::Result<()> {
        self.0.configuration_changes.fetch_add(1, Ordering::SeqCst);
        self.trigger()
    }
}

impl InterruptLine for InterruptCounter {
    fn trigger(&self) -> io::Result<()> {
        self.0.count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
