//! The MP configuration table (Intel MultiProcessor specification 1.4, chapter 4).

use alloc::vec::Vec;

use crate::acpi::{bytes_sum, read};

const FLOATING_POINTER_SIGNATURE: u32 = u32::from_le_bytes(*b"_MP_");
const TABLE_SIGNATURE: u32 = u32::from_le_bytes(*b"PCMP");
const HEADER_SIZE: u64 = 44;
const EBDA_SEGMENT: u64 = 0x40e;
const LAST_KIB_OF_BASE_MEMORY: u64 = 0x9_fc00;
const BIOS_AREA: u64 = 0xf_0000;
const BIOS_AREA_SIZE: u64 = 0x1_0000;

const PROCESSOR: u8 = 0;
const IO_APIC: u8 = 2;
const PROCESSOR_SIZE: u64 = 20;
const OTHER_ENTRY_SIZE: u64 = 8;
const LAST_ENTRY_TYPE: u8 = 4;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;

/// The content of an MP configuration table.
pub struct MpTable {
    /// Where its floating pointer structure was found.
    pub floating_pointer: u64,
    /// Local APIC ids of the processors that can be used, in the table's order.
    pub processors: Vec<u8>,
    /// Local APIC ids of those marked as the boot processor.
    pub boot_processors: Vec<u8>,
    /// Guest-physical addresses of the I/O APICs.
    pub io_apics: Vec<u32>,
}

/// Finds the table in the places that the specification's section 4 lists.
///
/// # Errors
///
/// What is wrong with a table that was found; `Ok(None)` if there is none.
pub fn find() -> Result<Option<MpTable>, &'static str> {
    // SAFETY: conventional memory, the BIOS data area and the BIOS area are mapped.
    let ebda = unsafe { u64::from(read::<u16>(EBDA_SEGMENT)) << 4 };
    let areas = [
        (ebda, if ebda >= 0x1_0000 { 0x400 } else { 0 }),
        (LAST_KIB_OF_BASE_MEMORY, 0x400),
        (BIOS_AREA, BIOS_AREA_SIZE),
    ];
    let pointer = areas
        .iter()
        .flat_map(|&(start, size)| (start..start + size).step_by(16))
        // SAFETY: as above; a signature that is not followed by a valid structure is another's.
        .find(|&at| unsafe {
            read::<u32>(at) == FLOATING_POINTER_SIGNATURE && bytes_sum(at, 16) == 0
        });
    pointer.map(parse).transpose()
}

fn parse(floating_pointer: u64) -> Result<MpTable, &'static str> {
    // SAFETY: the monitor says that the table is there, in memory below 4 GiB.
    unsafe {
        let table = u64::from(read::<u32>(floating_pointer + 4));
        if read::<u32>(table) != TABLE_SIGNATURE {
            return Err("the floating pointer does not lead to an MP configuration table");
        }
        let length = u64::from(read::<u16>(table + 4));
        if bytes_sum(table, length) != 0 {
            return Err("the MP configuration table has a wrong checksum");
        }
        let mut found = MpTable {
            floating_pointer,
            processors: Vec::new(),
            boot_processors: Vec::new(),
            io_apics: Vec::new(),
        };
        let mut entry = table + HEADER_SIZE;
        // By length, as Linux does: the entry count of qboot's table is wrong.
        while entry < table + length {
            let kind = read::<u8>(entry);
            match kind {
                PROCESSOR if read::<u8>(entry + 3) & ENABLED != 0 => {
                    let id = read::<u8>(entry + 1);
                    found.processors.push(id);
                    if read::<u8>(entry + 3) & BOOT_PROCESSOR != 0 {
                        found.boot_processors.push(id);
                    }
                }
                IO_APIC if read::<u8>(entry + 3) & ENABLED != 0 => {
                    found.io_apics.push(read::<u32>(entry + 4));
                }
                0..=LAST_ENTRY_TYPE => {}
                _ => return Err("the MP configuration table has an entry of unknown type"),
            }
            entry += if kind == PROCESSOR {
                PROCESSOR_SIZE
            } else {
                OTHER_ENTRY_SIZE
            };
        }
        if entry != table + length {
            return Err("the MP configuration table ends inside an entry");
        }
        Ok(found)
    }
}
