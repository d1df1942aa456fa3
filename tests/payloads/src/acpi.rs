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
                    acpi.tables.push(check_table(dsdt)?.0);
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
