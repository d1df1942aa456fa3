//! Fuzz targets: virtio devices behind their transport, and the devices of a PC, with a guest that does what
//! it likes.
//!
//! An input is what a well-behaved driver does, with other operations inserted. Whatever these are, nothing
//! panics, the event loop comes to rest, little memory is allocated, and after a reset the device serves a
//! driver that follows the rules. Between two operations the device may be paused, saved, restored and reset,
//! and the state that is restored may be damaged.
//!
//! `cargo test` gives each target a second of random inputs; `docs/testing.md` says how to run them
//! for longer.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

mod allocations;
mod balloon;
mod block;
mod console;
mod damage;
mod driver;
mod machine;
mod metadata;
mod net;
mod operation;
mod pc;
mod rng;
mod vsock;

use std::panic::RefUnwindSafe;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bantam_devices::virtio::VirtioDevice;
use bolero::generator::produce;
use bolero::{TypeGenerator, check};
use driver::Driver;
use machine::Machine;
use operation::{Meanwhile, Operation};

/// How long `cargo test` spends on each target.
const TEST_TIME: Duration = Duration::from_secs(1);

/// Most memory in bytes that the monitor may allocate for one device at any time. Its lists are bounded by
/// queues of 256 chains of 256 descriptors each, and there are buffers for packets of 64 KiB.
const MAX_ALLOCATED: isize = 8 << 20;

/// A kind of device, and its counterpart on the host.
trait Target {
    /// Options that distinguish devices of the kind.
    type Options: TypeGenerator + Default + std::fmt::Debug;

    /// The number of queues that a driver that follows the rules sets up.
    const QUEUES: u16 = 2;

    /// Makes a new device.
    fn device(&mut self, options: &Self::Options) -> Box<dyn VirtioDevice>;

    /// Returns what a driver does once it has initialized the device.
    fn requests(driver: &mut Driver) -> Vec<Operation>;

    /// Sends a packet of `len` bytes to the guest if the device is connected to something on the host, or
    /// asks for something else of that size.
    fn host_sends(&mut self, _len: u16) {}

    /// Has an initialized device serve requests, and checks the results.
    fn check_service(&mut self, options: &Self::Options, machine: &mut Machine);
}

/// The driver's choices, and its deviations from the rules.
#[derive(Debug, TypeGenerator)]
struct Input<O: TypeGenerator> {
    options: O,
    driver: Driver,
    #[generator(produce::<Vec<Deviation>>().with().len(0..40usize))]
    deviations: Vec<Deviation>,
}

/// An operation before, or in place of, one of the well-behaved driver.
#[derive(Debug, TypeGenerator)]
struct Deviation {
    position: u8,
    replaces: bool,
    operation: Operation,
}

/// Makes the test of an input, after checking that the well-behaved driver is served.
fn test_of<T: Target>(mut target: T) -> impl Fn(&Input<T::Options>) + RefUnwindSafe {
    for features in [0, u64::MAX] {
        let undisturbed = Input {
            options: T::Options::default(),
            driver: Driver::with_features(T::QUEUES, features),
            deviations: Vec::new(),
        };
        let mut machine = disturb(&mut target, &undisturbed);
        assert!(!machine.needs_reset(), "a driver that follows the rules");
        assert_ne!(machine.used_count(0), 0, "requests are returned");
        check_recovery(&mut target, &undisturbed, machine);
    }
    let target = Mutex::new(target);
    move |input| {
        // A failed input cannot leave a target inconsistent.
        let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
        allocations::start();
        let machine = disturb(&mut *target, input);
        check_recovery(&mut *target, input, machine);
        let peak = allocations::peak();
        assert!(peak <= MAX_ALLOCATED, "{peak} bytes were allocated");
    }
}

/// Applies an input to a new device, and lets it come to rest.
fn disturb<T: Target>(target: &mut T, input: &Input<T::Options>) -> Machine {
    let mut machine = Machine::new(target.device(&input.options));
    let mut driver = input.driver.clone();
    let mut operations = driver.initialize(machine.offer());
    operations.extend(T::requests(&mut driver));
    for (position, operation) in operations.iter().enumerate() {
        let mut replaced = false;
        for deviation in &input.deviations {
            if usize::from(deviation.position) % operations.len() == position {
                act(target, &input.options, &mut machine, &deviation.operation);
                replaced |= deviation.replaces;
            }
        }
        if !replaced {
            act(target, &input.options, &mut machine, operation);
        }
    }
    machine.rest();
    machine
}

/// Checks that a device serves a driver that follows the rules, whatever was done to it before.
fn check_recovery<T: Target>(target: &mut T, input: &Input<T::Options>, mut machine: Machine) {
    machine.initialize(&mut input.driver.clone());
    target.check_service(&input.options, &mut machine);
    assert!(!machine.needs_reset(), "a driver that follows the rules");
}

fn act<T: Target>(
    target: &mut T,
    options: &T::Options,
    machine: &mut Machine,
    operation: &Operation,
) {
    match operation {
        Operation::HostSends { len } => target.host_sends(*len),
        Operation::Suspend { meanwhile } => {
            machine.pause();
            match meanwhile {
                Meanwhile::Nothing => {}
                Meanwhile::PowerCycle => machine.power_cycle(),
                Meanwhile::Replace => machine.replace(|| target.device(options)),
                Meanwhile::ReplaceDamaged { damage } => {
                    machine.replace_damaged(|| target.device(options), damage);
                }
                Meanwhile::HostSends { len } => target.host_sends(*len),
            }
            machine.resume();
        }
        operation => machine.act(operation),
    }
}

#[test]
fn balloon_device() {
    let test = test_of(balloon::BalloonTarget::default());
    check!()
        .with_type()
        .with_test_time(TEST_TIME)
        .for_each(test);
}

#[test]
fn block_device() {
    let test = test_of(block::BlockTarget::new());
    check!()
        .with_type()
        .with_test_time(TEST_TIME)
        .for_each(test);
}

#[test]
fn console_device() {
    let test = test_of(console::ConsoleTarget::new());
    check!()
        .with_type()
        .with_test_time(TEST_TIME)
        .for_each(test);
}

#[test]
fn network_device() {
    let Some(target) = net::NetTarget::new() else {
        eprintln!("skipped: this user cannot create taps in a namespace of their own here");
        return;
    };
    let test = test_of(target);
    check!()
        .with_type()
        .with_test_time(TEST_TIME)
        .for_each(test);
}

#[test]
fn pc_devices() {
    check!()
        .with_type()
        .with_test_time(TEST_TIME)
        .for_each(pc::test);
}

#[test]
fn transport() {
    let test = test_of(rng::RngTarget);
    check!()
        .with_type()
        .with_test_time(TEST_TIME)
        .for_each(test);
}

#[test]
fn vsock_device() {
    let test = test_of(vsock::VsockTarget::new());
    check!()
        .with_type()
        .with_test_time(TEST_TIME)
        .for_each(test);
}
