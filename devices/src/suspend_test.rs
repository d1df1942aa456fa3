//! Tests for every device of being paused, saved and restored.

use bantam_state::{RestoreError, Section};

use crate::lifecycle::Device;

/// A machine with one device, with the operations that these tests need.
pub trait SuspendCase: Sized {
    /// Makes a machine whose guest has yet to set the device up.
    fn new() -> Self;

    /// Has the guest set the device up, as after power-on, if that takes anything.
    fn set_up(&mut self) {}

    /// Has the device do something, and checks the result.
    fn work(&mut self);

    /// Begins something that the device does not finish before a pause, if there is such a thing.
    fn begin(&mut self) {}

    /// Finishes it, and checks the result.
    fn end(&mut self) {}

    /// Calls `act` with the device.
    fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R;

    /// Replaces the saved device by a new one with the same configuration, which is not set up. Guest memory
    /// stays.
    fn replace(&mut self);

    /// Returns what the guest can see of the device without changing it.
    fn visible_state(&mut self) -> Vec<u8>;

    /// Whether the device works while no register of it is accessed, so that it is saved only in a pause.
    const WORKS_BY_ITSELF: bool = true;
}

/// Makes a machine whose device is set up, has done something, and is paused in the middle of more.
fn paused<C: SuspendCase>() -> C {
    let mut machine = C::new();
    machine.set_up();
    machine.work();
    machine.begin();
    machine.device(|device| device.pause().unwrap());
    machine
}

fn save<C: SuspendCase>(machine: &mut C) -> Section {
    machine.device(|device| device.save().unwrap())
}

/// Writes a section and reads it again.
fn copied(section: &Section) -> Section {
    let mut bytes = Vec::new();
    section.write_to(&mut bytes).unwrap();
    Section::read_from(&mut &bytes[..]).unwrap()
}

pub fn goes_on_after_a_pause<C: SuspendCase>() {
    let mut machine = paused::<C>();
    for _ in 0..2 {
        machine.device(|device| device.resume().unwrap());
        machine.end();
        machine.work();
        machine.begin();
        machine.device(|device| device.pause().unwrap());
    }
    machine.device(|device| device.resume().unwrap());
    machine.end();
}

pub fn goes_on_elsewhere<C: SuspendCase>() {
    let mut machine = paused::<C>();
    for _ in 0..3 {
        let before = machine.visible_state();
        let section = copied(&save(&mut machine));
        machine.replace();
        machine.device(|device| device.restore(&section).unwrap());
        assert_eq!(machine.visible_state(), before);
        assert_eq!(save(&mut machine), section, "it is as it was saved");
        machine.device(|device| device.resume().unwrap());
        machine.end();
        machine.work();
        machine.begin();
        machine.device(|device| device.pause().unwrap());
    }
}

pub fn is_saved_before_it_is_set_up<C: SuspendCase>() {
    let mut machine = C::new();
    machine.device(|device| device.pause().unwrap());
    let section = copied(&save(&mut machine));
    machine.replace();
    machine.device(|device| device.restore(&section).unwrap());
    machine.device(|device| device.resume().unwrap());
    machine.set_up();
    machine.work();
}

pub fn is_saved_the_same_twice<C: SuspendCase>() {
    let mut machine = paused::<C>();
    let section = save(&mut machine);
    assert_eq!(save(&mut machine), section);
    machine.device(|device| device.resume().unwrap());
    machine.end();
}

pub fn is_paused_and_resumed_twice<C: SuspendCase>() {
    let mut machine = C::new();
    machine.device(|device| device.resume().unwrap());
    machine.set_up();
    machine.device(|device| device.resume().unwrap());
    machine.work();
    machine.begin();
    machine.device(|device| device.pause().unwrap());
    machine.device(|device| device.pause().unwrap());
    machine.device(|device| device.resume().unwrap());
    machine.device(|device| device.resume().unwrap());
    machine.end();
    machine.work();
}

pub fn is_not_saved_at_work<C: SuspendCase>() {
    let mut machine = C::new();
    machine.set_up();
    machine.work();
    let saved = machine.device(|device| device.save().is_ok());
    assert_eq!(saved, !C::WORKS_BY_ITSELF);
}

pub fn is_as_after_power_on_when_it_was_reset<C: SuspendCase>() {
    let mut machine = C::new();
    machine.set_up();
    machine.work();
    machine.device(|device| {
        device.pause().unwrap();
        device.reset();
        device.resume().unwrap();
    });
    let after_reset = machine.visible_state();
    assert_eq!(after_reset, C::new().visible_state());
    machine.set_up();
    machine.work();
}

pub fn refuses_what_is_not_its_state<C: SuspendCase>() {
    let section = save(&mut paused::<C>());
    let bytes = postcard::to_stdvec(&section).unwrap();
    let version_at = 1 + section.kind().len();

    // A section of another kind, one of another version, and ones with a byte too few or too many.
    let mut other_kind = bytes.clone();
    other_kind[1] ^= 1;
    let mut other_version = bytes.clone();
    other_version[version_at] += 1;
    let mut refused = vec![other_kind, other_version];
    let (kind, version, payload): (String, u16, Vec<u8>) = postcard::from_bytes(&bytes).unwrap();
    if !payload.is_empty() {
        let short = &payload[..payload.len() - 1];
        refused.push(postcard::to_stdvec(&(&kind, version, short)).unwrap());
    }
    let long = [&payload[..], &[0]].concat();
    refused.push(postcard::to_stdvec(&(&kind, version, long)).unwrap());
    let mut machine = C::new();
    for bytes in refused {
        let section: Section = postcard::from_bytes(&bytes).unwrap();
        let restored = machine.device(|device| device.restore(&section));
        assert!(
            matches!(
                restored,
                Err(RestoreError::Kind { .. }
                    | RestoreError::Version { .. }
                    | RestoreError::Damaged { .. })
            ),
            "{restored:?}"
        );
        machine.device(|device| device.resume().unwrap());
        machine.set_up();
        machine.work();
        machine.device(|device| {
            device.pause().unwrap();
            device.reset();
        });
    }
}

pub fn notices_each_bit_that_has_changed<C: SuspendCase>() {
    let section = save(&mut paused::<C>());
    let mut frame = Vec::new();
    section.write_to(&mut frame).unwrap();
    // Only some of the bits of a long frame.
    let step = (frame.len() * 8 / 4096).max(1);
    for bit in (0..frame.len() * 8).step_by(step) {
        frame[bit / 8] ^= 1 << (bit % 8);
        assert!(Section::read_from(&mut &frame[..]).is_err(), "bit {bit}");
        frame[bit / 8] ^= 1 << (bit % 8);
    }
    for len in (0..frame.len()).step_by(step) {
        assert!(Section::read_from(&mut &frame[..len]).is_err());
    }
}

/// State with a valid checksum and arbitrary content is either refused or does no harm.
pub fn bears_state_of_any_content<C: SuspendCase>() {
    let section = save(&mut paused::<C>());
    let (kind, version, payload): (String, u16, Vec<u8>) =
        postcard::from_bytes(&postcard::to_stdvec(&section).unwrap()).unwrap();
    let step = (payload.len() / 64).max(1);
    let mut machine = C::new();
    for at in (0..payload.len()).step_by(step) {
        for value in [0, 0x7f, 0xff, payload[at] ^ 1, payload[at] ^ 0x80] {
            let mut payload = payload.clone();
            payload[at] = value;
            let bytes = postcard::to_stdvec(&(&kind, version, payload)).unwrap();
            let section: Section = postcard::from_bytes(&bytes).unwrap();
            if machine.device(|device| device.restore(&section)).is_ok() {
                // Whatever the state is, the device can save it again.
                let saved = save(&mut machine);
                machine.device(|device| device.restore(&saved).unwrap());
                // A device that cannot go on with it asks its driver for a reset.
                machine.device(|device| drop(device.resume()));
                machine.device(|device| device.pause().unwrap());
            }
            machine.device(|device| device.reset());
        }
    }
    machine.device(|device| device.resume().unwrap());
    machine.set_up();
    machine.work();
}

/// Expands to a module with all of these tests for a [`SuspendCase`].
macro_rules! suspend_tests {
    ($case:ty) => {
        mod suspended {
            use super::*;

            $crate::suspend_test::suspend_tests! { $case:
                goes_on_after_a_pause,
                goes_on_elsewhere,
                is_saved_before_it_is_set_up,
                is_saved_the_same_twice,
                is_paused_and_resumed_twice,
                is_not_saved_at_work,
                is_as_after_power_on_when_it_was_reset,
                refuses_what_is_not_its_state,
                notices_each_bit_that_has_changed,
                bears_state_of_any_content,
            }
        }
    };
    ($case:ty: $($test:ident,)*) => {
        $(
            #[test]
            fn $test() {
                $crate::suspend_test::$test::<$case>();
            }
        )*
    };
}

pub(crate) use suspend_tests;
