//! Guest memory, made of the pages that the configuration asks for.

use std::fs;
use std::io;

use bantam_arch::memory_map::ram_regions;
use bantam_devices::GuestMemory;
use bantam_state::RestoreError;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::config::{HugePages, MachineConfig};
use crate::error::Error;

/// Where the kernel tells of its pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Reserves guest memory, all zero.
///
/// # Errors
/// When the host has too little, or too few of the pages asked for.
pub(crate) fn allocate_memory(config: &MachineConfig) -> Result<GuestMemory, Error> {
    let size = config.memory.bytes();
    let regions = ram_regions(size).into_iter();
    let regions = regions.map(|(start, size)| (GuestAddress(start), size as usize));
    match config.huge_pages {
        HugePages::None => ordinary_pages(size, regions),
        HugePages::Transparent => {
            let memory = ordinary_pages(size, regions)?;
            ask_for_transparent_huge_pages(&memory).map_err(Error::TransparentHugePages)?;
            Ok(memory)
        }
        HugePages::TwoMib => pages_of_2_mib(size, regions),
    }
}

/// Checks that `memory` is where and as large as that of a machine made by `config`.
///
/// # Errors
/// When it is not.
pub(crate) fn check_layout(
    memory: &GuestMemory,
    config: &MachineConfig,
) -> Result<(), RestoreError> {
    let ranges = memory.iter().map(|it| (it.start_addr().0, it.len()));
    if ranges.eq(ram_regions(config.memory.bytes())) {
        return Ok(());
    }
    let mib = config.memory.bytes() >> 20;
    Err(RestoreError::Invalid {
        kind: "memory".to_owned(),
        reason: format!("it is not that of a machine with {mib} MiB"),
    })
}

fn too_little(size: u64, reason: &dyn std::fmt::Display) -> Error {
    Error::Memory {
        mib: size >> 20,
        reason: reason.to_string(),
    }
}

fn ordinary_pages(
    size: u64,
    regions: impl Iterator<Item = (GuestAddress, usize)>,
) -> Result<GuestMemory, Error> {
    let regions: Vec<_> = regions.collect();
    GuestMemory::from_ranges(&regions).map_err(|error| too_little(size, &error))
}

fn ask_for_transparent_huge_pages(memory: &GuestMemory) -> io::Result<()> {
    for region in memory.iter() {
        let size = region.len() as usize;
        // SAFETY: the range is one mapping of this size, whose content the advice leaves alone.
        let result = unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Without `MAP_NORESERVE` the kernel either keeps as many pages for the mapping as it takes or refuses
/// it, so that no access finds none left.
fn pages_of_2_mib(
    size: u64,
    regions: impl Iterator<Item = (GuestAddress, usize)>,
) -> Result<GuestMemory, Error> {
    let mut mapped = Vec::new();
    for (start, region_size) in regions {
        let region = MmapRegionBuilder::new(region_size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            )
            .with_hugetlbfs(true)
            .build();
        let region = region.map_err(|error| match error {
            vm_memory::mmap::MmapRegionError::Mmap(source) => {
                // What was mapped before counts as free, as it is given back.
                drop(std::mem::take(&mut mapped));
                Error::HugePages {
                    mib: size >> 20,
                    source,
                    remedy: remedy(size / HugePages::TwoMib.page_size()),
                }
            }
            error => too_little(size, &error),
        })?;
        let region = GuestRegionMmap::new(region, start)
            .ok_or_else(|| too_little(size, &"it does not fit into the guest's address space"))?;
        mapped.push(region);
    }
    GuestMemory::from_regions(mapped).map_err(|error| too_little(size, &error))
}

/// What to do so that there are `needed` pages.
fn remedy(needed: u64) -> String {
    let count = |name| {
        let text = fs::read_to_string(format!("{POOL}/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    match (
        count("nr_hugepages"),
        count("free_hugepages"),
        count("resv_hugepages"),
    ) {
        (Some(total), Some(free), Some(reserved)) => advice(needed, total, free, reserved),
        _ => "this host has no pages of that size: use other ones".to_string(),
    }
}

fn advice(needed: u64, total: u64, free: u64, reserved: u64) -> String {
    let available = free.saturating_sub(reserved);
    if needed <= available {
        return format!(
            "{available} of {needed} pages are there, but not for this process: see its control \
             group's limits (hugetlb)"
        );
    }
    let wanted = total + (needed - available);
    format!(
        "it takes {needed} pages and {available} are free: set aside more by 'sysctl \
         vm.nr_hugepages={wanted}'"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_is_as_many_pages_as_are_missing() {
        let text = advice(128, 0, 0, 0);
        assert!(text.ends_with("'sysctl vm.nr_hugepages=128'"), "{text}");
        // Of 50 pages 10 are used, 25 of the others are kept for somebody.
        let text = advice(128, 50, 40, 25);
        assert!(text.contains("128 pages and 15 are free"), "{text}");
        assert!(text.ends_with("'sysctl vm.nr_hugepages=163'"), "{text}");
        let text = advice(4, 50, 40, 25);
        assert!(text.contains("control group"), "{text}");
    }
}
