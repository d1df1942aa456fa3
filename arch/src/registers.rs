//! Registers of the boot vCPU, and the tables in guest memory that they point to.
//!
//! The other vCPUs wait for the guest to start them, and keep the state that KVM gave them.

use bantam_memory::GuestMemory;
use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use crate::EntryProtocol;
use crate::error::{Result, write_memory};
use crate::layout::{
    BOOT_STACK, GDT, IDENTITY_MAP_GIB, PAGE_DIRECTORIES, PDPT, PML4, PVH_START_INFO, ZERO_PAGE,
};

/// The one bit of RFLAGS that is always set; interrupts are disabled.
const RFLAGS_RESERVED: u64 = 1 << 1;

const CR0_PROTECTED_MODE: u64 = 1 << 0;
/// Reads as one on every x86-64 processor.
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;

/// `__BOOT_CS` of the Linux boot protocol.
const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS` of the Linux boot protocol.
const DATA_SELECTOR: u16 = 0x18;
const GDT_ENTRY_COUNT: usize = 4;
const GDT_SIZE: usize = GDT_ENTRY_COUNT * size_of::<u64>();

/// Segment types (Intel SDM volume 3, "Code- and Data-Segment Descriptor Types" and "System
/// Descriptor Types").
const TYPE_DATA_READ_WRITE_ACCESSED: u8 = 0x3;
const TYPE_CODE_EXECUTE_READ_ACCESSED: u8 = 0xb;
const TYPE_TASK_STATE_BUSY: u8 = 0xb;
/// Limit of the smallest task state segment, as PVH requires.
const TASK_STATE_LIMIT: u32 = 0x67;

const PAGE_TABLE_ENTRY_COUNT: u64 = 512;
const PAGE_TABLE_SIZE: u64 = 4096;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;

/// Returns the general registers of a boot vCPU that starts at the guest-physical address `entry`.
///
/// PVH expects the address of its start info in RBX; the 64-bit Linux entry expects that of the
/// zero page in RSI. Neither requires a stack; there is one for the convenience of the entry code.
pub fn general_registers(entry: u64, protocol: EntryProtocol) -> kvm_regs {
    let registers = kvm_regs {
        rip: entry,
        rsp: BOOT_STACK,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match protocol {
        EntryProtocol::Pvh => kvm_regs {
            rbx: PVH_START_INFO,
            ..registers
        },
        EntryProtocol::Linux64 => kvm_regs {
            rsi: ZERO_PAGE,
            ..registers
        },
    }
}

/// Returns the special registers of the boot vCPU, made from the `initial` ones of `KVM_GET_SREGS`,
/// which contain the address of its local APIC and that it is the boot processor.
///
/// All segments are flat. There is no interrupt descriptor table: the guest brings its own.
/// [`write_boot_tables`] writes the tables that these registers point to.
pub fn special_registers(initial: kvm_sregs, protocol: EntryProtocol) -> kvm_sregs {
    let protected_mode = CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE;
    let (cr0, cr3, cr4, efer) = match protocol {
        EntryProtocol::Pvh => (protected_mode, 0, 0, 0),
        EntryProtocol::Linux64 => (
            protected_mode | CR0_PAGING,
            PML4,
            CR4_PHYSICAL_ADDRESS_EXTENSION,
            EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE,
        ),
    };
    let data = data_segment();
    kvm_sregs {
        cs: code_segment(protocol),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_state_segment(),
        gdt: kvm_dtable {
            base: GDT,
            limit: (GDT_SIZE - 1) as u16,
            ..Default::default()
        },
        idt: kvm_dtable::default(),
        cr0,
        cr3,
        cr4,
        efer,
        ..initial
    }
}

/// Returns the floating-point state after `FNINIT`, with SSE exceptions masked.
pub fn floating_point_state() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

/// Writes the tables that [`special_registers`] points to: the global descriptor table, and for
/// the 64-bit Linux entry an identity map of the first 4 GiB in pages of 2 MiB.
///
/// # Errors
/// If the guest has no memory at their addresses.
pub fn write_boot_tables(memory: &GuestMemory, protocol: EntryProtocol) -> Result<()> {
    let gdt: [u64; GDT_ENTRY_COUNT] = [
        0,
        0,
        descriptor(&code_segment(protocol)),
        descriptor(&data_segment()),
    ];
    write_table(memory, "global descriptor table", GDT, gdt)?;
    match protocol {
        EntryProtocol::Pvh => Ok(()),
        EntryProtocol::Linux64 => write_identity_map(memory),
    }
}

fn write_identity_map(memory: &GuestMemory) -> Result<()> {
    let table = |address: u64| address | PAGE_PRESENT | PAGE_WRITABLE;
    let page_directories =
        (0..IDENTITY_MAP_GIB).map(|gib| table(PAGE_DIRECTORIES + gib * PAGE_TABLE_SIZE));
    let pages = (0..IDENTITY_MAP_GIB * PAGE_TABLE_ENTRY_COUNT)
        .map(|page| table(page * LARGE_PAGE_SIZE) | PAGE_LARGE);

    write_page_tables(memory, PML4, [table(PDPT)])?;
    write_page_tables(memory, PDPT, page_directories)?;
    write_page_tables(memory, PAGE_DIRECTORIES, pages)
}

/// Fills whole page tables from `address` on; entries beyond `entries` are not present.
fn write_page_tables(
    memory: &GuestMemory,
    address: u64,
    entries: impl IntoIterator<Item = u64>,
) -> Result<()> {
    let mut entries: Vec<u64> = entries.into_iter().collect();
    let whole = entries
        .len()
        .next_multiple_of(PAGE_TABLE_ENTRY_COUNT as usize);
    entries.resize(whole, 0);
    write_table(memory, "page tables", address, entries)
}

fn write_table(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    entries: impl IntoIterator<Item = u64>,
) -> Result<()> {
    let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
    write_memory(memory, what, address, &bytes)
}

fn code_segment(protocol: EntryProtocol) -> kvm_segment {
    let is_64_bit = protocol == EntryProtocol::Linux64;
    kvm_segment {
        type_: TYPE_CODE_EXECUTE_READ_ACCESSED,
        db: u8::from(!is_64_bit),
        l: u8::from(is_64_bit),
        ..flat_segment(CODE_SELECTOR)
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        type_: TYPE_DATA_READ_WRITE_ACCESSED,
        db: 1,
        ..flat_segment(DATA_SELECTOR)
    }
}

/// Returns the common part of the flat code and data segments: all of 4 GiB, for ring 0.
fn flat_segment(selector: u16) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Returns the task state segment that a processor needs to enter the guest. Nothing switches
/// tasks, so it has no descriptor to be loaded from again.
fn task_state_segment() -> kvm_segment {
    kvm_segment {
        limit: TASK_STATE_LIMIT,
        type_: TYPE_TASK_STATE_BUSY,
        present: 1,
        ..Default::default()
    }
}

/// Returns the descriptor from which a segment is loaded (Intel SDM volume 3, "Segment
/// Descriptors").
fn descriptor(segment: &kvm_segment) -> u64 {
    let base = segment.base;
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    (limit & 0xffff)
        | ((base & 0xff_ffff) << 16)
        | (u64::from(segment.type_) << 40)
        | (u64::from(segment.s) << 44)
        | (u64::from(segment.dpl) << 45)
        | (u64::from(segment.present) << 47)
        | ((limit >> 16 & 0xf) << 48)
        | (u64::from(segment.avl) << 52)
        | (u64::from(segment.l) << 53)
        | (u64::from(segment.db) << 54)
        | (u64::from(segment.g) << 55)
        | ((base >> 24 & 0xff) << 56)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use vm_memory::{Bytes, GuestAddress};

    fn memory(size: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap()
    }

    fn read(memory: &GuestMemory, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn initial() -> kvm_sregs {
        kvm_sregs {
            cr0: 0x6000_0010,
            cr4: 0xffff,
            efer: 0xffff,
            apic_base: 0xfee0_0900,
            ..Default::default()
        }
    }

    #[test]
    fn pvh_enters_flat_protected_mode() {
        let general = general_registers(0x100_0000, EntryProtocol::Pvh);
        assert_eq!(general.rip, 0x100_0000);
        assert_eq!(general.rbx, PVH_START_INFO);
        assert_eq!(general.rflags, 2);

        let special = special_registers(initial(), EntryProtocol::Pvh);
        assert_eq!(special.cr0, 0x11);
        assert_eq!((special.cr3, special.cr4, special.efer), (0, 0, 0));
        let cs = special.cs;
        assert_eq!((cs.base, cs.limit), (0, 0xffff_ffff));
        assert_eq!((cs.type_, cs.db, cs.l, cs.g, cs.s), (0xb, 1, 0, 1, 1));
        for segment in [special.ds, special.es, special.ss] {
            assert_eq!((segment.base, segment.limit), (0, 0xffff_ffff));
            assert_eq!((segment.type_, segment.db, segment.g), (3, 1, 1));
        }
        assert_eq!((special.tr.base, special.tr.limit), (0, 0x67));
        assert_eq!(
            (special.tr.type_, special.tr.s, special.tr.present),
            (0xb, 0, 1)
        );
    }

    #[test]
    fn linux_enters_long_mode_with_its_own_selectors() {
        let general = general_registers(0x100_0200, EntryProtocol::Linux64);
        assert_eq!(general.rip, 0x100_0200);
        assert_eq!(general.rsi, ZERO_PAGE);
        assert_eq!(general.rflags, 2);

        let special = special_registers(initial(), EntryProtocol::Linux64);
        assert_eq!(special.cr0, 0x8000_0011);
        assert_eq!(special.cr3, PML4);
        assert_eq!(special.cr4, 0x20);
        assert_eq!(special.efer, 0x500);
        assert_eq!(special.cs.selector, 0x10);
        assert_eq!((special.cs.l, special.cs.db), (1, 0));
        for segment in [special.ds, special.es, special.ss] {
            assert_eq!(segment.selector, 0x18);
        }
    }

    #[test]
    fn the_boot_processor_stays_one() {
        for protocol in [EntryProtocol::Pvh, EntryProtocol::Linux64] {
            assert_eq!(
                special_registers(initial(), protocol).apic_base,
                0xfee0_0900
            );
        }
    }

    #[test]
    fn selectors_load_what_the_registers_hold() {
        for (protocol, code) in [
            (EntryProtocol::Pvh, 0x00cf_9b00_0000_ffff),
            (EntryProtocol::Linux64, 0x00af_9b00_0000_ffff_u64),
        ] {
            let memory = memory(1 << 20);
            write_boot_tables(&memory, protocol).unwrap();
            let special = special_registers(initial(), protocol);
            let load = |selector: u16| {
                assert!(selector + 7 <= special.gdt.limit);
                read(&memory, special.gdt.base + u64::from(selector))
            };
            assert_eq!(load(0), 0);
            assert_eq!(load(special.cs.selector), code);
            assert_eq!(load(special.ss.selector), 0x00cf_9300_0000_ffff);
        }
    }

    #[test]
    fn descriptor_splits_base_and_limit() {
        let segment = kvm_segment {
            base: 0x1234_5678,
            limit: 0x9_abcd,
            type_: 3,
            s: 1,
            present: 1,
            dpl: 3,
            ..Default::default()
        };
        assert_eq!(descriptor(&segment), 0x1209_f334_5678_abcd);
    }

    #[test]
    fn identity_map_covers_4_gib_and_no_more() {
        let memory = memory(1 << 20);
        memory
            .write_slice(&[0xff; 6 * 4096], GuestAddress(PML4))
            .unwrap();
        write_boot_tables(&memory, EntryProtocol::Linux64).unwrap();
        let cr3 = special_registers(initial(), EntryProtocol::Linux64).cr3;
        let walk = |address: u64| -> Option<u64> {
            let mut table = cr3;
            for (shift, is_last) in [(39, false), (30, false), (21, true)] {
                let entry = read(&memory, table + (address >> shift & 0x1ff) * 8);
                if entry & 1 == 0 {
                    return None;
                }
                assert_eq!(entry & 2, 2, "not writable at {address:#x}");
                assert_eq!(entry & 0x80 != 0, is_last);
                table = entry & 0x000f_ffff_ffff_f000;
            }
            Some(table | address & 0x1f_ffff)
        };
        for address in (0..4 << 30).step_by(2 << 20).map(|page| page + 0x12345) {
            assert_eq!(walk(address), Some(address));
        }
        for address in [4 << 30, 1 << 39, 0xffff_8000_0000_0000] {
            assert_eq!(walk(address), None, "{address:#x}");
        }
    }

    #[test]
    fn memory_too_small_for_the_tables_is_an_error() {
        let error = write_boot_tables(&memory(0xa000), EntryProtocol::Linux64).unwrap_err();
        assert!(matches!(error, Error::WriteMemory { address: PDPT, .. }));
    }
}
