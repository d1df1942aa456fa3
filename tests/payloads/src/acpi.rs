//! The ACPI tables that a payload reads (ACPI 6.5 section 5.2).

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const RSDP_SIGNATURE: u64 = u64::from_le_bytes(*b"RSD PTR ");
const HEADER_SIZE: u64 = 36;
const MADT_ENTRIES: u64 = 44;
const LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;
const LOCAL_X2APIC: u8 = 9;
const ENABLED: u32 = 1;
const FADT_DSDT: u64 = 40;
const FADT_X_DSDT: u64 = 140;

/// Encodings in ACPI machine language (ACPI 6.5 sections 20.2 and 6.4.3.4).
mod aml {
    pub const BYTE: u8 = 0x0a;
    pub const WORD: u8 = 0x0b;
    pub const DWORD: u8 = 0x0c;
    pub const QWORD: u8 = 0x0e;
    pub const PACKAGE: u8 = 0x12;
    /// Descriptor of memory at a fixed 32-bit address, with its length.
    pub const FIXED_MEMORY: [u8; 3] = [0x86, 9, 0];
}

/// Reads a value of guest-physical memory, aligned or not.
///
/// # Safety
///
/// The address is mapped memory, and any bytes are a valid `T`.
pub(crate) unsafe fn read<T: Copy>(address: u64) -> T {
    // SAFETY: as the caller promises.
    unsafe { (address as *const T).read_unaligned() }
}

/// Returns the sum of `size` bytes of guest-physical memory: zero if a checksum is correct.
///
/// # Safety
///
/// The range is mapped memory.
pub(crate) unsafe fn bytes_sum(address: u64, size: u64) -> u8 {
    (0..size).fold(0, |sum: u8, offset| {
        // SAFETY: as the caller promises.
        sum.wrapping_add(unsafe { read(address + offset) })
    })
}

/// The content of the ACPI tables.
pub struct Acpi {
    /// Signatures of all tables that the root table names, and DSDT.
    pub tables: Vec<[u8; 4]>,
    /// Local APIC ids of the processors that can be used, in the MADT's order.
    pub processors: Vec<u32>,
    /// Guest-physical addresses of the I/O APICs.
    pub io_apics: Vec<u32>,
    /// The machine language of the DSDT.
    pub definition_block: Vec<u8>,
}

impl Acpi {
    /// Returns the address of the generation id, which the package `ADDR` of the device `VGEN` gives.
    pub fn generation_id(&self) -> Option<u64> {
        let device = self.after(b"VGEN\x08_HID")?;
        let package = after(device, b"\x08ADDR")?;
        // Its length has one byte.
        let [aml::PACKAGE, _, 2, elements @ ..] = package else {
            return None;
        };
        let (low, elements) = integer(elements)?;
        let (high, _) = integer(elements)?;
        Some(low | high << 32)
    }

    /// Returns the address of the VMClock page, which is the resource of the device `VCLK`.
    pub fn vm_clock(&self) -> Option<u64> {
        let device = self.after(b"VCLK\x08_HID")?;
        let resource = after(device, &aml::FIXED_MEMORY)?;
        let address = resource.get(1..5)?.try_into().ok()?;
        Some(u64::from(u32::from_le_bytes(address)))
    }

    /// Returns the part of the definition block after the first occurrence of `bytes`.
    fn after(&self, bytes: &[u8]) -> Option<&[u8]> {
        after(&self.definition_block, bytes)
    }
}

fn after<'a>(all: &'a [u8], bytes: &[u8]) -> Option<&'a [u8]> {
    let at = all
        .windows(bytes.len())
        .position(|window| window == bytes)?;
    Some(&all[at + bytes.len()..])
}

/// Takes an integer from the front of `bytes`, and returns it with the rest.
fn integer(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (&encoding, rest) = bytes.split_first()?;
    let size = match encoding {
        // The constants zero and one.
        0 | 1 => return Some((encoding.into(), rest)),
        aml::BYTE => 1,
        aml::WORD => 2,
        aml::DWORD => 4,
        aml::QWORD => 8,
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(size)?;
    let value = value
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte));
    Some((value, rest))
}

/// Walks all tables from the root pointer at `rsdp`, checking every signature, length and
/// checksum.
///
/// # Errors
///
/// What is wrong with a table.
pub fn walk(rsdp: u64) -> Result<Acpi, String> {
    // SAFETY: the monitor says that the tables are here, and its map has them below 4 GiB.
    unsafe {
        if read::<u64>(rsdp) != RSDP_SIGNATURE {
            return Err(format!("no ACPI root pointer at {rsdp:#x}"));
        }
        if bytes_sum(rsdp, 20) != 0 || bytes_sum(rsdp, u64::from(read::<u32>(rsdp + 20))) != 0 {
            return Err(format!(
                "the ACPI root pointer at {rsdp:#x} has a wrong checksum"
            ));
        }
        let mut acpi = Acpi {
            tables: Vec::new(),
            processors: Vec::new(),
            io_apics: Vec::new(),
            definition_block: Vec::new(),
        };
        let root = read::<u64>(rsdp + 24);
        let (signature, root_length) = check_table(root)?;
        if signature != *b"XSDT" {
            return Err(format!("the table at {root:#x} is not an XSDT"));
        }
        for entry in (HEADER_SIZE..root_length).step_by(8) {
            let table = read::<u64>(root + entry);
            let (signature, length) = check_table(table)?;
            acpi.tables.push(signature);
            match &signature {
                b"APIC" => read_madt(table, length, &mut acpi)?,
                b"FACP" => {
                    let dsdt = match read::<u64>(table + FADT_X_DSDT) {
                        0 => u64::from(read::<u32>(table + FADT_DSDT)),
                        address => address,
                    };
                    let (signature, length) = check_table(dsdt)?;
                    acpi.tables.push(signature);
                    acpi.definition_block = (HEADER_SIZE..length)
                        .map(|offset| read::<u8>(dsdt + offset))
                        .collect();
                }
                _ => {}
            }
        }
        Ok(acpi)
    }
}

unsafe fn check_table(address: u64) -> Result<([u8; 4], u64), String> {
    // SAFETY: a table of the walk.
    let (signature, length) = unsafe {
        (
            read::<[u8; 4]>(address),
            u64::from(read::<u32>(address + 4)),
        )
    };
    let name = signature.escape_ascii();
    if !(HEADER_SIZE..1 << 20).contains(&length) {
        return Err(format!(
            "ACPI table {name} at {address:#x} claims {length} bytes"
        ));
    }
    // SAFETY: the length is plausible, and the table lies in memory.
    if unsafe { bytes_sum(address, length) } != 0 {
        return Err(format!(
            "ACPI table {name} at {address:#x} has a wrong checksum"
        ));
    }
    Ok((signature, length))
}

unsafe fn read_madt(table: u64, length: u64, acpi: &mut Acpi) -> Result<(), String> {
    let mut at = MADT_ENTRIES;
    while at + 2 <= length {
        // SAFETY: inside the table, whose length is checked.
        unsafe {
            let entry = table + at;
            let size = u64::from(read::<u8>(entry + 1));
            if size < 2 || at + size > length {
                return Err(format!("the MADT's entry at offset {at} has {size} bytes"));
            }
            match read::<u8>(entry) {
                LOCAL_APIC if read::<u32>(entry + 4) & ENABLED != 0 => {
                    acpi.processors.push(u32::from(read::<u8>(entry + 3)));
                }
                LOCAL_X2APIC if read::<u32>(entry + 8) & ENABLED != 0 => {
                    acpi.processors.push(read::<u32>(entry + 4));
                }
                IO_APIC => acpi.io_apics.push(read::<u32>(entry + 4)),
                _ => {}
            }
            at += size;
        }
    }
    Ok(())
}
