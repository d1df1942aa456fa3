//! Checks the memory map that the monitor passed, and its RAM: reads and writes both ends of every
//! range.
//!
//! Arguments: `expect-mib=N`, the machine's memory.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use runtime::boot_info::MemoryRange;
use runtime::{BootInfo, arguments, heap, mmio, paging, payload, println, report};

/// The range of a PC's devices: RAM that would be here is above 4 GiB instead.
const DEVICES: core::ops::Range<u64> = 0xfec0_0000..0x1_0000_0000;
const MIB: u64 = 1 << 20;
const PAGE_SIZE: u64 = 4096;
const PAYLOAD_START: u64 = MIB;
/// Size of the areas that monitors reserve: the PC's area for video memory and firmware with the
/// page before it, and page zero.
const LEGACY_AREA_SIZE: u64 = MIB - 0x9_f000 + PAGE_SIZE;

payload!(check_memory);

fn check_memory() {
    let info = BootInfo::get();
    for range in &info.memory {
        println!(
            "{:#012x}..{:#012x} type {}",
            range.address,
            range.end(),
            range.kind
        );
    }
    report::check("no range overlaps another", no_overlap(&info.memory));
    report::check("no RAM where the devices are", no_ram_at_devices());
    report::check("the legacy area is not RAM", no_ram_in_legacy_area());
    if let Some(mib) = arguments::parsed("expect-mib") {
        report::check(format!("the RAM adds up to {mib} MiB"), total_is(mib));
    }
    for range in info.ram() {
        let name = format!("RAM at {:#x} keeps what is written", range.address);
        report::check(name, check_range(range));
    }
    report::check(
        "the ends of RAM are not one another's aliases",
        no_aliases(),
    );
}

fn no_overlap(memory: &[MemoryRange]) -> Result<(), String> {
    // qboot's map has an entry of no bytes.
    let mut sorted: Vec<_> = memory.iter().filter(|range| range.size != 0).collect();
    sorted.sort_unstable_by_key(|range| range.address);
    match sorted
        .windows(2)
        .find(|pair| pair[0].end() > pair[1].address)
    {
        None => Ok(()),
        Some(pair) => Err(format!(
            "{:#x} ends after {:#x} starts",
            pair[0].address, pair[1].address
        )),
    }
}

fn no_ram_in(forbidden: core::ops::Range<u64>) -> Result<(), String> {
    match BootInfo::get()
        .ram()
        .find(|range| range.address < forbidden.end && range.end() > forbidden.start)
    {
        None => Ok(()),
        Some(range) => Err(format!(
            "RAM from {:#x} to {:#x}",
            range.address,
            range.end()
        )),
    }
}

fn no_ram_at_devices() -> Result<(), String> {
    no_ram_in(DEVICES)?;
    arguments::virtio_mmio_windows()
        .try_for_each(|window| no_ram_in(window.address..window.address + window.size))
}

fn no_ram_in_legacy_area() -> Result<(), String> {
    no_ram_in(0xa_0000..0x10_0000)
}

/// Memory under the legacy area and reserved pages count as the machine's, not as RAM.
fn total_is(mib: u64) -> Result<(), String> {
    let total: u64 = BootInfo::get().ram().map(|range| range.size).sum();
    let missing = (mib * MIB)
        .checked_sub(total)
        .ok_or_else(|| format!("{total} bytes are more"))?;
    if missing > LEGACY_AREA_SIZE {
        return Err(format!("the map has {total} bytes of RAM, {missing} fewer"));
    }
    Ok(())
}

/// Returns whether a page belongs to this program or its stacks and tables.
fn in_use(address: u64) -> bool {
    (PAYLOAD_START..heap::end()).contains(&address)
}

/// First and last whole page of every RAM range, except this program's own.
fn edge_pages(range: MemoryRange) -> impl Iterator<Item = u64> {
    let first = range.address.next_multiple_of(PAGE_SIZE);
    let last = (range.end() & !(PAGE_SIZE - 1))
        .saturating_sub(PAGE_SIZE)
        .max(first);
    let first_free = if in_use(first) {
        heap::end().next_multiple_of(PAGE_SIZE)
    } else {
        first
    };
    [first_free, last].into_iter().filter(|&page| !in_use(page))
}

fn check_range(range: MemoryRange) -> Result<(), String> {
    paging::map(range.address, range.size);
    for page in edge_pages(range) {
        for address in (page..page + PAGE_SIZE).step_by(8) {
            for pattern in [!address, address.rotate_left(32), 0x5555_5555_5555_5555] {
                // SAFETY: RAM that holds nothing this program needs, and its bytes are put back.
                let read = unsafe {
                    let before = mmio::read_64(address);
                    mmio::write_64(address, pattern);
                    let read = mmio::read_64(address);
                    mmio::write_64(address, before);
                    read
                };
                if read != pattern {
                    return Err(format!("{address:#x} has {read:#x} and not {pattern:#x}"));
                }
            }
        }
    }
    Ok(())
}

/// Marks every edge page, then checks that each page still has its own mark.
fn no_aliases() -> Result<(), String> {
    let pages: Vec<u64> = BootInfo::get().ram().flat_map(edge_pages).collect();
    // SAFETY: RAM that holds nothing this program needs, and its bytes are put back, in reverse
    // order so that of a page that is listed twice the first bytes win.
    unsafe {
        let before: Vec<u64> = pages.iter().map(|&page| mmio::read_64(page)).collect();
        for &page in &pages {
            mmio::write_64(page, page ^ u64::MAX);
        }
        let alias = pages
            .iter()
            .copied()
            .find(|&page| mmio::read_64(page) != page ^ u64::MAX);
        for (&page, &bytes) in pages.iter().zip(&before).rev() {
            mmio::write_64(page, bytes);
        }
        match alias {
            None => Ok(()),
            Some(page) => Err(format!("the mark of {page:#x} is gone")),
        }
    }
}
