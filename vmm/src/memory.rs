//! Reserves guest memory in the pages that the configuration asks for.

use std::fs;

use bantam_arch::memory_map::ram_regions;
use bantam_memory::{Backing, GuestMemory, MapError};
use bantam_state::RestoreError;
use vm_memory::GuestAddress;

use crate::config::{HugePages, MachineConfig};
use crate::error::Error;

/// Where the kernel reports its pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Reserves guest memory, filled with zeros.
///
/// # Errors
/// If the host has too little memory, or too few of the pages asked for.
pub(crate) fn allocate_memory(config: &MachineConfig) -> Result<GuestMemory, Error> {
    let size = config.memory.bytes();
    let regions = ram_regions(size).into_iter();
    let regions: Vec<_> = regions
        .map(|(start, size)| (GuestAddress(start), size as usize))
        .collect();
    let backing = match config.huge_pages {
        HugePages::None => Backing::Anonymous,
        HugePages::Transparent => Backing::TransparentHugePages,
        HugePages::TwoMib => Backing::HugePages,
    };
    GuestMemory::new(&regions, backing).map_err(|error| match error {
        // What was mapped before the failure counts as free, because it has been given back.
        MapError::HugePages(source) => Error::HugePages {
            mib: size >> 20,
            source,
            remedy: remedy(size / HugePages::TwoMib.page_size()),
        },
        MapError::TransparentHugePages(source) => Error::TransparentHugePages(source),
        error => Error::Memory {
            mib: size >> 20,
            reason: error.to_string(),
        },
    })
}

/// Checks that `memory` has the regions of a machine built from `config`.
///
/// # Errors
/// If its regions differ.
pub(crate) fn check_layout(
    memory: &GuestMemory,
    config: &MachineConfig,
) -> Result<(), RestoreError> {
    check_regions(memory.regions().map(|it| (it.start.0, it.len)), config)
}

/// Checks that these regions, given by address and size in bytes, are those of a machine built from `config`.
///
/// # Errors
/// If they differ.
pub(crate) fn check_regions(
    regions: impl Iterator<Item = (u64, u64)>,
    config: &MachineConfig,
) -> Result<(), RestoreError> {
    if regions.eq(ram_regions(config.memory.bytes())) {
        return Ok(());
    }
    let mib = config.memory.bytes() >> 20;
    Err(RestoreError::Invalid {
        kind: "memory".to_owned(),
        reason: format!("it is not that of a machine with {mib} MiB"),
    })
}

/// Says what to do so that there are `needed` pages.
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
        // Of 50 pages, 10 are in use and 25 of the others are reserved.
        let text = advice(128, 50, 40, 25);
        assert!(text.contains("128 pages and 15 are free"), "{text}");
        assert!(text.ends_with("'sysctl vm.nr_hugepages=163'"), "{text}");
        let text = advice(4, 50, 40, 25);
        assert!(text.contains("control group"), "{text}");
    }
}
