//! An I/O port with which a guest ends the machine and passes on a number of its choice.

use std::sync::Arc;

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::PassiveDevice;
use crate::power::PowerControl;

/// One I/O port: a byte written there ends the machine, and is the guest's number. It reads as zero, whereas
/// a machine without this port reads as all ones.
pub struct ExitPort {
    power: Arc<dyn PowerControl>,
}

impl ExitPort {
    /// Makes a port that hands the guest's number to `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> ExitPort {
        ExitPort { power }
    }
}

impl BusDevice for ExitPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let &[number] = data {
            self.power.exit(number);
        }
    }
}

/// The port holds no state.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExitPortState;

impl SavedState for ExitPortState {
    const KIND: &'static str = "exit-port";
    const VERSION: u16 = 1;
}

impl PassiveDevice for ExitPort {
    type State = ExitPortState;

    fn reset(&mut self) {}

    fn state(&self) -> ExitPortState {
        ExitPortState
    }

    fn set_state(&mut self, _: ExitPortState) -> Result<(), String> {
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
    fn a_byte_ends_the_machine_and_nothing_else_does() {
        let power = Arc::new(PowerRecorder::default());
        let mut port = ExitPort::new(power.clone());
        let mut byte = [0xff];
        port.read(0, &mut byte);
        assert_eq!(byte, [0]);
        port.write(0, &[]);
        port.write(0, &[1, 2]);
        assert!(power.numbers().is_empty());
        for number in [0, 3, 255] {
            port.write(0, &[number]);
        }
        assert_eq!(power.numbers(), [0, 3, 255]);
    }

    /// A guest with the device, and what it has asked for.
    struct Guest {
        device: ExitPort,
        power: Arc<PowerRecorder>,
    }

    impl SuspendCase for Guest {
        const WORKS_BY_ITSELF: bool = false;

        fn new() -> Guest {
            let power = Arc::new(PowerRecorder::default());
            Guest {
                device: ExitPort::new(power.clone()),
                power,
            }
        }

        fn work(&mut self) {
            self.device.write(0, &[7]);
            assert_eq!(self.power.numbers().last(), Some(&7));
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
