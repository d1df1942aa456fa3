//! Pausing, saving and moving a device with its transport to another machine, for the tests of devices.

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

use bantam_memory::GuestMemory;
use bantam_state::{RestoreError, Section};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
};
use vm_memory::{Bytes, GuestAddress};

use super::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};
use super::test_event_loop::TestEventLoop;
use super::transport::mmio::{MmioTransport, QUEUE_NOTIFY, register};
use super::{DriverLink, VirtioDevice};
use crate::bus::BusDevice;
use crate::lifecycle::Device;
use crate::suspend_test::SuspendCase;

/// A device with its transport, and a thread that runs its event loop.
pub struct SuspendMachine {
    pub memory: Arc<GuestMemory>,
    pub interrupts: InterruptCounter,
    transport: Option<MmioTransport>,
    _event_loop: TestEventLoop,
}

impl SuspendMachine {
    /// Makes a machine with the device that `make` returns. Its driver has yet to start.
    pub fn new<H>(
        memory: &Arc<GuestMemory>,
        make: impl FnOnce(Arc<DriverLink>) -> (Box<dyn VirtioDevice>, H),
    ) -> (SuspendMachine, H) {
        let event_loop = TestEventLoop::start();
        let interrupts = InterruptCounter::default();
        let link = interrupts.mmio_link();
        let (device, handle) = make(link.driver());
        let transport = MmioTransport::new(device, memory.clone(), event_loop.handle.clone(), link);
        let machine = SuspendMachine {
            memory: memory.clone(),
            interrupts,
            transport: Some(transport.unwrap()),
            _event_loop: event_loop,
        };
        (machine, handle)
    }

    fn transport(&mut self) -> &mut MmioTransport {
        self.transport.as_mut().unwrap()
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport().read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport().write(offset, &value.to_le_bytes());
    }

    /// Returns the device's configuration space as the driver reads it.
    pub fn config(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.transport().read(register::CONFIG, &mut bytes);
        bytes
    }

    /// Initializes the device for a driver that accepts those of `features` that are offered. It uses the
    /// first queues, one for each of `drivers`; the others stay unused.
    pub fn initialize(&mut self, features: u64, drivers: &[&TestDriver]) {
        self.write(register::STATUS, 0);
        let mut status = VIRTIO_CONFIG_S_DRIVER;
        self.write(register::STATUS, status);
        for (select, half) in [(0, features), (1, features >> 32)] {
            self.write(register::DEVICE_FEATURES_SELECT, select);
            let offered = self.read(register::DEVICE_FEATURES);
            self.write(register::DRIVER_FEATURES_SELECT, select);
            self.write(register::DRIVER_FEATURES, half as u32 & offered);
        }
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        self.write(register::STATUS, status);
        for (index, driver) in drivers.iter().enumerate() {
            self.write(register::QUEUE_SELECT, index as u32);
            self.write(register::QUEUE_SIZE, driver.size().into());
            let [descriptors, available, used] = driver.rings();
            for (low, address) in [
                (register::QUEUE_DESCRIPTORS_LOW, descriptors),
                (register::QUEUE_DRIVER_LOW, available),
                (register::QUEUE_DEVICE_LOW, used),
            ] {
                self.write(low, address as u32);
                self.write(low + 4, (address >> 32) as u32);
            }
            self.write(register::QUEUE_READY, 1);
        }
        status |= VIRTIO_CONFIG_S_DRIVER_OK;
        self.write(register::STATUS, status);
        assert_eq!(self.read(register::STATUS), status);
    }

    pub fn ring_doorbell(&mut self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// Whether the device asks for a reset.
    pub fn needs_reset(&mut self) -> bool {
        self.read(register::STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    pub fn pause(&mut self) -> io::Result<()> {
        self.transport().pause()
    }

    pub fn resume(&mut self) {
        self.transport().resume().unwrap();
    }

    pub fn save(&mut self) -> Section {
        self.transport().save().unwrap()
    }

    /// Restores a saved state into a new device.
    ///
    /// # Errors
    /// Those of the device.
    pub fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.transport().restore(section)
    }

    /// Saves the device, which is paused, and restores it in a new machine that has a copy of the memory,
    /// where it is still paused. All of the first machine has ended when `make` is called.
    pub fn moved<H>(
        mut self,
        make: impl FnOnce(Arc<DriverLink>) -> (Box<dyn VirtioDevice>, H),
    ) -> (SuspendMachine, H) {
        let section = self.save();
        let mut bytes = Vec::new();
        section.write_to(&mut bytes).unwrap();
        let memory = copy_of(&self.memory);
        self.transport = None;
        drop(self);
        let (mut moved, handle) = SuspendMachine::new(&memory, make);
        let section = Section::read_from(&mut &bytes[..]).unwrap();
        moved.restore(&section).unwrap();
        (moved, handle)
    }
}

fn copy_of(memory: &GuestMemory) -> Arc<GuestMemory> {
    let ranges: Vec<(GuestAddress, usize)> = memory
        .regions()
        .map(|region| (region.start, region.len as usize))
        .collect();
    let copy = GuestMemory::from_ranges(&ranges).unwrap();
    for (start, size) in ranges {
        let mut bytes = vec![0; size];
        memory.read_slice(&mut bytes, start).unwrap();
        copy.write_slice(&bytes, start).unwrap();
    }
    Arc::new(copy)
}

/// Size of the memory of a [`VirtioGuest`].
const MEMORY_SIZE: usize = 16 << 20;
/// Address of its rings, those of one queue after those of another.
const RINGS: u64 = 0x1000;
/// A queue size that every device allows.
const QUEUE_SIZE: u16 = 64;
/// Address of memory that backends may use as they like.
pub const FREE_MEMORY: u64 = 0x10_0000;
/// How long the device may take for a request.
const LIMIT: Duration = Duration::from_secs(20);

/// A kind of virtio device, with its counterpart on the host and what a guest does with it.
pub trait Backend {
    /// How many queues the driver uses, counted from the first.
    const QUEUES: u64;
    /// Features that the driver accepts if they are offered.
    const FEATURES: u64;

    fn new() -> Self;

    /// Makes a new device, which finds on the host what the previous one has left.
    fn device(&mut self, memory: &Arc<GuestMemory>, link: Arc<DriverLink>)
    -> Box<dyn VirtioDevice>;

    /// Does what the driver does before anything else.
    fn set_up(&mut self, _driver: &mut Driver) {}

    /// See [`SuspendCase::work`].
    fn work(&mut self, driver: &mut Driver);

    /// See [`SuspendCase::begin`].
    fn begin(&mut self, driver: &mut Driver);

    /// See [`SuspendCase::end`].
    fn end(&mut self, driver: &mut Driver);
}

/// The driver of a device, and its queues.
pub struct Driver {
    machine: SuspendMachine,
    queues: Vec<TestDriver>,
}

impl Driver {
    fn of(machine: SuspendMachine, count: u64) -> Driver {
        let queue =
            |index| TestDriver::new(&machine.memory, RINGS + index * RINGS_SIZE, QUEUE_SIZE);
        let queues = (0..count).map(queue).collect();
        Driver { machine, queues }
    }

    pub fn store(&self, address: u64, bytes: &[u8]) {
        let address = GuestAddress(address);
        self.machine.memory.write_slice(bytes, address).unwrap();
    }

    pub fn load(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let address = GuestAddress(address);
        self.machine.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }

    /// Makes a chain available and rings the doorbell.
    pub fn offer(&mut self, queue: usize, buffers: &[Buffer]) {
        self.queues[queue].offer(buffers);
        self.machine.ring_doorbell(queue as u32);
    }

    /// Waits until the device has returned `count` more chains of a queue, and returns how many bytes it has
    /// put into each.
    pub fn wait(&mut self, queue: usize, count: usize) -> Vec<u32> {
        let deadline = Instant::now() + LIMIT;
        let mut used = Vec::new();
        while used.len() < count {
            assert!(
                Instant::now() < deadline,
                "queue {queue}: {used:?} of {count}"
            );
            assert!(!self.machine.needs_reset());
            thread::sleep(Duration::from_micros(100));
            used.extend(self.queues[queue].take_used());
        }
        assert_eq!(used.len(), count);
        used.into_iter().map(|(_, len)| len).collect()
    }
}

/// A buffer for the device to read.
pub fn readable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: false,
    }
}

/// A buffer for the device to write.
pub fn writable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: true,
    }
}

/// A guest with a virtio device.
pub struct VirtioGuest<B> {
    backend: B,
    /// `None` only while one device takes the place of another.
    driver: Option<Driver>,
}

impl<B: Backend> VirtioGuest<B> {
    fn driver(&mut self) -> &mut Driver {
        self.driver.as_mut().unwrap()
    }

    fn machine(backend: &mut B, memory: &Arc<GuestMemory>) -> SuspendMachine {
        let make = |link| (backend.device(memory, link), ());
        SuspendMachine::new(memory, make).0
    }
}

impl<B: Backend> SuspendCase for VirtioGuest<B> {
    fn new() -> Self {
        let regions = [(GuestAddress(0), MEMORY_SIZE)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let mut backend = B::new();
        let machine = Self::machine(&mut backend, &memory);
        let driver = Some(Driver::of(machine, B::QUEUES));
        VirtioGuest { backend, driver }
    }

    fn set_up(&mut self) {
        let Some(Driver { machine, .. }) = self.driver.take() else {
            panic!("there is a driver");
        };
        let mut driver = Driver::of(machine, B::QUEUES);
        // After a reset the device does not touch the rings until the driver is ready.
        driver.machine.write(register::STATUS, 0);
        driver.store(RINGS, &vec![0; (B::QUEUES * RINGS_SIZE) as usize]);
        let queues: Vec<&TestDriver> = driver.queues.iter().collect();
        driver.machine.initialize(B::FEATURES, &queues);
        self.backend.set_up(&mut driver);
        self.driver = Some(driver);
    }

    fn work(&mut self) {
        let driver = self.driver.as_mut().unwrap();
        self.backend.work(driver);
    }

    fn begin(&mut self) {
        let driver = self.driver.as_mut().unwrap();
        self.backend.begin(driver);
    }

    fn end(&mut self) {
        let driver = self.driver.as_mut().unwrap();
        self.backend.end(driver);
    }

    fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
        act(self.driver().machine.transport())
    }

    fn replace(&mut self) {
        let Some(Driver { machine, queues }) = self.driver.take() else {
            panic!("there is a driver");
        };
        let memory = machine.memory.clone();
        drop(machine);
        let machine = Self::machine(&mut self.backend, &memory);
        self.driver = Some(Driver { machine, queues });
    }

    fn visible_state(&mut self) -> Vec<u8> {
        let machine = &mut self.driver().machine;
        let mut state = Vec::new();
        for offset in [
            register::DEVICE_ID,
            register::DEVICE_FEATURES,
            register::QUEUE_SIZE_MAX,
            register::QUEUE_READY,
            register::INTERRUPT_STATUS,
            register::STATUS,
        ] {
            state.extend(machine.read(offset).to_le_bytes());
        }
        state.extend(machine.config(64));
        state
    }
}
