//! ACPI power registers of a hardware-reduced machine (ACPI 6.5 section 4.8.3.7): the guest powers
//! off or restarts the machine through them.

use std::sync::Arc;

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::PassiveDevice;
use crate::power::PowerControl;

/// Offset of the sleep control register.
const SLEEP_CONTROL: u64 = 0;
/// Offset of the reset register. The sleep status register lies between the two.
const RESET: u64 = 2;
/// `SLP_EN` bit of the sleep control register: enter the state that `SLP_TYPx` names.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Position of `SLP_TYPx` in the sleep control register.
const SLEEP_TYPE_SHIFT: u8 = 2;
/// Width mask of `SLP_TYPx`.
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The values that the machine's ACPI tables tell the guest to write.
#[derive(Debug, Clone, Copy)]
pub struct PowerValues {
    /// `SLP_TYPx` of the `\_S5` package: soft off.
    pub soft_off_sleep_type: u8,
    /// `RESET_VALUE` of the FADT.
    pub reset: u8,
}

/// Three I/O ports: sleep control, sleep status and reset.
pub struct AcpiPower {
    values: PowerValues,
    power: Arc<dyn PowerControl>,
}

impl AcpiPower {
    /// Makes registers that hand the guest's requests to `power`.
    pub fn new(values: PowerValues, power: Arc<dyn PowerControl>) -> AcpiPower {
        AcpiPower { values, power }
    }
}

impl BusDevice for AcpiPower {
    /// The machine never wakes from a sleep state, so the wake status is always clear.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, &[value]) => {
                let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && sleep_type == self.values.soft_off_sleep_type {
                    self.power.power_off();
                }
            }
            (RESET, &[value]) if value == self.values.reset => self.power.reset(),
            _ => {}
        }
    }
}

/// The registers hold no state.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AcpiPowerState;

impl SavedState for AcpiPowerState {
    const KIND: &'static str = "acpi-power";
    const VERSION: u16 = 1;
}

impl PassiveDevice for AcpiPower {
    type State = AcpiPowerState;

    fn reset(&mut self) {}

    fn state(&self) -> AcpiPowerState {
        AcpiPowerState
    }

    fn set_state(&mut self, _: AcpiPowerState) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::Device;
    use crate::power::tests::PowerRecorder;
    use crate::suspend_test::{SuspendCase, suspend_tests};

    const VALUES: PowerValues = PowerValues {
        soft_off_sleep_type: 5,
        reset: 1,
    };

    #[test]
    fn only_the_values_of_the_tables_act() {
        let power = Arc::new(PowerRecorder::default());
        let mut registers = AcpiPower::new(VALUES, power.clone());
        registers.write(SLEEP_CONTROL, &[5 << SLEEP_TYPE_SHIFT]);
        registers.write(SLEEP_CONTROL, &[SLEEP_ENABLE | 3 << SLEEP_TYPE_SHIFT]);
        registers.write(SLEEP_CONTROL, &[SLEEP_ENABLE | 5 << SLEEP_TYPE_SHIFT, 0]);
        registers.write(1, &[0xff]);
        registers.write(RESET, &[2]);
        assert_eq!(power.requests(), (0, 0));
        registers.write(SLEEP_CONTROL, &[SLEEP_ENABLE | 5 << SLEEP_TYPE_SHIFT]);
        assert_eq!(power.requests(), (1, 0));
        registers.write(RESET, &[1]);
        assert_eq!(power.requests(), (1, 1));
    }

    /// A guest with the device, and what it has asked for.
    struct Guest {
        device: AcpiPower,
        power: Arc<PowerRecorder>,
    }

    impl SuspendCase for Guest {
        const WORKS_BY_ITSELF: bool = false;

        fn new() -> Guest {
            let power = Arc::new(PowerRecorder::default());
            Guest {
                device: AcpiPower::new(VALUES, power.clone()),
                power,
            }
        }

        fn work(&mut self) {
            let (before, _) = self.power.requests();
            let value = SLEEP_ENABLE | VALUES.soft_off_sleep_type << SLEEP_TYPE_SHIFT;
            self.device.write(SLEEP_CONTROL, &[value]);
            assert_eq!(self.power.requests(), (before + 1, 0));
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
