//! Fuzz targets: virtio devices behind their transport, and the devices of a PC, with a guest that does what it
//! likes.
//!
//! An input is what a well-behaved driver does, with other operations put in between. Whatever they
//! are, nothing panics, the event loop comes to rest, little memory is taken, and after a reset the
//! device serves a driver that follows the rules. Between two operations the device may be paused, saved,
//! restored and reset, and what is restored may have been damaged.
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

/// Most memory that the monitor may take for one device at any time, in bytes. Its lists are bounded
/// by queues of 256 chains of 256 descriptors each, beside buffers for packets of 64 KiB.
const MAX_ALLOCATED: isize = 8 << 20;

/// A kind of device, and what is beyond it on the host.
trait Target {
    /// What else distinguishes devices of the kind.
    type Options: TypeGenerator + Default + std::fmt::Debug;

    /// How many queues a driver that follows the rules sets up.
    const QUEUES: u16 = 2;

    /// A new device.
    fn device(&mut self, options: &Self::Options) -> Box<dyn VirtioDevice>;

    /// What a driver does once it has initialized the device.
    fn requests(driver: &mut Driver) -> Vec<Operation>;

    /// Sends a packet of `len` bytes to the guest, from a device that has a host to talk to, or wishes
    /// something else of that size.
    fn host_sends(&mut self, _len: u16) {}

    /// Has requests done by an initialized device, and checks the results.
    fn check_service(&mut self, options: &Self::Options, machine: &mut Machine);
}

/// What the driver has chosen, and how it deviates from the rules.
#[derive(Debug, TypeGenerator)]
struct Input<O: TypeGenerator> {
    options: O,
    driver: Driver,
    #[generator(produce::<Vec<Deviation>>().with().len(0..40usize))]
    deviations: Vec<Deviation>,
}

/// An operation that is done before, or in place of, one of the well-behaved driver's.
#[derive(Debug, TypeGenerator)]
struct Deviation {
    position: u8,
    replaces: bool,
    operation: Operation,
}

/// The test of an input, once the well-behaved driver has been found to be one.
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
        // A target has nothing that a failed input could leave half done.
        let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
        allocations::start();
        let machine = disturb(&mut *target, input);
        check_recovery(&mut *target, input, machine);
        let peak = allocations::peak();
        assert!(peak <= MAX_ALLOCATED, "{peak} bytes were allocated");
    }
}

/// Does all of an input to a new device, which is at rest then.
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

/// Checks that a device, whatever was done to it, serves a driver that follows the rules.
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
