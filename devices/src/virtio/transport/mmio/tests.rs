mod lifecycle;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::InterruptLine;
use crate::rate_limiter::Limits;
use crate::virtio::rng::Rng;
use crate::virtio::test_event_loop::TestEventLoop;
use crate::virtio::transport::core::half;
use crate::virtio::{Activation, COMMON_FEATURES, ConfigSpace, F_VERSION_1, device_id};
use crate::worker::VirtioWorker;

const MEMORY_SIZE: usize = 1 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x4000;
const QUEUE_SIZE: u32 = 8;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;

struct Counter(Arc<AtomicUsize>);

impl InterruptLine for Counter {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A device behind its transport, with a thread that runs its event loop.
struct Machine {
    transport: MmioTransport,
    memory: Arc<GuestMemory>,
    interrupts: Arc<AtomicUsize>,
    _event_loop: TestEventLoop,
}

impl Machine {
    /// Makes a machine with an entropy device.
    fn new() -> Machine {
        Machine::with(Box::new(Rng::new(&Limits::default()).unwrap()))
    }

    fn with(device: Box<dyn VirtioDevice>) -> Machine {
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap());
        Machine::with_memory(device, memory)
    }

    fn with_memory(device: Box<dyn VirtioDevice>, memory: Arc<GuestMemory>) -> Machine {
        let event_loop = TestEventLoop::start();
        let interrupts = Arc::new(AtomicUsize::new(0));
        let line = Box::new(Counter(interrupts.clone()));
        let transport = MmioTransport::new(
            device,
            memory.clone(),
            event_loop.handle.clone(),
            MmioLink::new("test device".to_string(), line),
        );
        Machine {
            transport: transport.unwrap(),
            memory,
            interrupts,
            _event_loop: event_loop,
        }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut bytes = [0xaa; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&mut self, features: u64) -> u32 {
        self.write(register::STATUS, 0);
        self.write(register::STATUS, ACKNOWLEDGE);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        for select in [0, 1] {
            self.write(register::DRIVER_FEATURES_SELECT, select);
            self.write(register::DRIVER_FEATURES, half(features, select));
        }
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(register::STATUS)
    }

    fn set_up_queue(&mut self, size: u32, descriptors: u64, available: u64, used: u64) {
        self.write(register::QUEUE_SELECT, 0);
        self.write(register::QUEUE_SIZE, size);
        for (low, high, address) in [
            (
                register::QUEUE_DESCRIPTORS_LOW,
                register::QUEUE_DESCRIPTORS_HIGH,
                descriptors,
            ),
            (
                register::QUEUE_DRIVER_LOW,
                register::QUEUE_DRIVER_HIGH,
                available,
            ),
            (
                register::QUEUE_DEVICE_LOW,
                register::QUEUE_DEVICE_HIGH,
                used,
            ),
        ] {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
    }

    fn finish_initialization(&mut self) -> u32 {
        self.write(
            register::STATUS,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        );
        self.read(register::STATUS)
    }

    fn initialize(&mut self) {
        self.memory
            .write_slice(&[0; 0x2000], GuestAddress(AVAILABLE))
            .unwrap();
        self.negotiate(F_VERSION_1);
        self.set_up_queue(QUEUE_SIZE, DESCRIPTORS, AVAILABLE, USED);
        let status = self.finish_initialization();
        assert_eq!(status, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn set_descriptor(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(DESCRIPTORS + index * 16);
        let memory = &self.memory;
        memory.write_obj(address, at).unwrap();
        memory.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes the chain at `head` available as number `count`, and rings the doorbell.
    fn offer(&mut self, head: u16, count: u16) {
        let slot = AVAILABLE + 4 + u64::from((count - 1) % QUEUE_SIZE as u16) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory
            .write_obj(count, GuestAddress(AVAILABLE + 2))
            .unwrap();
        self.write(QUEUE_NOTIFY, 0);
    }

    fn used_count(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn wait_until(&mut self, what: &str, condition: impl Fn(&mut Machine) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition(self) {
            assert!(Instant::now() < deadline, "never came: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn assert_serves(&mut self) {
        self.initialize();
        self.set_descriptor(0, BUFFER, 64, DESCRIPTOR_WRITE, 0);
        self.offer(0, 1);
        self.wait_until("a used buffer", |machine| machine.used_count() == 1);
    }
}

#[test]
fn the_registers_say_what_the_device_is() {
    let mut machine = Machine::new();
    assert_eq!(machine.read(register::MAGIC), 0x7472_6976);
    assert_eq!(machine.read(register::VERSION), 2);
    assert_eq!(machine.read(register::DEVICE_ID), device_id::ENTROPY);
    machine.write(register::DEVICE_FEATURES_SELECT, 1);
    assert_eq!(machine.read(register::DEVICE_FEATURES), 1, "VERSION_1");
    machine.write(register::DEVICE_FEATURES_SELECT, 2);
    assert_eq!(machine.read(register::DEVICE_FEATURES), 0);
    assert!(machine.read(register::QUEUE_SIZE_MAX) > 0);
    machine.write(register::QUEUE_SELECT, 1);
    assert_eq!(machine.read(register::QUEUE_SIZE_MAX), 0);
    assert_eq!(machine.read(register::SHARED_MEMORY_LENGTH_LOW), u32::MAX);
}

/// A device with four configuration bytes that the driver can only read, and four that it can write.
struct WithDriverField(ConfigSpace);

impl VirtioDevice for WithDriverField {
    fn device_id(&self) -> u32 {
        device_id::ENTROPY
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[]
    }

    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn activate(&mut self, _activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        Err("it never works".to_string())
    }
}

#[test]
fn the_driver_writes_its_part_of_the_configuration_until_a_reset() {
    let config = ConfigSpace::with_driver_field(vec![1; 8], 4..8);
    let mut machine = Machine::with(Box::new(WithDriverField(config)));
    let (fixed, own) = (register::CONFIG, register::CONFIG + 4);
    for offset in [fixed, own, register::CONFIG + 8] {
        machine.write(offset, 0x0403_0201);
    }
    machine.transport.write(fixed + 3, &[9, 9]);
    machine.transport.write(own + 3, &[5]);
    assert_eq!(machine.read(fixed), 0x0101_0101);
    assert_eq!(machine.read(own), 0x0503_0201);
    assert_eq!(machine.read(register::CONFIG + 8), 0);
    machine.write(register::STATUS, 0);
    assert_eq!(machine.read(fixed), 0x0101_0101);
    assert_eq!(machine.read(own), 0);
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let mut machine = Machine::new();
    assert_eq!(machine.negotiate(F_VERSION_1) & FEATURES_OK, FEATURES_OK);
    assert_eq!(machine.negotiate(F_VERSION_1 | 1 << 50) & FEATURES_OK, 0);
    assert_eq!(machine.negotiate(0) & FEATURES_OK, 0, "VERSION_1 is a must");
    assert_eq!(machine.finish_initialization() & DRIVER_OK, 0);
}

#[test]
fn a_queue_is_served_and_interrupts() {
    let mut machine = Machine::new();
    machine.assert_serves();
    machine.wait_until("an interrupt", |machine| {
        machine.interrupts.load(Ordering::SeqCst) == 1
    });
    assert_eq!(machine.read(register::INTERRUPT_STATUS), 1);
    machine.write(register::INTERRUPT_ACKNOWLEDGE, 1);
    assert_eq!(machine.read(register::INTERRUPT_STATUS), 0);
    let mut bytes = [0; 64];
    machine
        .memory
        .read_slice(&mut bytes, GuestAddress(BUFFER))
        .unwrap();
    assert_ne!(bytes, [0; 64]);
    let written: u32 = machine.memory.read_obj(GuestAddress(USED + 8)).unwrap();
    assert_eq!(written, 64);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut machine = Machine::new();
    machine.initialize();
    machine
        .memory
        .write_obj(1u16, GuestAddress(AVAILABLE))
        .unwrap();
    machine.set_descriptor(0, BUFFER, 64, DESCRIPTOR_WRITE, 0);
    machine.offer(0, 1);
    machine.wait_until("a used buffer", |machine| machine.used_count() == 1);
    // The worker decides after it has returned the buffer: a reset waits for it.
    machine.write(register::STATUS, 0);
    assert_eq!(machine.interrupts.load(Ordering::SeqCst), 0);
}

#[test]
fn a_reset_stops_the_device_and_it_starts_anew() {
    let mut machine = Machine::new();
    for _ in 0..3 {
        machine.assert_serves();
        machine.write(register::STATUS, 0);
        assert_eq!(machine.read(register::STATUS), 0);
        assert_eq!(machine.read(register::INTERRUPT_STATUS), 0);
        machine.offer(0, 2);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.used_count(), 1, "nothing is served after a reset");
    }
}

#[test]
fn queues_that_cannot_be_served_need_a_reset() {
    let end = MEMORY_SIZE as u64;
    for (size, descriptors, available, used) in [
        (0, DESCRIPTORS, AVAILABLE, USED),
        (3, DESCRIPTORS, AVAILABLE, USED),
        (1 << 14, DESCRIPTORS, AVAILABLE, USED),
        (u32::MAX, DESCRIPTORS, AVAILABLE, USED),
        (8, DESCRIPTORS + 1, AVAILABLE, USED),
        (8, DESCRIPTORS, AVAILABLE + 1, USED),
        (8, DESCRIPTORS, AVAILABLE, USED + 2),
        (8, end - 16, AVAILABLE, USED),
        (8, DESCRIPTORS, end - 2, USED),
        (8, DESCRIPTORS, AVAILABLE, end - 4),
        (8, 0xd000_0000, AVAILABLE, USED),
        (8, DESCRIPTORS, u64::MAX - 1, USED),
        (8, u64::MAX - 15, AVAILABLE, USED),
    ] {
        let mut machine = Machine::new();
        machine.negotiate(F_VERSION_1);
        machine.set_up_queue(size, descriptors, available, used);
        let status = machine.finish_initialization();
        assert_eq!(
            status & NEEDS_RESET,
            NEEDS_RESET,
            "size {size}, {descriptors:#x} {available:#x} {used:#x}"
        );
        machine.assert_serves();
    }
}

/// Makes a broken chain available.
type Break = fn(&mut Machine);

#[test]
fn broken_chains_need_a_reset() {
    let breaks: [(&str, Break); 8] = [
        ("a loop", |machine| {
            machine.set_descriptor(0, BUFFER, 8, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1);
            machine.set_descriptor(1, BUFFER, 8, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 0);
            machine.offer(0, 1);
        }),
        ("a link out of range", |machine| {
            machine.set_descriptor(0, BUFFER, 8, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 99);
            machine.offer(0, 1);
        }),
        ("a head out of range", |machine| {
            machine.offer(QUEUE_SIZE as u16, 1);
        }),
        ("a buffer outside memory", |machine| {
            machine.set_descriptor(0, 0xd000_0000, 8, DESCRIPTOR_WRITE, 0);
            machine.offer(0, 1);
        }),
        ("a buffer that wraps", |machine| {
            machine.set_descriptor(0, u64::MAX - 3, 8, DESCRIPTOR_WRITE, 0);
            machine.offer(0, 1);
        }),
        ("readable after writable", |machine| {
            machine.set_descriptor(0, BUFFER, 8, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1);
            machine.set_descriptor(1, BUFFER, 8, 0, 0);
            machine.offer(0, 1);
        }),
        ("an indirect table of a broken size", |machine| {
            machine.set_descriptor(0, BUFFER, 15, 4, 0);
            machine.offer(0, 1);
        }),
        ("more chains than the queue holds", |machine| {
            machine.set_descriptor(0, BUFFER, 8, DESCRIPTOR_WRITE, 0);
            machine.offer(0, QUEUE_SIZE as u16 + 1);
        }),
    ];
    let mut machine = Machine::new();
    for (what, act) in breaks {
        machine.initialize();
        act(&mut machine);
        machine.wait_until(what, |machine| {
            machine.read(register::STATUS) & NEEDS_RESET != 0
        });
        assert_eq!(machine.read(register::INTERRUPT_STATUS) & 2, 2, "{what}");
        machine.assert_serves();
    }
}

#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![4 => (0..0x42u64).prop_map(|index| index * 4), 1 => 0..0x1000u64];
    let bytes = prop_oneof![
        4 => any::<u32>().prop_map(|value| value.to_le_bytes().to_vec()),
        4 => (0..16u32).prop_map(|value| value.to_le_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..9),
    ];
    prop_oneof![
        1 => (offset.clone(), 0..9usize).prop_map(|(offset, size)| Access::Read(offset, size)),
        3 => (offset, bytes).prop_map(|(offset, bytes)| Access::Write(offset, bytes)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_access_breaks_the_device(accesses in proptest::collection::vec(access(), 0..200)) {
        let mut machine = Machine::new();
        for access in accesses {
            match access {
                Access::Read(offset, size) => machine.transport.read(offset, &mut vec![0; size]),
                Access::Write(offset, bytes) => machine.transport.write(offset, &bytes),
            }
        }
        machine.assert_serves();
    }
}
