//! The SMBIOS tables, which tell a guest who its machine is (DMTF DSP0134, System Management BIOS, version 3.2).

use bantam_memory::GuestMemory;

use crate::error::{Result, write_memory};
use crate::layout::{SMBIOS, SMBIOS_MAX_SIZE};

/// Longest text of a table in bytes.
pub const MAX_TEXT_SIZE: usize = 64;

const VENDOR: &str = "Bantam";
/// Version of the specification.
const VERSION: [u8; 2] = [3, 2];
const ENTRY_POINT_SIZE: usize = 24;
const ENTRY_POINT_REVISION: u8 = 1;

const BIOS: u8 = 0;
const SYSTEM: u8 = 1;
const CHASSIS: u8 = 3;
const END_OF_TABLE: u8 = 127;

/// The BIOS characteristics are not told.
const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
/// Second extension byte: the tables describe a virtual machine.
const IS_VIRTUAL_MACHINE: u8 = 1 << 4;
const WAKE_UP_BY_POWER_SWITCH: u8 = 6;
const CHASSIS_OTHER: u8 = 1;
const STATE_SAFE: u8 = 3;
const SECURITY_UNKNOWN: u8 = 2;

/// Who a machine is. Texts have at most [`MAX_TEXT_SIZE`] bytes, none of them 0; an empty one is left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct MachineIdentity<'a> {
    /// Who has made the machine.
    pub manufacturer: &'a str,
    /// What it is called.
    pub product: &'a str,
    /// Its version.
    pub version: &'a str,
    /// Its serial number. Cloud-init reads options here, as in `ds=nocloud`.
    pub serial: &'a str,
    /// Its UUID in the order of its digits; all zeroes if it has none.
    pub uuid: [u8; 16],
    /// Stock keeping unit.
    pub sku: &'a str,
    /// The family that it belongs to.
    pub family: &'a str,
    /// What its owner has written on its chassis.
    pub asset_tag: &'a str,
}

/// Writes the entry point at [`SMBIOS`], followed by the tables. A kernel looks for it in the last 64 KiB below 1 MiB.
///
/// # Errors
/// If the guest has no memory there.
pub fn write_smbios_tables(memory: &GuestMemory, identity: &MachineIdentity<'_>) -> Result<()> {
    let tables = tables(identity);
    let mut bytes = entry_point(tables.len());
    bytes.extend(tables);
    debug_assert!(bytes.len() <= SMBIOS_MAX_SIZE, "texts are short");
    write_memory(memory, "SMBIOS tables", SMBIOS, &bytes)
}

/// Section 5.2.2, the 64-bit entry point.
fn entry_point(size: usize) -> Vec<u8> {
    let mut bytes = b"_SM3_\0".to_vec();
    bytes.push(ENTRY_POINT_SIZE as u8);
    bytes.extend(VERSION);
    bytes.extend([0, ENTRY_POINT_REVISION, 0]);
    bytes.extend((size as u32).to_le_bytes());
    bytes.extend((SMBIOS + ENTRY_POINT_SIZE as u64).to_le_bytes());
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[5] = sum.wrapping_neg();
    bytes
}

fn tables(identity: &MachineIdentity<'_>) -> Vec<u8> {
    let mut tables = Tables::default();

    // Section 7.1.
    let mut bios = Table::new(BIOS);
    bios.text(VENDOR);
    bios.text(env!("CARGO_PKG_VERSION"));
    bios.bytes(&[0, 0]);
    bios.text("01/01/2026");
    bios.bytes(&[0]);
    bios.bytes(&CHARACTERISTICS_NOT_SUPPORTED.to_le_bytes());
    bios.bytes(&[0, IS_VIRTUAL_MACHINE]);
    // The releases of firmware and embedded controller, which there are not, and the size of the ROM.
    bios.bytes(&[0xff; 4]);
    bios.bytes(&[0, 0]);
    tables.add(bios);

    // Section 7.2. The first three fields of the UUID are little-endian.
    let mut system = Table::new(SYSTEM);
    system.text(identity.manufacturer);
    system.text(identity.product);
    system.text(identity.version);
    system.text(identity.serial);
    let mut uuid = identity.uuid;
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    system.bytes(&uuid);
    system.bytes(&[WAKE_UP_BY_POWER_SWITCH]);
    system.text(identity.sku);
    system.text(identity.family);
    tables.add(system);

    // Section 7.4.
    let mut chassis = Table::new(CHASSIS);
    chassis.text(identity.manufacturer);
    chassis.bytes(&[CHASSIS_OTHER]);
    chassis.text(identity.version);
    chassis.text(identity.serial);
    chassis.text(identity.asset_tag);
    chassis.bytes(&[STATE_SAFE, STATE_SAFE, STATE_SAFE, SECURITY_UNKNOWN]);
    // Neither a number of the maker, nor a height, power cords and contained elements.
    chassis.bytes(&[0; 8]);
    chassis.text(identity.sku);
    tables.add(chassis);

    tables.add(Table::new(END_OF_TABLE));
    tables.bytes
}

/// Tables one after the other, whose handles are their numbers.
#[derive(Default)]
struct Tables {
    bytes: Vec<u8>,
    count: u16,
}

impl Tables {
    fn add(&mut self, mut table: Table) {
        table.formatted[1] = table.formatted.len() as u8;
        table.formatted[2..4].copy_from_slice(&self.count.to_le_bytes());
        self.count += 1;
        self.bytes.extend(table.formatted);
        for text in &table.texts {
            self.bytes.extend(text.as_bytes());
            self.bytes.push(0);
        }
        if table.texts.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
    }
}

/// Section 6.1: a formatted part, and the texts that it names by their numbers.
struct Table {
    formatted: Vec<u8>,
    texts: Vec<String>,
}

impl Table {
    fn new(kind: u8) -> Table {
        Table {
            formatted: vec![kind, 0, 0, 0],
            texts: Vec::new(),
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.formatted.extend(bytes);
    }

    /// Adds the number of a text, 0 if that is empty.
    fn text(&mut self, text: &str) {
        if text.is_empty() {
            self.formatted.push(0);
            return;
        }
        self.texts.push(text.to_owned());
        self.formatted.push(self.texts.len() as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_point_adds_up_to_zero_and_names_the_tables() {
        let bytes = entry_point(0x1234);
        assert_eq!(bytes.len(), ENTRY_POINT_SIZE);
        let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        assert_eq!(&bytes[12..16], &[0x34, 0x12, 0, 0]);
        assert_eq!(bytes[16..24], (SMBIOS + 24).to_le_bytes());
        assert_eq!(SMBIOS % 16, 0);
    }

    #[test]
    fn the_largest_tables_fit() {
        let text = "x".repeat(MAX_TEXT_SIZE);
        let identity = MachineIdentity {
            manufacturer: &text,
            product: &text,
            version: &text,
            serial: &text,
            uuid: [0xff; 16],
            sku: &text,
            family: &text,
            asset_tag: &text,
        };
        assert!(ENTRY_POINT_SIZE + tables(&identity).len() <= SMBIOS_MAX_SIZE);
    }

    #[test]
    fn tables_have_their_lengths_handles_and_texts() {
        let identity = MachineIdentity {
            manufacturer: "Maker",
            serial: "ds=nocloud",
            uuid: *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
            ..MachineIdentity::default()
        };
        let bytes = tables(&identity);
        let mut rest = &bytes[..];
        let mut found = Vec::new();
        while let [kind, len, low, high, ..] = *rest {
            let (formatted, after) = rest.split_at(len.into());
            let end = after.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let texts = String::from_utf8(after[..end].to_vec()).unwrap();
            found.push((kind, len, u16::from_le_bytes([low, high]), formatted, texts));
            rest = &after[end + 2..];
        }
        assert!(rest.is_empty());
        let shapes: Vec<_> = found.iter().map(|it| (it.0, it.1, it.2)).collect();
        assert_eq!(
            shapes,
            [
                (BIOS, 0x1a, 0),
                (SYSTEM, 0x1b, 1),
                (CHASSIS, 0x16, 2),
                (END_OF_TABLE, 4, 3)
            ]
        );
        let (.., system, texts) = &found[1];
        assert_eq!(texts, "Maker\0ds=nocloud");
        assert_eq!(system[4..8], [1, 0, 0, 2]);
        assert_eq!(
            &system[8..24],
            b"\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff"
        );
    }
}
