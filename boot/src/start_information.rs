//! The structures in guest memory that each boot protocol passes to the kernel.

use bantam_arch::memory_map::{MemoryKind, MemoryMapEntry};
use bantam_arch::{EntryProtocol, layout};
use bantam_memory::GuestMemory;
use linux_loader::loader::bootparam::{SETUP_RNG_SEED, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use crate::command_line::{CommandLine, CommandLineError};
use crate::initrd::Initrd;
use crate::kernel::LoadedKernel;

/// Most entries between the start of the PVH memory map and the next structure in guest memory.
const PVH_MEMORY_MAP_MAX_ENTRIES: usize =
    (layout::ZERO_PAGE - layout::PVH_MEMORY_MAP) as usize / size_of::<hvm_memmap_table_entry>();

/// First version of `hvm_start_info` with a memory map.
const PVH_VERSION_WITH_MEMORY_MAP: u32 = 1;

/// `boot_flag` of every setup header.
const BOOT_FLAG: u16 = 0xaa55;
/// `header` of every setup header: "HdrS".
const SETUP_HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// `type_of_loader` of a boot loader without an assigned number.
const UNREGISTERED_LOADER: u8 = 0xff;

/// Size of the seed for the kernel's random numbers in bytes, which Linux considers enough.
pub const RANDOM_SEED_SIZE: usize = 32;

/// The information that a kernel gets at its start.
#[derive(Clone, Copy)]
pub struct StartInformation<'a> {
    /// Which ranges of guest-physical memory the kernel may use.
    pub memory_map: &'a [MemoryMapEntry],
    /// The kernel command line.
    pub command_line: &'a CommandLine,
    /// The initrd, if there is one.
    pub initrd: Option<Initrd>,
    /// The ACPI root pointer, if there are ACPI tables.
    pub rsdp: Option<GuestAddress>,
    /// Unpredictable bytes, different for each start, from which the kernel seeds its random
    /// numbers. Only the 64-bit Linux protocol passes them on.
    pub random_seed: [u8; RANDOM_SEED_SIZE],
}

/// Why the start information cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum StartInformationError {
    /// The kernel does not take the command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// The structure of the boot protocol has no room for the memory map.
    #[error("the memory map has {count} entries, but the boot protocol has room for {limit}")]
    MemoryMapTooLong {
        /// Entries of the memory map.
        count: usize,
        /// Most entries.
        limit: usize,
    },
    /// Guest memory does not hold the boot structures.
    #[error("cannot write {what} to guest memory at {address:#x}: {source}")]
    Write {
        /// The structure that was being written.
        what: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// What failed.
        source: GuestMemoryError,
    },
}

/// Writes the command line and the structures of the protocol by which `kernel` is entered, and
/// returns the address that the boot vCPU gets in a register: that of `hvm_start_info` in EBX for
/// PVH, of `boot_params` in RSI for the 64-bit Linux protocol.
///
/// # Errors
///
/// If the command line is longer than this kernel takes, the memory map has more entries than the
/// protocol has room for, or guest memory does not reach up to the boot structures.
pub fn write_start_information(
    memory: &GuestMemory,
    kernel: &LoadedKernel,
    information: &StartInformation<'_>,
) -> Result<GuestAddress, StartInformationError> {
    let limit = kernel.command_line_limit();
    let command_line = information.command_line.to_bytes_with_nul(limit)?;
    write_bytes(
        memory,
        "the command line",
        layout::COMMAND_LINE,
        &command_line,
    )?;
    match kernel.protocol {
        EntryProtocol::Pvh => write_pvh_start_info(memory, information),
        EntryProtocol::Linux64 => {
            write_linux_boot_params(memory, kernel.setup_header, limit, information)
        }
    }
}

/// Writes `hvm_start_info` and what it points to (Xen docs/misc/pvh, public/arch-x86/hvm/
/// start_info.h).
fn write_pvh_start_info(
    memory: &GuestMemory,
    information: &StartInformation<'_>,
) -> Result<GuestAddress, StartInformationError> {
    check_entry_count(information.memory_map, PVH_MEMORY_MAP_MAX_ENTRIES)?;
    let mut start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: PVH_VERSION_WITH_MEMORY_MAP,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: information.rsdp.map_or(0, |rsdp| rsdp.0),
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: information.memory_map.len() as u32,
        ..Default::default()
    };
    if let Some(initrd) = information.initrd {
        start_info.nr_modules = 1;
        start_info.modlist_paddr = layout::PVH_MODULE_LIST;
        let module = hvm_modlist_entry {
            paddr: initrd.address.0,
            size: initrd.size,
            ..Default::default()
        };
        write_structure(
            memory,
            "the PVH module list",
            layout::PVH_MODULE_LIST,
            &module,
        )?;
    }
    for (entry, address) in information
        .memory_map
        .iter()
        .zip((layout::PVH_MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()))
    {
        let entry = hvm_memmap_table_entry {
            addr: entry.address,
            size: entry.size,
            type_: memory_type(entry.kind),
            reserved: 0,
        };
        write_structure(memory, "the PVH memory map", address, &entry)?;
    }
    write_structure(
        memory,
        "the PVH start info",
        layout::PVH_START_INFO,
        &start_info,
    )?;
    Ok(GuestAddress(layout::PVH_START_INFO))
}

/// Writes the "zero page" (Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and
/// zero-page.rst).
fn write_linux_boot_params(
    memory: &GuestMemory,
    kernel_header: Option<setup_header>,
    command_line_limit: usize,
    information: &StartInformation<'_>,
) -> Result<GuestAddress, StartInformationError> {
    let mut params = boot_params::default();
    let entry_limit = { params.e820_table }.len();
    check_entry_count(information.memory_map, entry_limit)?;

    params.hdr = kernel_header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: SETUP_HEADER_MAGIC,
        cmdline_size: command_line_limit as u32,
        ..Default::default()
    });
    params.hdr.type_of_loader = UNREGISTERED_LOADER;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.setup_data = layout::RANDOM_SEED;
    write_random_seed(memory, &information.random_seed)?;
    if let Some(initrd) = information.initrd {
        params.hdr.ramdisk_image = initrd.address.0 as u32;
        params.ext_ramdisk_image = (initrd.address.0 >> 32) as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
        params.ext_ramdisk_size = (initrd.size >> 32) as u32;
    }
    params.acpi_rsdp_addr = information.rsdp.map_or(0, |rsdp| rsdp.0);
    params.e820_entries = information.memory_map.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(information.memory_map) {
        *slot = boot_e820_entry {
            addr: entry.address,
            size: entry.size,
            r#type: memory_type(entry.kind),
        };
    }
    write_structure(memory, "the zero page", layout::ZERO_PAGE, &params)?;
    Ok(GuestAddress(layout::ZERO_PAGE))
}

/// Writes the only element of the list that `setup_data` points to (boot.rst, "setup_data").
fn write_random_seed(
    memory: &GuestMemory,
    seed: &[u8; RANDOM_SEED_SIZE],
) -> Result<(), StartInformationError> {
    let mut element = Vec::with_capacity(16 + seed.len());
    element.extend(0_u64.to_le_bytes());
    element.extend(SETUP_RNG_SEED.to_le_bytes());
    element.extend((seed.len() as u32).to_le_bytes());
    element.extend(seed);
    write_bytes(memory, "the random seed", layout::RANDOM_SEED, &element)
}

/// Returns the number of a memory kind, which is the same for PVH and E820 (ACPI 6.5 section 15.1,
/// "Address Range Types").
fn memory_type(kind: MemoryKind) -> u32 {
    match kind {
        MemoryKind::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
        MemoryKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
    }
}

fn check_entry_count(
    memory_map: &[MemoryMapEntry],
    limit: usize,
) -> Result<(), StartInformationError> {
    match memory_map.len() {
        count if count > limit => Err(StartInformationError::MemoryMapTooLong { count, limit }),
        _ => Ok(()),
    }
}

fn write_structure(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    structure: &impl ByteValued,
) -> Result<(), StartInformationError> {
    write_bytes(memory, what, address, structure.as_slice())
}

fn write_bytes(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), StartInformationError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| StartInformationError::Write {
            what,
            address,
            source,
        })
}

#[cfg(test)]
mod tests {
    use bantam_arch::memory_map::memory_map;

    use super::*;
    use crate::test_images::{MIB, loaded_kernel, memory};

    const INITRD: Initrd = Initrd {
        address: GuestAddress(0xf0_0000),
        size: 12345,
    };
    const RSDP: GuestAddress = GuestAddress(layout::ACPI_TABLES);
    const SEED: [u8; RANDOM_SEED_SIZE] = *b"thirty-two bytes of a test seed.";

    fn read<const N: usize>(memory: &GuestMemory, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn u64_at(memory: &GuestMemory, address: u64) -> u64 {
        u64::from_le_bytes(read(memory, address))
    }

    fn u32_at(memory: &GuestMemory, address: u64) -> u32 {
        u32::from_le_bytes(read(memory, address))
    }

    fn write(
        memory: &GuestMemory,
        protocol: EntryProtocol,
        setup_header: Option<setup_header>,
        initrd: Option<Initrd>,
    ) -> GuestAddress {
        let mut kernel = loaded_kernel(4 * MIB, setup_header);
        kernel.protocol = protocol;
        let information = StartInformation {
            memory_map: &memory_map(16 * MIB),
            command_line: &CommandLine::new("quiet").unwrap(),
            initrd,
            rsdp: Some(RSDP),
            random_seed: SEED,
        };
        write_start_information(memory, &kernel, &information).unwrap()
    }

    #[test]
    fn pvh_start_info_has_the_published_layout() {
        let memory = memory(16 * MIB);
        let address = write(&memory, EntryProtocol::Pvh, None, Some(INITRD)).0;
        assert_eq!(address, layout::PVH_START_INFO);
        assert_eq!(u32_at(&memory, address), 0x336e_c578);
        assert_eq!(u32_at(&memory, address + 4), 1);
        assert_eq!(u32_at(&memory, address + 8), 0);
        assert_eq!(u32_at(&memory, address + 12), 1);
        let module_list = u64_at(&memory, address + 16);
        assert_eq!(u64_at(&memory, module_list), INITRD.address.0);
        assert_eq!(u64_at(&memory, module_list + 8), INITRD.size);
        let command_line = u64_at(&memory, address + 24);
        assert_eq!(&read(&memory, command_line), b"quiet\0");
        assert_eq!(u64_at(&memory, address + 32), RSDP.0);
        let map = u64_at(&memory, address + 40);
        let expected = memory_map(16 * MIB);
        assert_eq!(u32_at(&memory, address + 48) as usize, expected.len());
        for (entry, address) in expected.iter().zip((map..).step_by(24)) {
            assert_eq!(u64_at(&memory, address), entry.address);
            assert_eq!(u64_at(&memory, address + 8), entry.size);
            let number = if entry.kind == MemoryKind::Ram { 1 } else { 2 };
            assert_eq!(u32_at(&memory, address + 16), number);
        }
    }

    #[test]
    fn pvh_has_no_module_without_initrd() {
        let memory = memory(16 * MIB);
        let address = write(&memory, EntryProtocol::Pvh, None, None).0;
        assert_eq!(u32_at(&memory, address + 12), 0);
        assert_eq!(u64_at(&memory, address + 16), 0);
    }

    #[test]
    fn zero_page_has_the_published_layout() {
        let memory = memory(16 * MIB);
        let page = write(&memory, EntryProtocol::Linux64, None, Some(INITRD)).0;
        assert_eq!(page, layout::ZERO_PAGE);
        assert_eq!(u64_at(&memory, page + 0x70), RSDP.0);
        assert_eq!(read(&memory, page + 0x1fe), [0x55, 0xaa]);
        assert_eq!(&read(&memory, page + 0x202), b"HdrS");
        assert_eq!(read(&memory, page + 0x210), [0xff]);
        assert_eq!(u64::from(u32_at(&memory, page + 0x218)), INITRD.address.0);
        assert_eq!(u64::from(u32_at(&memory, page + 0x21c)), INITRD.size);
        assert_eq!(u32_at(&memory, page + 0xc0), 0);
        assert_eq!(
            u64::from(u32_at(&memory, page + 0x228)),
            layout::COMMAND_LINE
        );
        assert_eq!(u32_at(&memory, page + 0x238), 2047);
        assert_eq!(&read(&memory, layout::COMMAND_LINE), b"quiet\0");
        let setup_data = u64_at(&memory, page + 0x250);
        assert_eq!(u64_at(&memory, setup_data), 0);
        assert_eq!(u32_at(&memory, setup_data + 8), 9);
        assert_eq!(u32_at(&memory, setup_data + 12), 32);
        assert_eq!(read(&memory, setup_data + 16), SEED);
        // The kernel clears much of the page unless this byte is zero.
        assert_eq!(read(&memory, page + 0x1ef), [0]);
        let expected = memory_map(16 * MIB);
        assert_eq!(read(&memory, page + 0x1e8), [expected.len() as u8]);
        for (entry, address) in expected.iter().zip((page + 0x2d0..).step_by(20)) {
            assert_eq!(u64_at(&memory, address), entry.address);
            assert_eq!(u64_at(&memory, address + 8), entry.size);
            let number = if entry.kind == MemoryKind::Ram { 1 } else { 2 };
            assert_eq!(u32_at(&memory, address + 16), number);
        }
    }

    #[test]
    fn zero_page_keeps_the_setup_header_of_a_bzimage() {
        let memory = memory(16 * MIB);
        let header = setup_header {
            version: 0x020f,
            kernel_alignment: 0x20_0000,
            cmdline_size: 4095,
            ..Default::default()
        };
        let page = write(&memory, EntryProtocol::Linux64, Some(header), None).0;
        assert_eq!(read(&memory, page + 0x206), [0x0f, 0x02]);
        assert_eq!(u32_at(&memory, page + 0x230), 0x20_0000);
        assert_eq!(u32_at(&memory, page + 0x238), 4095);
        assert_eq!(read(&memory, page + 0x210), [0xff]);
        assert_eq!(u32_at(&memory, page + 0x218), 0);
    }

    #[test]
    fn command_line_is_limited_by_the_kernel() {
        let memory = memory(16 * MIB);
        let limited_by = |cmdline_size: Option<u32>, length: usize| {
            let header = cmdline_size.map(|cmdline_size| setup_header {
                cmdline_size,
                ..Default::default()
            });
            let information = StartInformation {
                memory_map: &[],
                command_line: &CommandLine::new(&"x".repeat(length)).unwrap(),
                initrd: None,
                rsdp: None,
                random_seed: SEED,
            };
            write_start_information(&memory, &loaded_kernel(MIB, header), &information).is_ok()
        };
        assert!(limited_by(None, 2047) && !limited_by(None, 2048));
        assert!(limited_by(Some(255), 255) && !limited_by(Some(255), 256));
        assert!(limited_by(Some(u32::MAX), 0xffff) && !limited_by(Some(u32::MAX), 0x1_0000));
    }

    #[test]
    fn memory_map_must_fit_into_the_protocol() {
        let memory = memory(16 * MIB);
        let entry = memory_map(16 * MIB)[0];
        for (protocol, limit) in [(EntryProtocol::Pvh, 165), (EntryProtocol::Linux64, 128)] {
            let mut kernel = loaded_kernel(MIB, None);
            kernel.protocol = protocol;
            let write = |count: usize| {
                let information = StartInformation {
                    memory_map: &vec![entry; count],
                    command_line: &CommandLine::default(),
                    initrd: None,
                    rsdp: None,
                    random_seed: SEED,
                };
                write_start_information(&memory, &kernel, &information)
            };
            assert!(write(limit).is_ok());
            assert!(matches!(
                write(limit + 1),
                Err(StartInformationError::MemoryMapTooLong { .. })
            ));
            // Memory after the structure is untouched.
            let after = if protocol == EntryProtocol::Pvh {
                layout::ZERO_PAGE
            } else {
                layout::PML4
            };
            assert_eq!(u64_at(&memory, after), 0);
            memory
                .write_slice(&[0; 0x3000], GuestAddress(layout::PVH_START_INFO))
                .unwrap();
        }
    }

    #[test]
    fn memory_without_room_for_the_structures_is_an_error() {
        let error = write_start_information(
            &memory(0x1000),
            &loaded_kernel(MIB, None),
            &StartInformation {
                memory_map: &[],
                command_line: &CommandLine::default(),
                initrd: None,
                rsdp: None,
                random_seed: SEED,
            },
        )
        .unwrap_err();
        assert!(matches!(error, StartInformationError::Write { .. }));
    }
}
