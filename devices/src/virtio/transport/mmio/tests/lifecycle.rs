//! The life cycle of a device with its transport: pause, save, restore, reset.

use super::*;

/// All registers that a driver can read without changing anything.
const READABLE: [u64; 8] = [
    register::DEVICE_ID,
    register::DEVICE_FEATURES,
    register::QUEUE_SIZE_MAX,
    register::QUEUE_READY,
    register::INTERRUPT_STATUS,
    register::STATUS,
    register::CONFIG_GENERATION,
    register::CONFIG,
];

impl Machine {
    /// Makes another machine with an entropy device and the same memory.
    fn another_with_the_memory(&self) -> Machine {
        let rng = Box::new(Rng::new(&Limits::default()).unwrap());
        Machine::with_memory(rng, self.memory.clone())
    }

    fn registers(&mut self) -> [u32; READABLE.len()] {
        READABLE.map(|offset| self.read(offset))
    }

    /// Makes chains available up to number `count`, one after another.
    fn offer_up_to(&mut self, from: u16, count: u16) {
        for number in from..=count {
            let head = (number - 1) % QUEUE_SIZE as u16;
            self.set_descriptor(head.into(), BUFFER, 64, DESCRIPTOR_WRITE, 0);
            self.offer(head, number);
        }
    }

    fn wait_for_used(&mut self, count: u16) {
        self.wait_until("used buffers", |machine| machine.used_count() == count);
    }
}

#[test]
fn a_paused_device_does_nothing_and_then_all_that_came_meanwhile() {
    let mut machine = Machine::new();
    machine.initialize();
    machine.offer_up_to(1, 2);
    machine.wait_for_used(2);

    machine.transport.pause().unwrap();
    machine.transport.pause().unwrap();
    machine.offer_up_to(3, 5);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(machine.used_count(), 2);

    machine.transport.resume().unwrap();
    machine.transport.resume().unwrap();
    machine.wait_for_used(5);
    assert_eq!(machine.read(register::STATUS) & NEEDS_RESET, 0);
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_was() {
    let mut machine = Machine::new();
    machine.initialize();
    machine.offer_up_to(1, 3);
    machine.wait_for_used(3);
    machine.transport.pause().unwrap();
    machine.offer_up_to(4, 6);
    let section = machine.transport.save().unwrap();

    let mut other = machine.another_with_the_memory();
    other.transport.restore(&section).unwrap();
    assert_eq!(other.registers(), machine.registers());
    assert_eq!(other.used_count(), 3);
    // A restored device that has not worked since is saved unchanged.
    assert_eq!(other.transport.save().unwrap(), section);

    other.transport.resume().unwrap();
    other.wait_for_used(6);
    // One interrupt that the driver may have missed, and at least one for new work.
    let interrupts = other.interrupts.load(Ordering::SeqCst);
    assert!(interrupts >= 2, "{interrupts}");
    // More than once around the rings.
    for count in 7..=20 {
        other.offer_up_to(count, count);
        other.wait_for_used(count);
    }
}

#[test]
fn a_driver_that_is_still_at_its_setup_goes_on_with_it() {
    let mut machine = Machine::new();
    machine.negotiate(F_VERSION_1);
    machine.set_up_queue(QUEUE_SIZE, DESCRIPTORS, AVAILABLE, USED);
    machine.transport.pause().unwrap();
    let section = machine.transport.save().unwrap();

    let mut other = machine.another_with_the_memory();
    other.transport.restore(&section).unwrap();
    other.transport.resume().unwrap();
    let status = other.finish_initialization();
    assert_eq!(status, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    other.offer_up_to(1, 1);
    other.wait_for_used(1);
}

#[test]
fn a_device_that_is_reset_while_paused_is_as_after_power_on() {
    let mut machine = Machine::new();
    machine.initialize();
    machine.transport.pause().unwrap();
    machine.transport.reset();
    assert_eq!(machine.read(register::STATUS), 0);
    machine.transport.resume().unwrap();
    machine.assert_serves();
}

#[test]
fn a_device_at_work_is_not_saved() {
    let mut machine = Machine::new();
    assert!(machine.transport.save().is_err());
    machine.initialize();
    assert!(machine.transport.save().is_err());
    machine.transport.pause().unwrap();
    machine.transport.save().unwrap();
}

#[test]
fn a_device_that_waits_for_a_reset_still_does_so_after_a_restore() {
    let mut machine = Machine::new();
    machine.initialize();
    // A descriptor that is not there.
    machine.offer(QUEUE_SIZE as u16, 1);
    machine.wait_until("the wish for a reset", |machine| {
        machine.read(register::STATUS) & NEEDS_RESET != 0
    });
    machine.transport.pause().unwrap();
    let section = machine.transport.save().unwrap();

    let mut other = machine.another_with_the_memory();
    other.transport.restore(&section).unwrap();
    other.transport.resume().unwrap();
    assert_ne!(other.read(register::STATUS) & NEEDS_RESET, 0);
    other.assert_serves();
}

#[test]
fn the_state_of_another_device_is_refused() {
    let config = ConfigSpace::with_driver_field(vec![1; 8], 4..8);
    let mut machine = Machine::with(Box::new(WithDriverField(config)));
    machine.write(register::CONFIG + 4, 0x0403_0201);
    machine.transport.pause().unwrap();
    let section = machine.transport.save().unwrap();

    let mut rng = Machine::new();
    rng.transport.restore(&section).unwrap_err();
    rng.transport.resume().unwrap();
    rng.assert_serves();

    let config = ConfigSpace::with_driver_field(vec![0; 8], 4..8);
    let mut other = Machine::with(Box::new(WithDriverField(config)));
    other.transport.restore(&section).unwrap();
    assert_eq!(other.read(register::CONFIG), 0x0101_0101);
    assert_eq!(other.read(register::CONFIG + 4), 0x0403_0201);

    let config = ConfigSpace::new(vec![0; 12]);
    let mut larger = Machine::with(Box::new(WithDriverField(config)));
    larger.transport.restore(&section).unwrap_err();
}

#[test]
fn causes_of_interrupts_last_until_they_are_acknowledged() {
    let mut machine = Machine::new();
    machine.initialize();
    machine.offer_up_to(1, 1);
    machine.wait_until("an interrupt", |machine| {
        machine.read(register::INTERRUPT_STATUS) == 1
    });
    machine.transport.pause().unwrap();
    let section = machine.transport.save().unwrap();

    let mut other = machine.another_with_the_memory();
    other.transport.restore(&section).unwrap();
    assert_eq!(other.read(register::INTERRUPT_STATUS), 1);
    other.write(register::INTERRUPT_ACKNOWLEDGE, 1);
    assert_eq!(other.read(register::INTERRUPT_STATUS), 0);

    machine.transport.reset();
    assert_eq!(machine.read(register::INTERRUPT_STATUS), 0);

    let mut state: MmioState = section.decode().unwrap();
    state.interrupt_status = 1 << 2;
    let section = Section::of(&state).unwrap();
    other.transport.restore(&section).unwrap_err();
    other.transport.resume().unwrap();
    other.assert_serves();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn damaged_state_is_refused_or_harmless(
        position: prop::sample::Index,
        value: u8,
        truncated in any::<bool>(),
    ) {
        let mut machine = Machine::new();
        machine.initialize();
        machine.offer_up_to(1, 3);
        machine.wait_for_used(3);
        machine.transport.pause().unwrap();
        let section = machine.transport.save().unwrap();
        let mut bytes = postcard::to_stdvec(&section).unwrap();
        let position = position.index(bytes.len());
        bytes[position] = value;
        if truncated {
            bytes.truncate(position);
        }

        let mut other = machine.another_with_the_memory();
        if let Ok(section) = postcard::from_bytes(&bytes) {
            if other.transport.restore(&section).is_err() {
                prop_assert_eq!(other.read(register::STATUS), 0);
            }
            let _ = other.transport.resume();
        }
        other.assert_serves();
    }
}
