//! The boot information from the monitor: command line, memory map and ACPI root pointer, from the
//! PVH start info (Xen's docs/misc/pvh) or the zero page (Documentation/arch/x86/boot.rst and
//! zero-page.rst), copied before anything can overwrite it.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicPtr, Ordering};

use alloc::boxed::Box;

use crate::heap;

const PVH_MAGIC: u32 = 0x336e_c578;
const COMMAND_LINE_MAX_SIZE: usize = 0x1_0000;

/// `struct hvm_start_info`, version 1.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `struct hvm_memmap_table_entry`; its first three fields are also `struct boot_e820_entry`.
#[repr(C)]
struct StartInfoMemory {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Offsets in `struct boot_params`.
mod zero_page {
    pub const ACPI_RSDP: u64 = 0x070;
    pub const COMMAND_LINE_HIGH: u64 = 0x0c8;
    pub const E820_ENTRIES: u64 = 0x1e8;
    pub const COMMAND_LINE_LOW: u64 = 0x228;
    pub const E820_TABLE: u64 = 0x2d0;
    pub const E820_ENTRY_SIZE: u64 = 20;
    pub const E820_MAX_ENTRIES: u8 = 128;
}

/// The way the monitor started this payload.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum BootProtocol {
    /// PVH: 32-bit protected mode.
    Pvh,
    /// The 64-bit Linux boot protocol.
    Linux64,
}

impl fmt::Display for BootProtocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Pvh => "pvh",
            Self::Linux64 => "linux64",
        })
    }
}

/// One entry of the memory map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
    /// Its type: [`RAM`](Self::RAM), or another type of the E820 map.
    pub kind: u32,
}

impl MemoryRange {
    /// Type of usable memory in both protocols.
    pub const RAM: u32 = 1;

    /// First address after the range.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.size)
    }
}

/// The information that the monitor passed.
pub struct BootInfo {
    /// How it started the payload.
    pub protocol: BootProtocol,
    /// Command line, without its NUL; bytes that are not UTF-8 are replaced.
    pub command_line: String,
    /// Memory map in the monitor's order.
    pub memory: Vec<MemoryRange>,
    /// Guest-physical address of the ACPI root pointer, if it was passed.
    pub rsdp: Option<u64>,
}

static BOOT_INFO: AtomicPtr<BootInfo> = AtomicPtr::new(core::ptr::null_mut());

impl BootInfo {
    /// Returns the information that the monitor passed to this payload.
    pub fn get() -> &'static Self {
        let pointer = BOOT_INFO.load(Ordering::Acquire);
        assert!(!pointer.is_null(), "the boot information is not read yet");
        // SAFETY: `read` stored it once, from a box that is never freed.
        unsafe { &*pointer }
    }

    /// Returns the ranges of usable memory.
    pub fn ram(&self) -> impl Iterator<Item = MemoryRange> {
        self.memory
            .iter()
            .copied()
            .filter(|range| range.kind == MemoryRange::RAM)
    }
}

/// Reads the information that the monitor passed, and gives the heap the memory after the payload's
/// image.
///
/// # Safety
///
/// `protocol` and `information` are what `assembly/entry.s` was entered with, and what they point
/// to has not been overwritten. Call once.
pub(crate) unsafe fn read(protocol: u64, information: u64) {
    // SAFETY: as the caller promises.
    let info = unsafe {
        match protocol {
            0 => read_start_info(information),
            _ => read_zero_page(information),
        }
    };
    BOOT_INFO.store(Box::into_raw(Box::new(info)), Ordering::Release);
}

unsafe fn read_start_info(address: u64) -> BootInfo {
    // SAFETY: the protocol says that EBX held the address of this structure.
    let info = unsafe { (address as *const StartInfo).read_unaligned() };
    assert!(
        info.magic == PVH_MAGIC,
        "PVH start info at {address:#x} has no magic number"
    );
    assert!(
        info.version >= 1,
        "PVH start info version {} has no memory map",
        info.version
    );
    // SAFETY: the memory map has this many entries of this size.
    let entry = |index: u32| unsafe {
        (info.memory_map as *const StartInfoMemory)
            .add(index as usize)
            .read_unaligned()
    };
    let ranges = (0..info.memory_map_entries).map(|index| {
        let StartInfoMemory {
            address,
            size,
            kind,
            ..
        } = entry(index);
        MemoryRange {
            address,
            size,
            kind,
        }
    });
    heap::initialise(ranges.clone());
    BootInfo {
        protocol: BootProtocol::Pvh,
        // SAFETY: the protocol says that this is the address of a NUL-terminated string or zero.
        command_line: unsafe { read_command_line(info.command_line) },
        memory: ranges.collect(),
        rsdp: (info.rsdp != 0).then_some(info.rsdp),
    }
}

unsafe fn read_zero_page(address: u64) -> BootInfo {
    // SAFETY: the zero page is one page of memory, and every offset is inside it.
    let (count, command_line, rsdp) = unsafe {
        (
            *((address + zero_page::E820_ENTRIES) as *const u8),
            u64::from(((address + zero_page::COMMAND_LINE_LOW) as *const u32).read_unaligned())
                | u64::from(
                    ((address + zero_page::COMMAND_LINE_HIGH) as *const u32).read_unaligned(),
                ) << 32,
            ((address + zero_page::ACPI_RSDP) as *const u64).read_unaligned(),
        )
    };
    let ranges = (0..count.min(zero_page::E820_MAX_ENTRIES)).map(|index| {
        let entry = address + zero_page::E820_TABLE + u64::from(index) * zero_page::E820_ENTRY_SIZE;
        // SAFETY: an entry of the table, which has no more than its maximum of entries.
        unsafe {
            MemoryRange {
                address: (entry as *const u64).read_unaligned(),
                size: ((entry + 8) as *const u64).read_unaligned(),
                kind: ((entry + 16) as *const u32).read_unaligned(),
            }
        }
    });
    heap::initialise(ranges.clone());
    BootInfo {
        protocol: BootProtocol::Linux64,
        // SAFETY: the protocol says that this is the address of a NUL-terminated string or zero.
        command_line: unsafe { read_command_line(command_line) },
        memory: ranges.collect(),
        rsdp: (rsdp != 0).then_some(rsdp),
    }
}

unsafe fn read_command_line(address: u64) -> String {
    if address == 0 {
        return String::new();
    }
    let bytes: Vec<u8> = (0..COMMAND_LINE_MAX_SIZE)
        // SAFETY: bytes of the string up to its NUL.
        .map(|offset| unsafe { *(address as *const u8).add(offset) })
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
