//! Writes: in place, or to new clusters.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::entry::{L1Entry, L2Entry, Mapping};
use super::error::Error;
use super::locks::{lock, read, write};
use super::overlap::Kind;
use super::tables::NewEntry;
use crate::ImageFile;

/// Maximum number of bytes that are mapped at a time, if a cluster is not larger.
const PIECE: u64 = 1 << 20;

/// How a cluster is written.
struct Plan {
    /// The L2 entry afterwards. It is pending if the file must not have it before the new bytes are on stable storage:
    /// otherwise a crash could lose old bytes, or show bytes that were deleted before.
    entry: NewEntry,
    /// Ranges of the guest whose old bytes are copied to the new place.
    copies: Vec<Range<u64>>,
}

impl Qcow2 {
    /// [`Image::write_at`](crate::Image::write_at) for a range that has been checked.
    pub(super) fn write_range(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut written = self.write_in_place(bytes, offset)?;
            if written == 0 {
                // If an earlier call could not settle them, no more entries become pending.
                self.settle_if_many()?;
                written = self.write_new_or_release(bytes, offset)?;
                self.settle_if_many()?;
                self.release_if_many()?;
            }
            bytes = &bytes[written..];
            offset += written as u64;
        }
        Ok(())
    }

    /// Writes the first bytes if that needs no change of a table. Returns how many were written.
    fn write_in_place(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let len = bytes.len() as u64;
        let _guard = self
            .ranges
            .shared(self.geometry.clusters(offset..offset + len));
        let (
            Mapping::Data {
                host,
                in_place: true,
            },
            len,
        ) = self.lookup(offset, len)?
        else {
            return Ok(0);
        };
        self.write_host(&bytes[..len as usize], host)?;
        Ok(len as usize)
    }

    /// Writes bytes of the disk to the file, unless that would overwrite metadata.
    pub(super) fn write_host(&self, bytes: &[u8], host: u64) -> io::Result<()> {
        let clusters = self.geometry.clusters(host..host + bytes.len() as u64);
        let found = read(&self.metadata).find(clusters);
        if let Some(kind) = found {
            return Err(
                Error::Damaged(format!("an L2 entry points to {kind} at {host:#x}")).into(),
            );
        }
        self.check_writable()?;
        self.file.write_data(bytes, host)
    }

    /// Returns the end of the first bytes of `range` that can be mapped at a time.
    pub(super) fn piece_end(&self, range: &Range<u64>) -> u64 {
        let geometry = self.geometry;
        let first = range.start >> geometry.cluster_bits;
        let slice_end = (first / self.tables.slice_clusters() + 1) * self.tables.slice_clusters();
        let most = slice_end.min(first + (PIECE / geometry.cluster_size()).max(1));
        range.end.min(most << geometry.cluster_bits)
    }

    /// Does what [`Self::write_new`] does, if need be with the storage of clusters that were freed and wait for a sync.
    fn write_new_or_release(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        match self.write_new(bytes, offset) {
            Err(error)
                if error.kind() == io::ErrorKind::StorageFull
                    && lock(&self.allocator).has_freed() =>
            {
                self.sync_and_release()?;
                self.write_new(bytes, offset)
            }
            written => written,
        }
    }

    /// Writes the first bytes to clusters that it maps for them. Returns how many were written: none if another
    /// thread has mapped them meanwhile.
    fn write_new(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let end = self.piece_end(&(offset..offset + bytes.len() as u64));
        let _guard = self.ranges.exclusive(self.geometry.clusters(offset..end));
        self.write_new_locked(&bytes[..(end - offset) as usize], offset)
    }

    /// Does what [`Self::write_new`] does, for a caller that has locked the clusters, and no more bytes than are mapped
    /// at a time.
    pub(super) fn write_new_locked(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let geometry = self.geometry;
        let first = offset >> geometry.cluster_bits;
        let end = offset + bytes.len() as u64;
        let clusters = geometry.clusters(offset..end);
        let old = self
            .tables
            .entries(clusters.clone(), |entry| self.inspect(entry))?;
        for entry in &old {
            entry
                .mapping(geometry, 0)
                .map_err(|error| Error::Damaged(error.to_string()))?;
        }
        // A cluster that has one of the file for itself, without the data, is filled there, alone.
        let count = old.iter().take_while(|entry| !entry.is_copied()).count() as u64;
        if count > 0 {
            self.ensure_table(first)?;
            let taken = lock(&self.allocator).take(count)?;
            let count = taken.end - taken.start;
            let end = end.min((first + count) << geometry.cluster_bits);
            let bytes = &bytes[..(end - offset) as usize];
            let old = &old[..count as usize];
            let host = taken.start << geometry.cluster_bits;
            let entries = match self.fill(old, first, host, true, bytes, offset) {
                Ok(entries) => entries,
                Err(error) => {
                    lock(&self.allocator).free(taken);
                    return Err(error);
                }
            };
            // If this fails, the file may refer to the new clusters or the old ones, so none is freed.
            let replaced = self.tables.store(first, old, &entries)?;
            self.free_old(&replaced);
            return Ok(bytes.len());
        }
        if matches!(
            self.lookup(offset, 1)?,
            (Mapping::Data { in_place: true, .. }, _)
        ) {
            return Ok(0);
        }
        let Some((entry, host)) = old.first().and_then(|entry| Some((entry, entry.host()?))) else {
            return Ok(0);
        };
        let end = end.min((first + 1) << geometry.cluster_bits);
        let bytes = &bytes[..(end - offset) as usize];
        self.ensure_table(first)?;
        let old = std::slice::from_ref(entry);
        let entries = self.fill(old, first, host, false, bytes, offset)?;
        let replaced = self.tables.store(first, old, &entries)?;
        self.free_old(&replaced);
        Ok(bytes.len())
    }

    /// Writes `bytes` to the clusters of the file at `host`, with the old bytes around them, and returns
    /// the new entries. `old` are those of the clusters from `first` on. `is_fresh` says that the clusters of the file
    /// read as zeroes; otherwise they are those that the old entry has.
    fn fill(
        &self,
        old: &[L2Entry],
        first: u64,
        host: u64,
        is_fresh: bool,
        bytes: &[u8],
        offset: u64,
    ) -> io::Result<Vec<NewEntry>> {
        let geometry = self.geometry;
        let start = first << geometry.cluster_bits;
        let end = offset + bytes.len() as u64;
        let mut entries = Vec::with_capacity(old.len());
        for (entry, number) in old.iter().zip(0..) {
            let guest = start + (number << geometry.cluster_bits);
            let place = host + (number << geometry.cluster_bits);
            let covered = offset.max(guest)..end.min(guest + geometry.cluster_size());
            let plan = self.plan(*entry, guest, place, is_fresh, &covered)?;
            for range in plan.copies {
                let mut copy = vec![0; (range.end - range.start) as usize];
                self.read_unlocked(&mut copy, range.start)?;
                self.write_host(&copy, host + (range.start - start))?;
            }
            entries.push(plan.entry);
        }
        self.write_host(bytes, host + (offset - start))?;
        Ok(entries)
    }

    /// Plans a write of the bytes `covered` to the cluster of the guest at `guest`.
    fn plan(
        &self,
        old: L2Entry,
        guest: u64,
        host: u64,
        is_fresh: bool,
        covered: &Range<u64>,
    ) -> io::Result<Plan> {
        let unit_size = self.geometry.unit_size();
        let mut copies: Vec<Range<u64>> = Vec::new();
        // The old entry of a cluster that is filled in place may be pending itself.
        let mut is_pending = !is_fresh;
        let mut allocated = 0u64;
        for number in 0..self.geometry.cluster_size() / unit_size {
            let unit = guest + number * unit_size..guest + (number + 1) * unit_size;
            let (mapping, _) = old
                .mapping(self.geometry, unit.start - guest)
                .map_err(|error| Error::Damaged(error.to_string()))?;
            let is_touched = covered.start < unit.end && unit.start < covered.end;
            let has_old_bytes = match mapping {
                // Already in its place.
                Mapping::Data { .. } if !is_fresh => {
                    allocated |= 1 << number;
                    continue;
                }
                Mapping::Data { .. } | Mapping::Compressed(_) => true,
                Mapping::Zeroes => false,
                Mapping::Unallocated if is_touched => !self.is_backed_by_zeroes(unit.clone())?,
                Mapping::Unallocated => {
                    if is_fresh && self.backing.is_none() {
                        allocated |= 1 << number;
                    }
                    continue;
                }
            };
            if !is_touched && !has_old_bytes && !is_fresh {
                continue;
            }
            allocated |= 1 << number;
            // A place that is not fresh may hold bytes that were there before it was marked as zeroes.
            if has_old_bytes || !is_fresh {
                is_pending = true;
                let around = [
                    unit.start..unit.end.min(covered.start.max(unit.start)),
                    unit.start.max(covered.end.min(unit.end))..unit.end,
                ];
                let around = if is_touched { around } else { [unit, 0..0] };
                for range in around {
                    match copies.last_mut() {
                        _ if range.is_empty() => {}
                        Some(last) if last.end == range.start => last.end = range.end,
                        _ => copies.push(range),
                    }
                }
            }
        }
        let bitmap = if self.geometry.extended {
            let zeroes = if is_fresh {
                old.bitmap >> 32
            } else {
                old.bitmap >> 32 & !allocated
            };
            allocated | (zeroes & !allocated) << 32
        } else {
            0
        };
        Ok(Plan {
            entry: NewEntry {
                entry: L2Entry::data(host, bitmap),
                is_pending,
            },
            copies,
        })
    }

    /// Frees the clusters of the file that former entries refer to.
    pub(super) fn free_old(&self, entries: &[L2Entry]) {
        let mut allocator = lock(&self.allocator);
        for entry in entries {
            if entry.compressed_data(self.geometry).is_some() {
                *lock(&self.decompressed) = None;
            }
            allocator.free(entry.host_clusters(self.geometry));
        }
    }

    /// Whether the L2 table of a cluster of the guest exists and can be written in place.
    pub(super) fn has_own_table(&self, cluster: u64) -> bool {
        let entry = self.tables.l1_entry(cluster >> self.geometry.l2_bits());
        entry.is_copied() && entry.table().is_some()
    }

    /// Makes sure that the L2 table of a cluster of the guest exists and can be written in place.
    pub(super) fn ensure_table(&self, cluster: u64) -> io::Result<()> {
        if self.has_own_table(cluster) {
            return Ok(());
        }
        let _guard = lock(&self.new_table);
        if self.has_own_table(cluster) {
            return Ok(());
        }
        let index = cluster >> self.geometry.l2_bits();
        let old = self.tables.l1_entry(index);
        let taken = lock(&self.allocator).take(1)?;
        let offset = taken.start << self.geometry.cluster_bits;
        let filled = match old.table() {
            // It reads as zeroes, and does so on stable storage.
            None => Ok(()),
            Some(table) => copy_cluster(&*self.file, table, offset, self.geometry.cluster_size())
                .and_then(|()| self.gate.sync()),
        };
        if let Err(error) = filled {
            lock(&self.allocator).free(taken);
            return Err(error);
        }
        self.tables.set_l1_entry(index, L1Entry::new(offset))?;
        let mut metadata = write(&self.metadata);
        metadata.add(taken.start, Kind::L2);
        if let Some(table) = old.table() {
            let old = table >> self.geometry.cluster_bits;
            metadata.remove(old);
            drop(metadata);
            lock(&self.allocator).free(old..old + 1);
        }
        Ok(())
    }

    /// Writes the pending L2 entries, after a sync of the data that they refer to. They are not on stable storage
    /// themselves then.
    fn settle(&self) -> io::Result<()> {
        let waiting = self.tables.pending();
        if waiting.is_empty() {
            return Ok(());
        }
        self.check_writable()?;
        self.gate.sync()?;
        let mut replaced = Vec::new();
        let result = self.tables.store_pending(&waiting, &mut replaced);
        self.free_old(&replaced);
        result
    }

    /// Settles if more entries are pending than may wait for the next flush.
    pub(super) fn settle_if_many(&self) -> io::Result<()> {
        if self.tables.pending_len() > self.max_pending {
            self.settle()
        } else {
            Ok(())
        }
    }

    /// Brings everything to stable storage, then lowers the refcounts of what was freed before.
    pub(super) fn sync_and_release(&self) -> io::Result<()> {
        // This is an error if the image is damaged and has pending entries, which it takes no more.
        self.settle()?;
        if self.is_damaged.load(Ordering::Relaxed) {
            return self.gate.sync();
        }
        let freed = lock(&self.allocator).take_freed();
        if let Err(error) = self.gate.sync() {
            lock(&self.allocator).keep_freed(freed);
            return Err(error);
        }
        if !freed.is_empty()
            && let Err(error) = self.note(lock(&self.allocator).release(freed))
        {
            // All data is on stable storage. The clusters are leaked.
            tracing::warn!("cannot free clusters of a qcow2 image: {error}");
        }
        Ok(())
    }

    /// Syncs if too much was freed to wait for the next flush.
    pub(super) fn release_if_many(&self) -> io::Result<()> {
        if lock(&self.allocator).has_many_freed() {
            self.sync_and_release()
        } else {
            Ok(())
        }
    }
}

/// Copies a cluster within a file.
fn copy_cluster(file: &dyn ImageFile, from: u64, to: u64, size: u64) -> io::Result<()> {
    let mut bytes = vec![0; size as usize];
    file.read_at(&mut bytes, from)?;
    file.write_at(&bytes, to)
}
