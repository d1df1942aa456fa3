//! The i8042 keyboard controller, as far as a machine without a keyboard has one: it resets.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::power::PowerControl;

/// Offset of the command and status port from the data port.
const COMMAND_PORT: u64 = 4;
/// Command that pulses output line 0, which is wired to the CPU's reset.
const PULSE_RESET_LINE: u8 = 0xfe;

/// The controller's two ports: data at offset 0, command and status at offset 4.
pub struct I8042 {
    power: Arc<dyn PowerControl>,
}

impl I8042 {
    /// A controller whose reset line asks `power` for a restart.
    pub fn new(power: Arc<dyn PowerControl>) -> I8042 {
        I8042 { power }
    }
}

impl BusDevice for I8042 {
    /// No data is ever waiting and no command is ever pending, so every port reads as zero.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND_PORT && data == [PULSE_RESET_LINE] {
            self.power.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::PowerRecorder;

    #[test]
    fn only_the_reset_command_resets() {
        let power = Arc::new(PowerRecorder::default());
        let mut i8042 = I8042::new(power.clone());
        i8042.write(0, &[PULSE_RESET_LINE]);
        i8042.write(COMMAND_PORT, &[0xd1]);
        i8042.write(COMMAND_PORT, &[PULSE_RESET_LINE, 0]);
        assert_eq!(power.requests(), (0, 0));
        i8042.write(COMMAND_PORT, &[PULSE_RESET_LINE]);
        assert_eq!(power.requests(), (0, 1));
        let mut status = [0xff];
        i8042.read(COMMAND_PORT, &mut status);
        assert_eq!(
            status,
            [0],
            "a driver waits for the input buffer to be empty"
        );
    }
}
