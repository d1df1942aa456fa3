//! The panic device that Linux, Windows and others know as pvpanic (QEMU, `docs/specs/pvpanic.rst`): a
//! guest's kernel uses it to report that it has panicked.

use std::sync::Arc;

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::PassiveDevice;
use crate::power::PowerControl;

/// Events, each a bit of the port.
mod event {
    /// The kernel has panicked, and its host is to deal with it.
    pub(super) const PANICKED: u8 = 1 << 0;
    /// The kernel has panicked, and another kernel in the guest deals with it.
    pub(super) const CRASH_LOADED: u8 = 1 << 1;
}

/// One I/O port: it reads as the events that the device knows, and the guest writes those that have happened.
pub struct PanicDevice {
    power: Arc<dyn PowerControl>,
}

impl PanicDevice {
    /// Makes a device that reports the guest's panics to `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> PanicDevice {
        PanicDevice { power }
    }
}

impl BusDevice for PanicDevice {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = event::PANICKED | event::CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let &[events] = data else {
            return;
        };
        if events & event::PANICKED != 0 {
            self.power.panicked(false);
        } else if events & event::CRASH_LOADED != 0 {
            self.power.panicked(true);
        }
    }
}

/// The port holds no state.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PanicDeviceState;

impl SavedState for PanicDeviceState {
    const KIND: &'static str = "panic-device";
    const VERSION: u16 = 1;
}

impl PassiveDevice for PanicDevice {
    type State = PanicDeviceState;

    fn reset(&mut self) {}

    fn state(&self) -> PanicDeviceState {
        PanicDeviceState
    }

    fn set_state(&mut self, _: PanicDeviceState) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::Device;
    use crate::power::tests::PowerRecorder;
    use crate::suspend_test::{SuspendCase, suspend_tests};

    #[test]
    fn the_events_that_it_names_are_passed_on() {
        let power = Arc::new(PowerRecorder::default());
        let mut device = PanicDevice::new(power.clone());
        let mut events = [0xff];
        device.read(0, &mut events);
        assert_eq!(events, [0b11]);
        // No event, one that the device does not know, and a write of another width.
        device.write(0, &[0]);
        device.write(0, &[1 << 2]);
        device.write(0, &[1, 0]);
        assert!(power.panics().is_empty());
        device.write(0, &[0b01]);
        device.write(0, &[0b10]);
        device.write(0, &[0b11]);
        assert_eq!(power.panics(), [false, true, false]);
    }

    /// A guest with the device, and what it has asked for.
    struct Guest {
        device: PanicDevice,
        power: Arc<PowerRecorder>,
    }

    impl SuspendCase for Guest {
        const WORKS_BY_ITSELF: bool = false;

        fn new() -> Guest {
            let power = Arc::new(PowerRecorder::default());
            Guest {
                device: PanicDevice::new(power.clone()),
                power,
            }
        }

        fn work(&mut self) {
            self.device.write(0, &[event::PANICKED]);
            assert_eq!(self.power.panics().last(), Some(&false));
        }

        fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
            act(&mut self.device)
        }

        fn replace(&mut self) {
            *self = Guest::new();
        }

        fn visible_state(&mut self) -> Vec<u8> {
            let mut value = [0xff];
            self.device.read(0, &mut value);
            value.to_vec()
        }
    }

    suspend_tests!(Guest);
}
