//! The active L1 table, in memory, and L2 tables, in the file with a cache.
//!
//! A changed entry is written to the file before anyone sees it in memory, so what was acknowledged is in the
//! file even if the process is killed. The lock is held for such a write, never for a sync.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::cache::SliceCache;
use super::entry::{BadEntry, Geometry, L1Entry, L2Entry, Mapping};
use super::error::Error;
use super::locks::{lock, read, try_read, write};
use crate::ImageFile;

/// What the first bytes of a range are.
pub(super) type Run = (Mapping, u64);

/// The active L1 table and where it is.
#[derive(Debug)]
pub(super) struct L1 {
    pub offset: u64,
    pub entries: Vec<AtomicU64>,
}

impl L1 {
    /// Reads a table of `entries` entries. Their number has been checked.
    pub fn read(file: &dyn ImageFile, offset: u64, entries: u64) -> io::Result<L1> {
        let words = read_words(file, offset, entries)?;
        Ok(L1 {
            offset,
            entries: words.into_iter().map(AtomicU64::new).collect(),
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
    l1: RwLock<L1>,
    cache: SliceCache,
    /// Held by who reads an L2 table into the cache, or changes an entry: a slice that was read before a
    /// change must not get into the cache after it.
    lock: Mutex<()>,
}

impl Tables {
    pub fn new(file: Arc<dyn ImageFile>, geometry: Geometry, l1: L1, cache_bytes: u64) -> Tables {
        let cache = SliceCache::new(cache_bytes, geometry.cluster_size());
        Tables {
            file,
            geometry,
            slice_bits: (cache.words() / geometry.entry_words()).ilog2(),
            l1: RwLock::new(l1),
            cache,
            lock: Mutex::new(()),
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
        cached.or_else(|| {
            Some(Ok(self.without_table(
                offset,
                len,
                &*try_read(&self.l1)?,
            )?))
        })
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
        let guard = lock(&self.lock);
        let Some(words) = self.load(slice, inspect)? else {
            let end = (slice + 1) << (self.slice_bits + self.geometry.cluster_bits);
            return Ok(Ok((Mapping::Unallocated, len.min(end - offset))));
        };
        drop(guard);
        let word = |index: usize| words.get(index).copied().unwrap_or(0);
        Ok(run(self.geometry, word, words.len(), index, within, len))
    }

    /// Returns the entries of `clusters`, which are in one slice.
    pub fn entries(
        &self,
        clusters: Range<u64>,
        inspect: impl FnMut(L2Entry),
    ) -> io::Result<Vec<L2Entry>> {
        let (slice, index, _) = self.place(clusters.start << self.geometry.cluster_bits);
        let words_per_entry = self.geometry.entry_words() as usize;
        let take = |word: &dyn Fn(usize) -> u64| {
            (0..(clusters.end - clusters.start) as usize)
                .map(|entry| {
                    let first = (index + entry) * words_per_entry;
                    let bitmap = if words_per_entry == 2 {
                        word(first + 1)
                    } else {
                        0
                    };
                    L2Entry {
                        word: word(first),
                        bitmap,
                    }
                })
                .collect()
        };
        let cached = self.cache.read(slice, |words| {
            take(&|index| {
                words
                    .get(index)
                    .map_or(0, |word| word.load(Ordering::Relaxed))
            })
        });
        if let Some(entries) = cached {
            return Ok(entries);
        }
        let _guard = lock(&self.lock);
        let words = self.load(slice, inspect)?.unwrap_or_default();
        Ok(take(&|index| words.get(index).copied().unwrap_or(0)))
    }

    /// Writes the entries of clusters from `cluster` on, which are in one slice and have an L2 table that can be
    /// written in place.
    ///
    /// # Errors
    /// If the host cannot write them. The file may have the old entries or the new ones.
    pub fn store(&self, cluster: u64, entries: &[L2Entry]) -> io::Result<()> {
        let (slice, index, _) = self.place(cluster << self.geometry.cluster_bits);
        let l2_index = cluster & (self.geometry.l2_entries() - 1);
        let entry_bytes = self.geometry.entry_words() * 8;
        let mut words = Vec::with_capacity(entries.len() * 2);
        for entry in entries {
            words.push(entry.word);
            if self.geometry.extended {
                words.push(entry.bitmap);
            }
        }
        let _guard = lock(&self.lock);
        let table = self.l1_entry(cluster >> self.geometry.l2_bits()).table();
        let table = table.ok_or_else(|| io::Error::other("there is no L2 table to write to"))?;
        let result = self
            .file
            .write_at(&to_bytes(&words), table + l2_index * entry_bytes);
        if result.is_ok() {
            let first = index * self.geometry.entry_words() as usize;
            self.cache.update(slice, first, &words);
        } else {
            self.cache.remove(slice);
        }
        result
    }

    /// Returns an entry of the L1 table.
    pub fn l1_entry(&self, index: u64) -> L1Entry {
        read(&self.l1).get(index)
    }

    /// Number of entries of the L1 table.
    pub fn l1_len(&self) -> u64 {
        read(&self.l1).entries.len() as u64
    }

    /// Writes an entry of the L1 table. What the table that it points to says does not differ from what the
    /// former one said.
    ///
    /// # Errors
    /// If the host cannot write it. The file may have the old entry or the new one.
    pub fn set_l1_entry(&self, index: u64, entry: L1Entry) -> io::Result<()> {
        let _guard = lock(&self.lock);
        let l1 = read(&self.l1);
        self.file
            .write_at(&entry.0.to_be_bytes(), l1.offset + index * 8)?;
        if let Some(place) = l1.entries.get(index as usize) {
            place.store(entry.0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Goes on with another L1 table, and forgets all slices.
    pub fn replace_l1(&self, l1: L1) {
        let _guard = lock(&self.lock);
        *write(&self.l1) = l1;
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
    fn without_table(&self, offset: u64, len: u64, l1: &L1) -> Option<Run> {
        let coverage = self.geometry.l2_coverage();
        let end = offset + len;
        let mut next = offset;
        while next < end && l1.get(next / coverage).table().is_none() {
            next = (next / coverage + 1) * coverage;
        }
        (next > offset).then_some((Mapping::Unallocated, len.min(next - offset)))
    }

    /// Reads a slice into the cache. `None` if there is no L2 table. The caller holds the lock.
    fn load(&self, slice: u64, mut inspect: impl FnMut(L2Entry)) -> io::Result<Option<Vec<u64>>> {
        let slices = self.geometry.l2_entries() / self.slice_clusters();
        let Some(table) = self.l1_entry(slice / slices).table() else {
            return Ok(None);
        };
        if table & (self.geometry.cluster_size() - 1) != 0 {
            return Err(Error::Damaged(format!("an L2 table is at {table:#x}")).into());
        }
        let words = self.cache.words();
        let words = read_words(&*self.file, table + slice % slices * words * 8, words)?;
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
