//! A PCI bus with nothing on it but its host bridge, behind the ports of configuration mechanism 1
//! (PCI Local Bus Specification 3.0, section 3.2.2.3.2).
//!
//! A guest kernel that is built with PCI always looks for a bus. If it finds none it prints an error,
//! although nothing is wrong. Linux accepts a bus as real if there is a host bridge on it
//! (arch/x86/pci/direct.c, `pci_sanity_check()`).

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::PassiveDevice;

/// Offset of the address register, of four bytes.
const ADDRESS: u64 = 0;
/// Offset of the data register, of four bytes.
const DATA: u64 = 4;

/// Bit of the address register that enables configuration accesses.
const ENABLE: u32 = 1 << 31;
/// Bits of the address register that can be set: all except the lowest two and bits 24 to 30.
const ADDRESS_MASK: u32 = ENABLE | 0x00ff_fffc;
/// Bits of the address register that select a bus, device and function: all zero for the host bridge.
const FUNCTION_MASK: u32 = 0x00ff_ff00;

/// Vendor and device, as in the host bridges of other monitors: Intel, with a device number that no real
/// device has.
const IDS: u32 = 0x0d57_8086;
/// Class code and revision: a host bridge.
const CLASS: u32 = 0x0600_0000;

/// The two registers, and the configuration space of the bridge: a type 0 header without base addresses or
/// capabilities. It is zero apart from the constants above and cannot be written.
#[derive(Default)]
pub struct PciBus {
    address: u32,
}

impl PciBus {
    /// Returns the byte of configuration space that the data register shows at `offset`, which is less than
    /// 4.
    fn config_byte(&self, offset: u64) -> u8 {
        if self.address & ENABLE == 0 || self.address & FUNCTION_MASK != 0 {
            return 0xff;
        }
        let register = match self.address & 0xfc {
            0x00 => IDS,
            0x08 => CLASS,
            _ => 0,
        };
        (register >> (8 * offset)) as u8
    }
}

impl BusDevice for PciBus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (ADDRESS, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (DATA.., _) => {
                for (byte, offset) in data.iter_mut().zip(offset - DATA..) {
                    *byte = self.config_byte(offset);
                }
            }
            // Accesses of other widths are meant for other devices at these ports.
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (ADDRESS, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_MASK;
        }
    }
}

/// What the guest has written.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PciBusState {
    address: u32,
}

impl SavedState for PciBusState {
    const KIND: &'static str = "pci-bus";
    const VERSION: u16 = 1;
}

impl PassiveDevice for PciBus {
    type State = PciBusState;

    fn reset(&mut self) {
        *self = PciBus::default();
    }

    fn state(&self) -> PciBusState {
        let PciBus { address } = *self;
        PciBusState { address }
    }

    fn set_state(&mut self, PciBusState { address }: PciBusState) -> Result<(), String> {
        if address & !ADDRESS_MASK != 0 {
            return Err(format!("its address register cannot hold {address:#x}"));
        }
        self.address = address;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use bantam_state::Section;

    use crate::lifecycle::Device;
    use crate::suspend_test::{SuspendCase, suspend_tests};

    fn read<const N: usize>(bus: &mut PciBus, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        bus.read(offset, &mut data);
        data
    }

    fn config(bus: &mut PciBus, address: u32) -> u32 {
        bus.write(ADDRESS, &address.to_le_bytes());
        u32::from_le_bytes(read(bus, DATA))
    }

    #[test]
    fn linux_finds_configuration_mechanism_1() {
        let mut bus = PciBus::default();
        bus.write(3, &[1]);
        assert_eq!(read(&mut bus, ADDRESS), [0; 4]);
        bus.write(ADDRESS, &0x8000_0000_u32.to_le_bytes());
        assert_eq!(read(&mut bus, ADDRESS), 0x8000_0000_u32.to_le_bytes());
        bus.write(ADDRESS, &0x8000_0008_u32.to_le_bytes());
        assert_eq!(read(&mut bus, DATA + 2), 0x0600_u16.to_le_bytes());
    }

    #[test]
    fn the_host_bridge_is_alone() {
        let mut bus = PciBus::default();
        assert_eq!(config(&mut bus, ENABLE), IDS);
        // One function, a header of type 0, nothing to map.
        assert_eq!(config(&mut bus, ENABLE | 0x0c), 0);
        assert_eq!(config(&mut bus, ENABLE | 0x10), 0);
        for function in (0x100..0x0100_0000).step_by(0x100) {
            assert_eq!(config(&mut bus, ENABLE | function), u32::MAX);
        }
        assert_eq!(config(&mut bus, 0), u32::MAX);
    }

    #[test]
    fn the_bridge_cannot_be_written() {
        let mut bus = PciBus::default();
        for register in (0..0x100).step_by(4) {
            let before = config(&mut bus, ENABLE | register);
            bus.write(DATA, &[0xff; 4]);
            assert_eq!(config(&mut bus, ENABLE | register), before);
        }
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(accesses: Vec<(bool, u64, [u8; 8])>) {
            let mut bus = PciBus::default();
            for (is_write, place, mut data) in accesses {
                let offset = place % 8;
                let end = (place >> 8) as usize % 8;
                let part = &mut data[..end.min(8 - offset as usize)];
                if is_write {
                    bus.write(offset, part);
                } else {
                    bus.read(offset, part);
                }
            }
        }
    }

    impl SuspendCase for PciBus {
        const WORKS_BY_ITSELF: bool = false;

        fn new() -> PciBus {
            PciBus::default()
        }

        fn work(&mut self) {
            assert_eq!(config(self, ENABLE), IDS);
        }

        /// Selects a register.
        fn begin(&mut self) {
            self.write(ADDRESS, &(ENABLE | 8).to_le_bytes());
        }

        fn end(&mut self) {
            assert_eq!(u32::from_le_bytes(read(self, DATA)), CLASS);
        }

        fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
            act(self)
        }

        fn replace(&mut self) {
            *self = PciBus::default();
        }

        fn visible_state(&mut self) -> Vec<u8> {
            read::<4>(self, ADDRESS).to_vec()
        }
    }

    suspend_tests!(PciBus);

    #[test]
    fn an_address_that_cannot_be_written_is_refused() {
        let section = Section::of(&PciBusState {
            address: ENABLE | 1,
        })
        .unwrap();
        let mut bus = PciBus::default();
        bus.restore(&section).unwrap_err();
        assert_eq!(read(&mut bus, ADDRESS), [0; 4]);
    }
}
