//! An I/O port by which a guest ends the machine with a number of its own.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::power::PowerControl;

/// One I/O port: a byte written there is the guest's number, and the end of the machine. It reads as
/// zero, where a machine without it reads as all ones.
pub struct ExitPort {
    power: Arc<dyn PowerControl>,
}

impl ExitPort {
    /// A port that hands the guest's number to `power`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::PowerRecorder;

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
}
