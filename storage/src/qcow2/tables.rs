//! The tables that map the disk: the active L1 table in memory, L2 tables in the file, with a cache.
//!
//! Most changed entries are written to the file before anyone sees them in memory. *Pending* entries are only in
//! memory, because they refer to data that is not known to be on stable storage. They are applied to each slice that
//! is read into the cache, so a slot of the cache can still be reused at any time. [`Tables::store_pending`] writes
//! them after a sync. The lock is held for writes to the file, never for a sync.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::cache::SliceCache;
use super::entry::{BadEntry, Geometry, L1Entry, L2Entry, Mapping};
use super::error::Error;
use super::locks::{lock, try_lock};
use super::pending::{Pending, Waiting};
use crate::ImageFile;

/// What the first bytes of a range are.
pub(super) type Run = (Mapping, u64);

/// The active L1 table and where it is.
#[derive(Debug)]
pub(super) struct L1 {
    pub offset: u64,
    pub entries: Vec<AtomicU64>,
    /// The table that has taken its place. The old one is kept as long as the image, so that a reader needs no lock:
    /// each request to an overlay that has nothing at its offset reads the table, and few images are ever made larger.
    next: OnceLock<Box<L1>>,
}

impl L1 {
    /// Reads a table of `entries` entries. Their number has been checked.
    pub fn read(file: &dyn ImageFile, offset: u64, entries: u64) -> io::Result<L1> {
        let words = read_words(file, offset, entries)?;
        Ok(L1 {
            offset,
            entries: words.into_iter().map(AtomicU64::new).collect(),
            next: OnceLock::new(),
        })
    }

    pub fn get(&self, index: u64) -> L1Entry {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| self.entries.get(index));
        L1Entry(entry.map_or(0, |entry| entry.load(Ordering::Relaxed)))
    }
}

/// The tables that map the clusters of the guest.
#[derive(Debug)]
pub(super) struct Tables {
    file: Arc<dyn ImageFile>,
    geometry: Geometry,
    /// Number of clusters that a slice maps as a power of two.
    slice_bits: u32,
    first_l1: L1,
    cache: SliceCache,
    /// The pending entries. The lock is also held while a slice is read into the cache and while an entry changes,
    /// because a slice that was read before a change must not get into the cache after it.
    pending: Mutex<Pending>,
}

/// A new L2 entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewEntry {
    pub entry: L2Entry,
    /// Whether it has to wait for a sync of the data that it refers to.
    pub is_pending: bool,
}

impl NewEntry {
    /// An entry that refers to no data that is not on stable storage.
    pub fn immediate(entry: L2Entry) -> NewEntry {
        NewEntry {
            entry,
            is_pending: false,
        }
    }
}

impl Tables {
    pub fn new(file: Arc<dyn ImageFile>, geometry: Geometry, l1: L1, cache_bytes: u64) -> Tables {
        let cache = SliceCache::new(cache_bytes, geometry.cluster_size());
        Tables {
            file,
            geometry,
            slice_bits: (cache.words() / geometry.entry_words()).ilog2(),
            first_l1: l1,
            cache,
            pending: Mutex::default(),
        }
    }

    /// Returns what the bytes from `offset` on are if that is known without the host.
    pub fn cached(&self, offset: u64, len: u64) -> Option<Result<Run, BadEntry>> {
        let (slice, index, within) = self.place(offset);
        let cached = self.cache.read(slice, |words| {
            let word = |index: usize| {
                words
                    .get(index)
                    .map_or(0, |word| word.load(Ordering::Relaxed))
            };
            run(self.geometry, word, words.len(), index, within, len)
        });
        cached.or_else(|| self.without_table(offset, len).map(Ok))
    }

    /// Has the processor fetch the cached entry for `offset`, if there is one.
    pub fn prefetch(&self, offset: u64) {
        let (slice, index, _) = self.place(offset);
        let word = index * self.geometry.entry_words() as usize;
        self.cache.prefetch(slice, word);
    }

    /// Returns what the bytes from `offset` on are. `inspect` is called with each entry that comes into the
    /// cache.
    pub fn lookup(
        &self,
        offset: u64,
        len: u64,
        inspect: impl FnMut(L2Entry),
    ) -> io::Result<Result<Run, BadEntry>> {
        if let Some(run) = self.cached(offset, len) {
            return Ok(run);
        }
        let (slice, index, within) = self.place(offset);
        let pending = lock(&self.pending);
        let Some(words) = self.load(&pending, slice, inspect)? else {
            let end = (slice + 1) << (self.slice_bits + self.geometry.cluster_bits);
            return Ok(Ok((Mapping::Unallocated, len.min(end - offset))));
        };
        drop(pending);
        let word = |index: usize| words.get(index).copied().unwrap_or(0);
        Ok(run(self.geometry, word, words.len(), index, within, len))
    }

    /// Returns the entries of `clusters`, which are in one slice.
    pub fn entries(
        &self,
        clusters: Range<u64>,
        inspect: impl FnMut(L2Entry),
    ) -> io::Result<Vec<L2Entry>> {
        if let Some(entries) = self.cached_entries(clusters.clone()) {
            return Ok(entries);
        }
        let (slice, _, _) = self.place(clusters.start << self.geometry.cluster_bits);
        let pending = lock(&self.pending);
        let words = self.load(&pending, slice, inspect)?.unwrap_or_default();
        let word = |index: usize| words.get(index).copied().unwrap_or(0);
        Ok(self.entries_of(clusters, word))
    }

    /// Returns the entries of `clusters`, which are in one slice, if they are known without the host.
    pub fn cached_entries(&self, clusters: Range<u64>) -> Option<Vec<L2Entry>> {
        let (slice, _, _) = self.place(clusters.start << self.geometry.cluster_bits);
        self.cache.read(slice, |words| {
            let word = |index: usize| words.get(index).map(|word| word.load(Ordering::Relaxed));
            self.entries_of(clusters, |index| word(index).unwrap_or(0))
        })
    }

    /// Returns the entries of `clusters` from the words of their slice.
    fn entries_of(&self, clusters: Range<u64>, word: impl Fn(usize) -> u64) -> Vec<L2Entry> {
        let (_, index, _) = self.place(clusters.start << self.geometry.cluster_bits);
        let words_per_entry = self.geometry.entry_words() as usize;
        let entries = index..index + (clusters.end - clusters.start) as usize;
        entries
            .map(|entry| L2Entry {
                word: word(entry * words_per_entry),
                bitmap: match words_per_entry {
                    2 => word(entry * 2 + 1),
                    _ => 0,
                },
            })
            .collect()
    }

    /// Replaces the entries `old` of clusters from `cluster` on, which are in one slice and have an L2 table that can
    /// be written in place. Returns former entries that nothing refers to any more; their clusters can be freed.
    ///
    /// # Errors
    /// If the host cannot write them. The file may have the old entries or the new ones, and no entry has become
    /// pending.
    pub fn store(
        &self,
        cluster: u64,
        old: &[L2Entry],
        new: &[NewEntry],
    ) -> io::Result<Vec<L2Entry>> {
        self.store_locked(lock(&self.pending), cluster, old, new)
    }

    /// [`Self::store`] if nobody reads or writes tables of the file.
    pub fn try_store(
        &self,
        cluster: u64,
        old: &[L2Entry],
        new: &[NewEntry],
    ) -> Option<io::Result<Vec<L2Entry>>> {
        Some(self.store_locked(try_lock(&self.pending)?, cluster, old, new))
    }

    fn store_locked(
        &self,
        mut pending: MutexGuard<'_, Pending>,
        cluster: u64,
        old: &[L2Entry],
        new: &[NewEntry],
    ) -> io::Result<Vec<L2Entry>> {
        let (slice, index, _) = self.place(cluster << self.geometry.cluster_bits);
        let is_written =
            |index: &usize| !new[*index].is_pending && new[*index].entry != old[*index];
        if let Some(first) = (0..new.len()).find(is_written) {
            let last = (first..new.len()).rfind(is_written).unwrap_or(first);
            let stored: Vec<L2Entry> = (first..=last)
                .map(|index| {
                    if is_written(&index) {
                        new[index].entry
                    } else {
                        pending.stored(cluster + index as u64).unwrap_or(old[index])
                    }
                })
                .collect();
            let result = self.write_entries(cluster + first as u64, &self.words(stored));
            if result.is_err() {
                self.cache.remove(slice);
                return result.map(|()| Vec::new());
            }
        }
        let first_word = index * self.geometry.entry_words() as usize;
        let words = self.words(new.iter().map(|new| new.entry));
        self.cache.update(slice, first_word, &words);
        let mut replaced = Vec::new();
        for (cluster, (&old, new)) in (cluster..).zip(old.iter().zip(new)) {
            let is_unused =
                old.host_clusters(self.geometry) != new.entry.host_clusters(self.geometry);
            let unused = is_unused.then_some(old);
            if new.is_pending {
                pending.defer(cluster, old, new.entry, unused);
            } else if new.entry != old {
                replaced.extend(unused);
                replaced.extend(pending.cancel(cluster));
            }
        }
        Ok(replaced)
    }

    /// Number of pending entries.
    pub fn pending_len(&self) -> usize {
        lock(&self.pending).len()
    }

    /// Returns the pending entries. After a sync, the caller passes them to [`Self::store_pending`].
    pub fn pending(&self) -> Vec<Waiting> {
        lock(&self.pending).waiting()
    }

    /// Writes entries that were pending before the last sync. Those that have been replaced meanwhile are left out.
    /// Adds former entries that nothing refers to any more to `replaced`.
    ///
    /// # Errors
    /// If the host cannot read or write the tables. Some of the entries are pending as before.
    pub fn store_pending(
        &self,
        waiting: &[Waiting],
        replaced: &mut Vec<L2Entry>,
    ) -> io::Result<()> {
        for waiting in
            waiting.chunk_by(|a, b| a.cluster >> self.slice_bits == b.cluster >> self.slice_bits)
        {
            let mut pending = lock(&self.pending);
            let waiting = waiting.iter().filter(|waiting| pending.is_due(waiting));
            let waiting: Vec<&Waiting> = waiting.collect();
            let (Some(first), Some(last)) = (waiting.first(), waiting.last()) else {
                continue;
            };
            let mut entries = self.stored_entries(&pending, first.cluster..last.cluster + 1)?;
            for waiting in &waiting {
                entries[(waiting.cluster - first.cluster) as usize] = waiting.entry;
            }
            self.write_entries(first.cluster, &self.words(entries))?;
            for waiting in waiting {
                replaced.extend(pending.settle(waiting));
            }
        }
        Ok(())
    }

    /// Returns the entries that the file has for clusters of one slice.
    fn stored_entries(&self, pending: &Pending, clusters: Range<u64>) -> io::Result<Vec<L2Entry>> {
        let (slice, index, _) = self.place(clusters.start << self.geometry.cluster_bits);
        let cached = self.cache.read(slice, |words| {
            words
                .iter()
                .map(|word| word.load(Ordering::Relaxed))
                .collect()
        });
        let words: Vec<u64> = match cached {
            Some(words) => words,
            // Each of these entries has been inspected when it was replaced.
            None => self.load(pending, slice, |_| ())?.unwrap_or_default(),
        };
        let words = words.chunks_exact(self.geometry.entry_words() as usize);
        let entries: Vec<L2Entry> = clusters
            .clone()
            .zip(words.skip(index))
            .map(|(cluster, words)| {
                pending.stored(cluster).unwrap_or(L2Entry {
                    word: words[0],
                    bitmap: words.get(1).copied().unwrap_or(0),
                })
            })
            .collect();
        if entries.len() as u64 != clusters.end - clusters.start {
            return Err(io::Error::other("there is no L2 table to write to"));
        }
        Ok(entries)
    }

    /// Writes words of the L2 table from the entry of `cluster` on. The caller holds the lock.
    fn write_entries(&self, cluster: u64, words: &[u64]) -> io::Result<()> {
        let index = cluster & (self.geometry.l2_entries() - 1);
        let table = self.l1_entry(cluster >> self.geometry.l2_bits()).table();
        let table = table.ok_or_else(|| io::Error::other("there is no L2 table to write to"))?;
        let offset = table + index * self.geometry.entry_words() * 8;
        self.file.write_at(&to_bytes(words), offset)
    }

    /// Returns the words of entries.
    fn words(&self, entries: impl IntoIterator<Item = L2Entry>) -> Vec<u64> {
        let mut words = Vec::new();
        for entry in entries {
            words.push(entry.word);
            if self.geometry.extended {
                words.push(entry.bitmap);
            }
        }
        words
    }

    fn l1(&self) -> &L1 {
        let mut l1 = &self.first_l1;
        while let Some(next) = l1.next.get() {
            l1 = next;
        }
        l1
    }

    /// Returns an entry of the L1 table.
    pub fn l1_entry(&self, index: u64) -> L1Entry {
        self.l1().get(index)
    }

    /// Number of entries of the L1 table.
    pub fn l1_len(&self) -> u64 {
        self.l1().entries.len() as u64
    }

    /// Writes an entry of the L1 table. What the table that it points to says does not differ from what the
    /// former one said.
    ///
    /// # Errors
    /// If the host cannot write it. The file may have the old entry or the new one.
    pub fn set_l1_entry(&self, index: u64, entry: L1Entry) -> io::Result<()> {
        let _pending = lock(&self.pending);
        let l1 = self.l1();
        self.file
            .write_at(&entry.0.to_be_bytes(), l1.offset + index * 8)?;
        if let Some(place) = l1.entries.get(index as usize) {
            place.store(entry.0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Goes on with another L1 table, and forgets all slices.
    pub fn replace_l1(&self, l1: L1) {
        let _pending = lock(&self.pending);
        // Tables are replaced one after the other, under the lock, so the last one has no successor.
        let _ = self.l1().next.set(Box::new(l1));
        self.cache.clear();
    }

    /// Number of clusters that a slice maps.
    pub fn slice_clusters(&self) -> u64 {
        1 << self.slice_bits
    }

    /// Returns which slice an offset of the guest is in, the entry in it, and the offset in the cluster.
    fn place(&self, offset: u64) -> (u64, usize, u64) {
        let cluster = offset >> self.geometry.cluster_bits;
        let within = offset & (self.geometry.cluster_size() - 1);
        let index = cluster & (self.slice_clusters() - 1);
        (cluster >> self.slice_bits, index as usize, within)
    }

    /// Returns the run at `offset` if there is no L2 table.
    fn without_table(&self, offset: u64, len: u64) -> Option<Run> {
        let l1 = self.l1();
        let bits = self.geometry.l2_coverage_bits();
        let end = offset + len;
        let mut next = offset;
        while next < end && l1.get(next >> bits).table().is_none() {
            next = ((next >> bits) + 1) << bits;
        }
        (next > offset).then_some((Mapping::Unallocated, len.min(next - offset)))
    }

    /// Reads a slice into the cache, with the pending entries. `None` if there is no L2 table.
    fn load(
        &self,
        pending: &Pending,
        slice: u64,
        mut inspect: impl FnMut(L2Entry),
    ) -> io::Result<Option<Vec<u64>>> {
        let slices = self.geometry.l2_entries() / self.slice_clusters();
        let Some(table) = self.l1_entry(slice / slices).table() else {
            return Ok(None);
        };
        if table & (self.geometry.cluster_size() - 1) != 0 {
            return Err(Error::Damaged(format!("an L2 table is at {table:#x}")).into());
        }
        let words = self.cache.words();
        let mut words = read_words(&*self.file, table + slice % slices * words * 8, words)?;
        let first = slice << self.slice_bits;
        for (cluster, entry) in pending.range(first..first + self.slice_clusters()) {
            let index = (cluster - first) * self.geometry.entry_words();
            let place = words.iter_mut().skip(index as usize);
            for (place, word) in place.zip(self.words([entry])) {
                *place = word;
            }
        }
        for entry in words.chunks_exact(self.geometry.entry_words() as usize) {
            inspect(L2Entry {
                word: entry[0],
                bitmap: entry.get(1).copied().unwrap_or(0),
            });
        }
        self.cache.insert(slice, &words);
        Ok(Some(words))
    }
}

/// Returns what the bytes from `within` on are, an offset in the cluster of entry `first` of `words` words.
/// Neighbours that continue each other are one run.
fn run(
    geometry: Geometry,
    word: impl Fn(usize) -> u64,
    words: usize,
    first: usize,
    within: u64,
    len: u64,
) -> Result<Run, BadEntry> {
    let entry = |index: usize| {
        if geometry.extended {
            L2Entry {
                word: word(index * 2),
                bitmap: word(index * 2 + 1),
            }
        } else {
            L2Entry {
                word: word(index),
                bitmap: 0,
            }
        }
    };
    let entries = words / geometry.entry_words() as usize;
    let (mapping, mut run) = entry(first).mapping(geometry, within)?;
    while run < len {
        let position = within + run;
        let index = first + (position >> geometry.cluster_bits) as usize;
        if index >= entries {
            break;
        }
        let Ok((next, next_len)) =
            entry(index).mapping(geometry, position & (geometry.cluster_size() - 1))
        else {
            break;
        };
        let continues = match (mapping, next) {
            (
                Mapping::Data { host, in_place },
                Mapping::Data {
                    host: next,
                    in_place: next_in_place,
                },
            ) => host + run == next && in_place == next_in_place,
            (Mapping::Compressed(_), _) => false,
            (mapping, next) => mapping == next,
        };
        if !continues {
            break;
        }
        run += next_len;
    }
    Ok((mapping, run.min(len)))
}

/// Reads big-endian words.
pub(super) fn read_words(file: &dyn ImageFile, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    file.read_at(&mut bytes, offset)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

/// Returns `words` as big-endian bytes.
pub(super) fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}
