//! The layout of guest memory, for the monitor that maps it and for the memory map that the guest
//! gets.

use crate::layout::{
    CONVENTIONAL_MEMORY, CONVENTIONAL_MEMORY_END, DEVICE_HOLE, DEVICE_HOLE_END, HIGH_MEMORY,
};

/// The kinds of ranges in the guest's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Memory the guest may use as it likes (E820 type 1).
    Ram,
    /// Memory the guest may read but not reuse: firmware tables (E820 type 2).
    Reserved,
}

/// One range of the memory map a guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Size in bytes, never zero.
    pub size: u64,
    /// What the range may be used for.
    pub kind: MemoryKind,
}

impl MemoryMapEntry {
    fn new(range: std::ops::Range<u64>, kind: MemoryKind) -> Self {
        Self {
            address: range.start,
            size: range.end - range.start,
            kind,
        }
    }
}

/// Returns the ranges of guest-physical memory that are backed by host memory, as `(start, size)`
/// in bytes and in ascending order: RAM starts at address zero, and the part that would reach into
/// the device hole is above 4 GiB instead.
///
/// The sizes add up to `memory_size`.
pub fn ram_regions(memory_size: u64) -> Vec<(u64, u64)> {
    let low = memory_size.min(DEVICE_HOLE);
    [(0, low), (DEVICE_HOLE_END, memory_size - low)]
        .into_iter()
        .filter(|&(_, size)| size > 0)
        .collect()
}

/// Returns the memory map of a guest with `memory_size` bytes, in ascending order.
///
/// It follows [`ram_regions`], less page zero and the firmware area below 1 MiB. `memory_size` is
/// between [`MIN_MEMORY_SIZE`](crate::layout::MIN_MEMORY_SIZE) and
/// [`MAX_MEMORY_SIZE`](crate::layout::MAX_MEMORY_SIZE).
///
/// It has few ranges on purpose: Linux scans the map thousands of times while it sets up its page
/// tables, and adds a range of its own for page zero unless the map leaves that page out.
pub fn memory_map(memory_size: u64) -> Vec<MemoryMapEntry> {
    let mut map = vec![
        MemoryMapEntry::new(
            CONVENTIONAL_MEMORY..CONVENTIONAL_MEMORY_END,
            MemoryKind::Ram,
        ),
        MemoryMapEntry::new(CONVENTIONAL_MEMORY_END..HIGH_MEMORY, MemoryKind::Reserved),
    ];
    for (start, size) in ram_regions(memory_size) {
        let usable = start.max(HIGH_MEMORY)..start + size;
        if !usable.is_empty() {
            map.push(MemoryMapEntry::new(usable, MemoryKind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{MAX_MEMORY_SIZE, MIN_MEMORY_SIZE};
    use proptest::prelude::*;

    #[test]
    fn small_memory_ends_below_the_device_hole() {
        assert_eq!(ram_regions(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ram_regions(DEVICE_HOLE), [(0, DEVICE_HOLE)]);
    }

    #[test]
    fn memory_beyond_the_hole_goes_above_4_gib() {
        assert_eq!(
            ram_regions(DEVICE_HOLE + 4096),
            [(0, DEVICE_HOLE), (1 << 32, 4096)]
        );
    }

    #[test]
    fn guest_map_of_8_gib() {
        let entry = |address, end, kind| MemoryMapEntry::new(address..end, kind);
        assert_eq!(
            memory_map(8 << 30),
            [
                entry(0x1000, 0x9_f000, MemoryKind::Ram),
                entry(0x9_f000, 0x10_0000, MemoryKind::Reserved),
                entry(0x10_0000, 0xc000_0000, MemoryKind::Ram),
                entry(0x1_0000_0000, 0x2_4000_0000, MemoryKind::Ram),
            ]
        );
    }

    proptest! {
        #[test]
        fn guest_map_is_ordered_and_backed(size in MIN_MEMORY_SIZE..=MAX_MEMORY_SIZE) {
            let regions = ram_regions(size);
            prop_assert_eq!(regions.iter().map(|&(_, size)| size).sum::<u64>(), size);
            let mut end = 0;
            for entry in memory_map(size) {
                prop_assert!(entry.address >= end);
                prop_assert!(entry.size > 0);
                end = entry.address + entry.size;
                prop_assert!(
                    regions.iter().any(|&(start, size)| entry.address >= start && end <= start + size)
                );
            }
            let (last_start, last_size) = regions[regions.len() - 1];
            prop_assert_eq!(end, last_start + last_size);
        }
    }
}
