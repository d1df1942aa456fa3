//! Places for writes, found without a wait for the host's storage.
//!
//! A cluster of the reserve reads as zeroes, so it can replace what reads as zeroes before it has any data: who
//! reads it meanwhile sees what was there before, and so does a crash.

use std::io;
use std::ops::Range;

use super::Qcow2;
use super::entry::L2Entry;
use super::locks::lock;
use super::tables::NewEntry;
use crate::{Allocation, Extent};

impl Qcow2 {
    /// [`Image::allocate`](crate::Image::allocate).
    pub(super) fn allocate_range(&self, range: Range<u64>) -> Option<Allocation> {
        if range.is_empty() {
            return None;
        }
        let geometry = self.geometry;
        let end = self.piece_end(&range);
        let clusters = geometry.clusters(range.start..end);
        let first = clusters.start;
        let _guard = self.ranges.try_exclusive(clusters.clone())?;
        self.check_writable().ok()?;
        self.check_range(&range).ok()?;
        if !self.has_own_table(first) {
            return None;
        }
        let old = self.tables.cached_entries(clusters)?;
        let is_empty = |entry: &&L2Entry| self.is_empty(**entry);
        let count = old.iter().take_while(is_empty).count();
        if count == 0 {
            return None;
        }
        let taken = lock(&self.reserve).take(count as u64)?;
        let new: Vec<NewEntry> = taken
            .clone()
            .map(|cluster| L2Entry::whole(geometry, cluster << geometry.cluster_bits))
            .map(NewEntry::immediate)
            .collect();
        match self.tables.try_store(first, &old[..new.len()], &new) {
            // The old entries have no clusters that could be freed.
            Some(Ok(_)) => {}
            // The file may refer to the new clusters, so they are not used for anything else.
            Some(Err(_)) => return None,
            None => {
                lock(&self.reserve).put_back(taken);
                return None;
            }
        }
        let start = first << geometry.cluster_bits;
        let end = end.min((first + new.len() as u64) << geometry.cluster_bits);
        Some(Allocation {
            extent: Extent::File {
                file: 0,
                offset: (taken.start << geometry.cluster_bits) + (range.start - start),
                len: end - range.start,
            },
            should_prepare: lock(&self.reserve).report_low(),
        })
    }

    /// Whether a cluster reads as zeroes and has no place in any file.
    pub(super) fn is_empty(&self, entry: L2Entry) -> bool {
        let is_unallocated = entry.is_unallocated() && self.backing.is_none();
        is_unallocated || self.geometry.zero_flag && entry == L2Entry::zeroes(self.geometry, None)
    }

    /// [`Image::prepare`](crate::Image::prepare).
    pub(super) fn fill_reserve(&self) -> io::Result<()> {
        // Refcounts do not change while they are compared with the references.
        let _layout = lock(&self.layout);
        self.check_writable()?;
        lock(&self.allocator).fill_reserve()
    }
}
