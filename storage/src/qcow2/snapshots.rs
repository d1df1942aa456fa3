//! Internal snapshots: former states of the disk, kept in the image.
//!
//! A snapshot has an L1 table of its own and shares L2 tables and clusters with the active one. Creating or
//! deleting it changes the refcounts of everything that it shares. They are never too low meanwhile, but they
//! cannot change at the same moment as the flags for clusters with one reference (`COPIED`), whatever the order of
//! writes: the two are in different sectors, and a check expects them to agree. Therefore an image of version 3 is
//! marked as dirty meanwhile, and both are rebuilt after a crash. Version 2 has no such mark: a crash can leave leaks,
//! and clusters without the flag, which are copied at the next write for no reason.
//!
//! Applying a snapshot needs no mark. All that the disk refers to then belongs to the snapshot too, so that no flag
//! is set, and the disk goes from its former tables to these in one moment.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::Options;
use super::Qcow2;
use super::check::{Repair, Report};
use super::entry::L1Entry;
use super::error::Error;
use super::header::{Field, Header, MAX_SNAPSHOTS, incompatible};
use super::locks::{ALL, lock};
use super::snapshot_table::{self, Snapshot};
use super::tables::{L1, read_words, to_bytes};

impl Qcow2 {
    /// Returns the snapshots of the image.
    ///
    /// # Errors
    /// If their table is damaged, or the host cannot read it.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let (snapshots, _) = self
            .note(snapshot_table::read(&*self.file, &self.header()))
            .map_err(Error::io("read the snapshot table of the image"))?;
        Ok(snapshots)
    }

    /// Opens the disk as it was at a snapshot, given by its identifier or name, to be read. The image must not be written
    /// as long as it is open.
    ///
    /// # Errors
    /// If there is no such snapshot, or the host cannot read it.
    pub fn open_snapshot(&self, snapshot: &str) -> Result<Qcow2, Error> {
        let snapshots = self.snapshots()?;
        let snapshot = &snapshots[find(&snapshots, snapshot)?];
        let header = Header {
            size: snapshot.size,
            l1_size: snapshot.l1_size,
            l1_offset: snapshot.l1_offset,
            ..self.header()
        };
        let options = Options {
            read_only: true,
            ..Options::default()
        };
        let opened = Qcow2::assemble(Arc::clone(&self.file), header, options)?;
        opened.share_backing_of(self);
        Ok(opened)
    }

    /// Keeps the present state of the disk as a snapshot, and returns its identifier.
    ///
    /// The caller makes sure that no data is transferred by an answer of [`Image::map`](crate::Image::map) meanwhile,
    /// and uses no earlier answer afterwards.
    ///
    /// # Errors
    /// If the refcounts of the image are too narrow, or the host cannot write.
    pub fn create_snapshot(&self, name: &str) -> Result<String, Error> {
        let _layout = lock(&self.layout);
        let _guard = self.ranges.exclusive(ALL);
        let mut snapshots = self.snapshots()?;
        if snapshots.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::NotPossible(
                "the image has no room for more snapshots".to_owned(),
            ));
        }
        if lock(&self.allocator).refcounts.max() == 1 {
            let error = "refcounts of one bit leave no room for snapshots";
            return Err(Error::NotPossible(error.to_owned()));
        }
        let numbers = snapshots
            .iter()
            .filter_map(|snapshot| snapshot.id.parse::<u64>().ok());
        let id = numbers.max().unwrap_or(0).saturating_add(1).to_string();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let header = self.header();
        snapshots.push(Snapshot {
            id: id.clone(),
            name: name.to_owned(),
            size: header.size,
            seconds: now.as_secs() as u32,
            nanoseconds: now.subsec_nanos(),
            guest_clock: 0,
            machine_state: 0,
            l1_offset: 0,
            l1_size: header.l1_size,
            extra: Vec::new(),
        });
        // An impossible name is refused before anything changes.
        snapshot_table::to_bytes(&snapshots)?;
        self.change_shared(|| self.add_snapshot(&mut snapshots))?;
        Ok(id)
    }

    /// Returns the disk to the state of a snapshot, given by its identifier or name.
    ///
    /// The caller makes sure that no data is transferred by an answer of [`Image::map`](crate::Image::map) meanwhile,
    /// and uses no earlier answer afterwards.
    ///
    /// # Errors
    /// If there is no such snapshot, or the host cannot write.
    pub fn apply_snapshot(&self, snapshot: &str) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        let _guard = self.ranges.exclusive(ALL);
        let snapshots = self.snapshots()?;
        let snapshot = &snapshots[find(&snapshots, snapshot)?];
        self.change_snapshots(|| self.activate(snapshot))
    }

    /// Deletes a snapshot, given by its identifier or name.
    ///
    /// # Errors
    /// If there is no such snapshot, or the host cannot write.
    pub fn delete_snapshot(&self, snapshot: &str) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        let _guard = self.ranges.exclusive(ALL);
        let mut snapshots = self.snapshots()?;
        let snapshot = snapshots.remove(find(&snapshots, snapshot)?);
        self.change_shared(|| {
            self.write_snapshots(&snapshots)?;
            self.lower_references(snapshot.l1_offset, snapshot.l1_size)
        })
    }

    /// Changes what snapshots share with the disk, and then the flags, while the image is marked as dirty.
    fn change_shared(&self, change: impl FnOnce() -> io::Result<()>) -> Result<(), Error> {
        self.change_snapshots(|| {
            self.mark_dirty(true)?;
            change()?;
            let references = self.find_references()?;
            self.compare_copied(&references, Repair::All, &mut Report::default())?;
            self.gate.sync()?;
            self.mark_dirty(false)
        })
    }

    /// Changes snapshots. If that fails, refcounts and flags are rebuilt.
    fn change_snapshots(&self, change: impl FnOnce() -> io::Result<()>) -> Result<(), Error> {
        let changed = self.check_writable().and_then(|()| {
            self.sync_and_release()?;
            let changed = change().and_then(|()| self.gate.sync());
            let changed = self.note(changed);
            if changed.is_err() && self.check_writable().is_ok() {
                // The first error says more than one of these.
                let _ = lock(&self.allocator).give_back();
                let _ = self.check_unlocked(Repair::All);
            }
            let header = self.header();
            self.tables.replace_l1(L1::read(
                &*self.file,
                header.l1_offset,
                header.l1_size.into(),
            )?);
            *lock(&self.decompressed) = None;
            self.find_metadata()?;
            changed
        });
        changed.map_err(Error::io("change the snapshots of the image"))
    }

    fn mark_dirty(&self, is_dirty: bool) -> io::Result<()> {
        let header = self.header();
        if header.version < 3 {
            return Ok(());
        }
        let features = if is_dirty {
            header.incompatible | incompatible::DIRTY
        } else {
            header.incompatible & !incompatible::DIRTY
        };
        self.write_header(Field::Incompatible(features), |header| {
            header.incompatible = features;
        })?;
        self.gate.sync()
    }

    /// Adds the last of `snapshots`, which has no L1 table yet.
    fn add_snapshot(&self, snapshots: &mut [Snapshot]) -> io::Result<()> {
        let header = self.header();
        let words = read_words(&*self.file, header.l1_offset, header.l1_size.into())?;
        let words: Vec<u64> = words
            .into_iter()
            .map(|word| L1Entry(word).with_copied(false).0)
            .collect();
        let l1_offset = self.write_contiguous(&to_bytes(&words))?;
        // Nothing is written in place without the flags, so the refcounts may rise.
        for table in self.tables_of(&words)? {
            self.unmark_table(table)?;
        }
        self.file.write_at(&to_bytes(&words), header.l1_offset)?;
        self.gate.sync()?;
        self.raise_references(&words)?;
        if let Some(snapshot) = snapshots.last_mut() {
            snapshot.l1_offset = l1_offset;
        }
        self.write_snapshots(snapshots)
    }

    /// Makes the L1 table of a snapshot the active one.
    fn activate(&self, snapshot: &Snapshot) -> io::Result<()> {
        let header = self.header();
        let words = read_words(&*self.file, snapshot.l1_offset, snapshot.l1_size.into())?;
        let words: Vec<u64> = words
            .into_iter()
            .map(|word| L1Entry(word).with_copied(false).0)
            .collect();
        // A table that only snapshots refer to can have flags that nobody has looked at so far.
        for table in self.tables_of(&words)? {
            self.unmark_table(table)?;
        }
        self.raise_references(&words)?;
        let l1_offset = self.write_contiguous(&to_bytes(&words))?;
        self.gate.sync()?;
        let (old_offset, old_size) = (header.l1_offset, header.l1_size);
        self.write_active(Header {
            size: snapshot.size,
            l1_size: snapshot.l1_size,
            l1_offset,
            ..header
        })?;
        self.lower_references(old_offset, old_size)
    }

    /// Clears the flags for clusters with one reference in an L2 table.
    fn unmark_table(&self, table: u64) -> io::Result<()> {
        let mut words = Vec::new();
        let mut is_changed = false;
        for entry in self.read_table(table)? {
            let unmarked = if entry.is_copied() {
                entry.with_copied(false)
            } else {
                entry
            };
            is_changed |= unmarked != entry;
            words.push(unmarked.word);
            if self.geometry.extended {
                words.push(unmarked.bitmap);
            }
        }
        if is_changed {
            self.file.write_at(&to_bytes(&words), table)
        } else {
            Ok(())
        }
    }

    /// Adds one reference to everything that an L1 table leads to, on stable storage.
    fn raise_references(&self, words: &[u64]) -> io::Result<()> {
        for table in self.tables_of(words)? {
            let entries = self.read_table(table)?;
            let cluster = table >> self.geometry.cluster_bits;
            let mut allocator = lock(&self.allocator);
            allocator.refcounts.add(cluster..cluster + 1, 1, |_| ())?;
            for entry in entries {
                allocator
                    .refcounts
                    .add(entry.host_clusters(self.geometry), 1, |_| ())?;
            }
        }
        lock(&self.allocator).refcounts.write_back()?;
        self.gate.sync()
    }

    /// Removes one reference to everything that an L1 table leads to, and the table. Stable storage does not
    /// refer to it any more.
    fn lower_references(&self, l1_offset: u64, l1_size: u32) -> io::Result<()> {
        let words = read_words(&*self.file, l1_offset, l1_size.into())?;
        for table in self.tables_of(&words)? {
            let entries = self.read_table(table)?;
            let cluster = table >> self.geometry.cluster_bits;
            let mut clusters: Vec<_> = entries
                .into_iter()
                .map(|entry| entry.host_clusters(self.geometry))
                .filter(|clusters| !clusters.is_empty())
                .collect();
            clusters.push(cluster..cluster + 1);
            lock(&self.allocator).release(clusters)?;
        }
        let end = l1_offset + u64::from(l1_size) * 8;
        lock(&self.allocator).release(vec![self.geometry.clusters(l1_offset..end)])
    }

    /// Writes a new snapshot table, syncs it, has the header name it, and frees the old one.
    pub(super) fn write_snapshots(&self, snapshots: &[Snapshot]) -> io::Result<()> {
        let header = self.header();
        let (_, old_len) = snapshot_table::read(&*self.file, &header)?;
        let bytes = snapshot_table::to_bytes(snapshots)?;
        let offset = self.write_contiguous(&bytes)?;
        self.gate.sync()?;
        let count = snapshots.len() as u32;
        self.write_header(Field::Snapshots { count, offset }, |header| {
            header.snapshots = count;
            header.snapshots_offset = offset;
        })?;
        self.gate.sync()?;
        let old = header.snapshots_offset..header.snapshots_offset + old_len;
        lock(&self.allocator).release(vec![self.geometry.clusters(old)])
    }

    /// Writes bytes to new clusters that follow each other, and returns where. No bytes need no place.
    fn write_contiguous(&self, bytes: &[u8]) -> io::Result<u64> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let clusters = (bytes.len() as u64).div_ceil(self.geometry.cluster_size());
        let taken = lock(&self.allocator).take_contiguous(clusters)?;
        let offset = taken.start << self.geometry.cluster_bits;
        self.file.write_at(bytes, offset)?;
        Ok(offset)
    }

    /// Returns the L2 tables of an L1 table.
    fn tables_of(&self, words: &[u64]) -> io::Result<BTreeSet<u64>> {
        let file_size = lock(&self.allocator).file_size();
        let mut tables = BTreeSet::new();
        for &word in words {
            let Some(table) = L1Entry(word).table() else {
                continue;
            };
            let is_aligned = table & (self.geometry.cluster_size() - 1) == 0;
            if !is_aligned || table >= file_size || !tables.insert(table) {
                return Err(Error::Damaged(format!("an L1 entry is {word:#x}")).into());
            }
        }
        Ok(tables)
    }
}

/// Finds a snapshot by its identifier, or else by its name.
fn find(snapshots: &[Snapshot], wanted: &str) -> Result<usize, Error> {
    let by_id = snapshots.iter().position(|snapshot| snapshot.id == wanted);
    by_id
        .or_else(|| {
            snapshots
                .iter()
                .position(|snapshot| snapshot.name == wanted)
        })
        .ok_or_else(|| Error::NoSnapshot(wanted.to_owned()))
}
