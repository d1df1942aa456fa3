//! A device behind its transport that is paused, saved and moved to another machine, for the tests of
//! devices.

use std::io;
use std::sync::Arc;

use bantam_memory::GuestMemory;
use bantam_state::{RestoreError, Section};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
};
use vm_memory::{Bytes, GuestAddress};

use super::test_driver::{InterruptCounter, TestDriver};
use super::test_event_loop::TestEventLoop;
use super::transport::mmio::{MmioTransport, QUEUE_NOTIFY, register};
use super::{DriverLink, VirtioDevice};
use crate::bus::BusDevice;
use crate::lifecycle::Device;

/// A device with its transport, and a thread that runs its event loop.
pub struct SuspendMachine {
    pub memory: Arc<GuestMemory>,
    pub interrupts: InterruptCounter,
    transport: Option<MmioTransport>,
    _event_loop: TestEventLoop,
}

impl SuspendMachine {
    /// A machine with the device that `make` makes. Its driver has yet to come.
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

    /// The device's configuration space as the driver reads it.
    pub fn config(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.transport().read(register::CONFIG, &mut bytes);
        bytes
    }

    /// Initializes the device for a driver that accepts those of `features` that are offered. The first
    /// queues are those of `drivers`, and the others stay unused.
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

    /// Gives a new device the state that was saved.
    ///
    /// # Errors
    /// As the device.
    pub fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.transport().restore(section)
    }

    /// Saves the device, which is paused, and restores it in a machine of its own that has a copy of
    /// the memory, where it is still paused. All of the first machine has ended when `make` is called.
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
