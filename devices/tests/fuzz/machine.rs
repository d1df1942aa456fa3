//! A device behind its transport, in a machine with its own memory and without a processor.

use std::hash::{DefaultHasher, Hasher};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use bantam_devices::bus::BusDevice;
use bantam_devices::event_loop::Subscriber;
use bantam_devices::lifecycle::Device;
use bantam_devices::virtio::transport::mmio::{MmioLink, MmioTransport, QUEUE_NOTIFY};
use bantam_devices::virtio::{Activation, ConfigSpace, VirtioDevice};
use bantam_devices::worker::VirtioWorker;
use bantam_devices::{EventLoop, InterruptLine};
use bantam_memory::GuestMemory;
use event_manager::EventManager;
use vm_memory::{Bytes, GuestAddress};

use crate::damage::Damage;
use crate::driver::{DeviceOffer, Driver, MAX_QUEUES, RINGS, RINGS_SIZE, part, register, status};
use crate::operation::Operation;

/// End of the first of two adjacent regions of memory.
pub const SEAM: u64 = 0x2_0000;
/// End of the second region.
pub const HOLE: u64 = 0x4_0000;
/// Start of the third region, which is not adjacent to either.
const BEYOND_HOLE: u64 = 0x8_0000;
/// End of the third region.
pub const MEMORY_END: u64 = 0x9_0000;

/// Turns after which an event loop that is left alone must have nothing to do.
const MAX_TURNS: usize = 100;
/// How long a valid request may take.
const LIMIT: Duration = Duration::from_secs(20);

/// An interrupt line that is not connected.
struct Unconnected;

impl InterruptLine for Unconnected {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A placeholder while there is no device.
struct Absent(ConfigSpace);

impl VirtioDevice for Absent {
    fn device_id(&self) -> u32 {
        0
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[]
    }

    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn activate(&mut self, _activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        Err("there is no device".to_string())
    }
}

pub struct Machine {
    memory: Arc<GuestMemory>,
    transport: MmioTransport,
    event_loop: EventLoop,
    manager: EventManager<Subscriber>,
}

impl Machine {
    pub fn new(device: Box<dyn VirtioDevice>) -> Machine {
        let regions = [(0, SEAM), (SEAM, HOLE), (BEYOND_HOLE, MEMORY_END)]
            .map(|(start, end)| (GuestAddress(start), (end - start) as usize));
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let manager = EventManager::new().unwrap();
        let event_loop = EventLoop::of(&manager);
        let link = MmioLink::new("fuzzed device".to_string(), Box::new(Unconnected));
        let transport =
            MmioTransport::new(device, memory.clone(), event_loop.clone(), link).unwrap();
        Machine {
            memory,
            transport,
            event_loop,
            manager,
        }
    }

    /// Carries out an operation of the guest.
    pub fn act(&mut self, operation: &Operation) {
        match *operation {
            Operation::Read { offset, width } => self.transport.read(offset, &mut vec![0; width]),
            Operation::Write {
                offset,
                value,
                width,
            } => self.write(offset, &value.to_le_bytes()[..width]),
            Operation::Store { address, ref bytes } => self.store(address, bytes),
            Operation::Descriptor {
                table,
                index,
                address,
                len,
                flags,
                next,
            } => {
                let at = table + u64::from(index) * 16;
                let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
                self.store(at, &address.to_le_bytes());
                self.store(at + 8, &rest.to_le_bytes());
            }
            Operation::Offer { queue, head, size } => {
                let ring = RINGS + u64::from(queue) * RINGS_SIZE + part::AVAILABLE;
                let index: u16 = self.load(ring + 2);
                let slot = ring + 4 + u64::from(index % size) * 2;
                self.store(slot, &head.to_le_bytes());
                self.store(ring + 2, &index.wrapping_add(1).to_le_bytes());
            }
            Operation::RingDoorbell { queue } => {
                self.write(QUEUE_NOTIFY, &u32::from(queue).to_le_bytes());
            }
            Operation::Turn => {
                self.turn();
            }
            Operation::Rest => self.rest(),
            Operation::HostSends { .. } | Operation::Suspend { .. } => {}
        }
    }

    /// Runs one turn of the event loop, and returns how many events there were.
    fn turn(&mut self) -> usize {
        self.manager.run_with_timeout(0).unwrap()
    }

    /// Lets the device work until it has nothing to do.
    pub fn rest(&mut self) {
        for _ in 0..MAX_TURNS {
            if self.turn() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    /// Writes a register. A write of the status waits for the event loop.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        if offset == register::STATUS {
            self.on_another_thread(|transport| transport.write(offset, bytes));
        } else {
            self.transport.write(offset, bytes);
        }
    }

    /// Calls `act`, which waits for the event loop, while the loop runs.
    fn on_another_thread<R: Send>(
        &mut self,
        action: impl FnOnce(&mut MmioTransport) -> R + Send,
    ) -> R {
        let (transport, event_loop) = (&mut self.transport, &self.event_loop);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let result = action(transport);
                done.store(true, Ordering::SeqCst);
                event_loop.wake().unwrap();
                result
            });
            while !done.load(Ordering::SeqCst) && !thread.is_finished() {
                self.manager.run_with_timeout(10).unwrap();
            }
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Pauses the device. It does not touch memory until it is resumed.
    pub fn pause(&mut self) {
        self.on_another_thread(|transport| transport.pause().unwrap());
        let before = self.memory_checksum();
        self.rest();
        assert_eq!(self.memory_checksum(), before, "a paused device is at rest");
    }

    pub fn resume(&mut self) {
        // If the guest has set up the device so that it cannot go on, it asks for a reset.
        let _ = self.on_another_thread(Device::resume);
    }

    /// Puts the paused device into its state after power-on.
    pub fn power_cycle(&mut self) {
        self.transport.reset();
    }

    /// Saves the paused device, drops it, and restores its state into the device that `device` makes.
    pub fn replace(&mut self, device: impl FnOnce() -> Box<dyn VirtioDevice>) {
        let section = self.transport.save().unwrap();
        self.put(device);
        self.transport.restore(&section).unwrap();
        assert_eq!(self.transport.save().unwrap(), section);
    }

    /// Replaces the device in the same way, but with the state that `damage` leaves. If that is not a state
    /// of the device, the new device is as after power-on.
    pub fn replace_damaged(
        &mut self,
        device: impl FnOnce() -> Box<dyn VirtioDevice>,
        damage: &Damage,
    ) {
        let section = self.transport.save().unwrap();
        self.put(device);
        self.transport.pause().unwrap();
        if let Some(section) = damage.done_to(&section)
            && self.transport.restore(&section).is_err()
        {
            assert_eq!(self.read_register(register::STATUS), 0);
        }
    }

    /// Replaces the present device, which ends, by the one that `device` makes.
    fn put(&mut self, device: impl FnOnce() -> Box<dyn VirtioDevice>) {
        let transport = |device| {
            let link = MmioLink::new("fuzzed device".to_string(), Box::new(Unconnected));
            let (memory, event_loop) = (self.memory.clone(), self.event_loop.clone());
            MmioTransport::new(device, memory, event_loop, link).unwrap()
        };
        // The new device may take the place of the old one on the host.
        self.transport = transport(Box::new(Absent(ConfigSpace::new(Vec::new()))));
        self.transport = transport(device());
    }

    fn memory_checksum(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (start, end) in [(0, SEAM), (SEAM, HOLE), (BEYOND_HOLE, MEMORY_END)] {
            hasher.write(&self.bytes(start, (end - start) as usize));
        }
        hasher.finish()
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Returns what the device offers, read as a driver does.
    pub fn offer(&mut self) -> DeviceOffer {
        let features = [1u32, 0].into_iter().fold(0, |features, half| {
            self.write(register::DEVICE_FEATURES_SELECT, &half.to_le_bytes());
            features << 32 | u64::from(self.read_register(register::DEVICE_FEATURES))
        });
        let sizes = (0..u32::from(MAX_QUEUES)).map(|queue| {
            self.write(register::QUEUE_SELECT, &queue.to_le_bytes());
            self.read_register(register::QUEUE_SIZE_MAX) as u16
        });
        // A size of 0 means that there is no queue.
        let queue_size = sizes.filter(|&size| size > 0).min().unwrap_or_default();
        DeviceOffer {
            features,
            queue_size,
        }
    }

    pub fn needs_reset(&mut self) -> bool {
        self.read_register(register::STATUS) & status::NEEDS_RESET != 0
    }

    /// Resets the device, whatever its state, and initializes it properly.
    pub fn initialize(&mut self, driver: &mut Driver) {
        self.write(register::STATUS, &[0; 4]);
        assert_eq!(self.read_register(register::STATUS), 0, "after a reset");
        let rings = vec![0; usize::from(MAX_QUEUES) * RINGS_SIZE as usize];
        self.store(RINGS, &rings);
        let offer = self.offer();
        for operation in driver.initialize(offer) {
            self.act(&operation);
        }
        assert_eq!(
            self.read_register(register::STATUS),
            status::READY,
            "after initialization"
        );
    }

    /// Lets the device work until it has returned `count` chains of a queue since it was
    /// initialized.
    pub fn await_used(&mut self, queue: u16, count: u16) {
        let deadline = Instant::now() + LIMIT;
        while self.used_count(queue) != count {
            assert!(Instant::now() < deadline, "a request is not returned");
            self.manager.run_with_timeout(100).unwrap();
        }
    }

    /// Returns how many chains of a queue the device has returned; the count wraps.
    pub fn used_count(&self, queue: u16) -> u16 {
        self.load(RINGS + u64::from(queue) * RINGS_SIZE + part::USED + 2)
    }

    /// Waits a little for an event, and lets the device handle it.
    pub fn wait(&mut self) {
        self.manager.run_with_timeout(10).unwrap();
    }

    fn load<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let address = GuestAddress(address);
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }

    /// Writes to memory, as far as there is memory.
    pub fn store(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }
}
