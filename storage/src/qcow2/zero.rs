//! Zeroes and discards.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::entry::{L2Entry, Mapping};
use super::tables::NewEntry;

impl Qcow2 {
    /// [`Image::write_zeroes`](crate::Image::write_zeroes) for a range that has been checked.
    pub(super) fn zero_range(&self, range: Range<u64>, unmap: bool) -> io::Result<()> {
        let whole = self.whole_clusters(&range);
        // Version 2 has no flag for zeroes, so only real zeroes hide the backing file.
        if whole.is_empty() || (self.backing.is_some() && !self.geometry.zero_flag) {
            return self.write_zero_bytes(range);
        }
        let cluster_bits = self.geometry.cluster_bits;
        let (start, end) = (whole.start << cluster_bits, whole.end << cluster_bits);
        self.write_zero_bytes(range.start..start)?;
        self.zero_clusters(whole, unmap)?;
        self.write_zero_bytes(end.min(range.end)..range.end)
    }

    /// Makes whole clusters read as zeroes. With `unmap`, frees what they are mapped to.
    pub(super) fn zero_clusters(&self, clusters: Range<u64>, unmap: bool) -> io::Result<()> {
        let (geometry, is_backed) = (self.geometry, self.backing.is_some());
        self.change_entries(clusters, |entry| {
            let host = entry
                .host()
                .filter(|_| entry.is_copied() && !unmap && geometry.zero_flag);
            let is_zero = entry == L2Entry::zeroes(geometry, entry.host()) && entry.is_copied()
                || entry == L2Entry::zeroes(geometry, None);
            if is_zero && (host.is_some() || entry.host().is_none()) {
                entry
            } else if !is_backed && host.is_none() {
                L2Entry::UNALLOCATED
            } else {
                L2Entry::zeroes(geometry, host)
            }
        })
    }

    /// [`Image::discard`](crate::Image::discard) for a range that has been checked.
    pub(super) fn discard_range(&self, range: Range<u64>) -> io::Result<()> {
        let (geometry, is_backed) = (self.geometry, self.backing.is_some());
        self.change_entries(self.whole_clusters(&range), |entry| {
            if entry.is_unallocated() || entry == L2Entry::zeroes(geometry, None) {
                entry
            } else if !is_backed {
                L2Entry::UNALLOCATED
            } else if geometry.zero_flag {
                // Otherwise the disk would show the old bytes of the backing file.
                L2Entry::zeroes(geometry, None)
            } else {
                entry
            }
        })
    }

    /// Returns the clusters that lie within `range`. The last one of the disk may end behind it.
    pub(super) fn whole_clusters(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.div_ceil(self.geometry.cluster_size());
        let end = if range.end == self.size.load(Ordering::Relaxed) {
            range.end.div_ceil(self.geometry.cluster_size())
        } else {
            range.end >> self.geometry.cluster_bits
        };
        start..end.max(start)
    }

    /// Replaces L2 entries, and frees the clusters that the new ones do not refer to.
    pub(super) fn change_entries(
        &self,
        clusters: Range<u64>,
        change: impl Fn(L2Entry) -> L2Entry,
    ) -> io::Result<()> {
        let needs_tables = change(L2Entry::UNALLOCATED) != L2Entry::UNALLOCATED;
        let slice_clusters = self.tables.slice_clusters();
        let l2_entries = self.geometry.l2_entries();
        let mut next = clusters.start;
        while next < clusters.end {
            let index = next / l2_entries;
            if !needs_tables && self.tables.l1_entry(index).table().is_none() {
                next = (index + 1) * l2_entries;
                continue;
            }
            let end = clusters
                .end
                .min((next / slice_clusters + 1) * slice_clusters);
            self.change_slice(next..end, &change)?;
            self.release_if_many()?;
            next = end;
        }
        Ok(())
    }

    /// Replaces entries of one slice.
    fn change_slice(
        &self,
        clusters: Range<u64>,
        change: impl Fn(L2Entry) -> L2Entry,
    ) -> io::Result<()> {
        let _guard = self.ranges.exclusive(clusters.clone());
        self.change_slice_locked(clusters, change)
    }

    /// Replaces entries of one slice, for a caller that has locked their clusters.
    pub(super) fn change_slice_locked(
        &self,
        clusters: Range<u64>,
        change: impl Fn(L2Entry) -> L2Entry,
    ) -> io::Result<()> {
        let old = self
            .tables
            .entries(clusters.clone(), |entry| self.inspect(entry))?;
        self.check_writable()?;
        let new: Vec<NewEntry> = old
            .iter()
            .map(|entry| NewEntry::immediate(change(*entry)))
            .collect();
        if old.iter().zip(&new).all(|(old, new)| *old == new.entry) {
            return Ok(());
        }
        self.ensure_table(clusters.start)?;
        let replaced = self.tables.store(clusters.start, &old, &new)?;
        self.free_old(&replaced);
        Ok(())
    }

    /// Writes zeroes to the bytes of a range that do not read as zeroes already.
    pub(super) fn write_zero_bytes(&self, range: Range<u64>) -> io::Result<()> {
        static ZEROES: [u8; 65536] = [0; 65536];
        let mut next = range.start;
        while next < range.end {
            let (is_zero, len) = {
                let _guard = self.ranges.shared(self.geometry.clusters(next..range.end));
                let (mapping, len) = self.lookup(next, range.end - next)?;
                let is_zero = match mapping {
                    Mapping::Zeroes => true,
                    Mapping::Unallocated => self.is_backed_by_zeroes(next..next + len)?,
                    Mapping::Data { .. } | Mapping::Compressed(_) => false,
                };
                (is_zero, len)
            };
            if is_zero {
                next += len;
            } else {
                let len = len.min(ZEROES.len() as u64);
                self.write_range(&ZEROES[..len as usize], next)?;
                next += len;
            }
        }
        Ok(())
    }
}
