//! A driver's statistics on the guest's memory (section 5.5.6.3).

use bantam_memory::GuestBuffers;
use serde::{Deserialize, Serialize};

/// Size of an entry in bytes: a tag of 16 bits and a value of 64.
const ENTRY_SIZE: usize = 10;
/// Most entries that are read: many times the number of tags.
const MAX_ENTRIES: usize = 256;

/// Statistics on a guest's memory, as far as its driver provides them. Linux counts events since boot.
///
/// The last six are not in the standard, but newer Linux versions (6.12 for one) provide them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GuestStatistics {
    /// Bytes swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults for which something had to be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults. In the standard these are only the minor ones, but Linux counts all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes that are not in use for anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// Bytes of memory that the guest has in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes available to new programs without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes of caches that could be reclaimed quickly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages that were allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Times that the guest had to kill a process because it was out of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    /// Times that an allocation had to wait for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    /// Bytes scanned in the background for reclaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    /// The same while an allocation waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    /// Bytes that were reclaimed in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    /// The same while an allocation waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

impl GuestStatistics {
    /// Reads the statistics in a driver's buffer. Entries with unknown tags and an incomplete entry at the
    /// end are left out.
    pub(super) fn read(buffer: &mut GuestBuffers) -> GuestStatistics {
        let mut statistics = GuestStatistics::default();
        for _ in 0..MAX_ENTRIES {
            let Some([t0, t1, value @ ..]) = buffer.read_array::<ENTRY_SIZE>() else {
                break;
            };
            if let Some(field) = statistics.field(u16::from_le_bytes([t0, t1])) {
                *field = Some(u64::from_le_bytes(value));
            }
        }
        statistics
    }

    /// Returns the field for values with this tag (section 5.5.6.4).
    fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            10 => &mut self.oom_kill,
            11 => &mut self.alloc_stall,
            12 => &mut self.async_scan,
            13 => &mut self.direct_scan,
            14 => &mut self.async_reclaim,
            15 => &mut self.direct_reclaim,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bantam_memory::GuestMemory;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn read(bytes: &[u8]) -> GuestStatistics {
        let regions = [(GuestAddress(0), 0x2000)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        memory.write_slice(bytes, GuestAddress(0)).unwrap();
        let mut buffer = GuestBuffers::new(memory);
        // In two parts, with an entry across both.
        let first = bytes.len().min(25) as u32;
        buffer.push(GuestAddress(0), first).unwrap();
        let rest = bytes.len() as u32 - first;
        buffer.push(GuestAddress(first.into()), rest).unwrap();
        GuestStatistics::read(&mut buffer)
    }

    fn entries(entries: impl IntoIterator<Item = (u16, u64)>) -> Vec<u8> {
        entries
            .into_iter()
            .flat_map(|(tag, value)| {
                let (tag, value) = (tag.to_le_bytes(), value.to_le_bytes());
                tag.into_iter().chain(value)
            })
            .collect()
    }

    #[test]
    fn every_tag_has_its_field() {
        // In the order of the tags, as serde keeps the order of the fields.
        let names = "swap_in swap_out major_faults minor_faults free_memory total_memory \
                     available_memory disk_caches hugetlb_allocations hugetlb_failures oom_kill \
                     alloc_stall async_scan direct_scan async_reclaim direct_reclaim";
        let expected: Vec<String> = names
            .split_whitespace()
            .enumerate()
            .map(|(tag, name)| format!("\"{name}\":{}", (1_u64 << 40) + tag as u64))
            .collect();
        let all = (0..16).rev().map(|tag| (tag, (1 << 40) + u64::from(tag)));
        assert_eq!(
            serde_json::to_string(&read(&entries(all))).unwrap(),
            format!("{{{}}}", expected.join(","))
        );
    }

    #[test]
    fn unknown_tags_and_parts_of_entries_are_left_out() {
        let mut bytes = entries([(16, 1), (4, 0), (u16::MAX, 2), (5, u64::MAX)]);
        bytes.extend([6, 0, 1]);
        let expected = GuestStatistics {
            free_memory: Some(0),
            total_memory: Some(u64::MAX),
            ..GuestStatistics::default()
        };
        assert_eq!(read(&bytes), expected);
        assert_eq!(read(&[]), GuestStatistics::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
            read(&bytes);
        }
    }
}
