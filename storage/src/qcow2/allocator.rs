//! Which clusters of the file are free, taken and freed.
//!
//! The rule that everything here serves: *at every moment, stable storage holds no reference to a cluster
//! whose refcount there does not count it.* Two sets of clusters in between make it cheap.
//!
//! - The **reserve** has clusters with refcount 1 that nothing refers to, and that read as zeroes. Both are on
//!   stable storage. A cluster from it can be referred to at any time, and a crash at any time leaves
//!   zeroes or what was written, never old bytes of another place. One sync fills it with many clusters.
//! - **Freed** clusters are those to which nothing refers any more, except perhaps stable storage. Their
//!   refcounts are lowered after the next sync, which the guest's own flushes bring about.
//!
//! What a crash leaves in the two sets is leaked, and a check frees it.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, RwLock};

use super::error::Error;
use super::header::{Field, MAX_REFCOUNT_TABLE_BYTES};
use super::locks::{SyncGate, read, write};
use super::overlap::{Kind, Metadata};
use super::refcounts::Refcounts;
use crate::ImageFile;

/// Bytes of the first reserve. Each one is twice as large as that before.
const MIN_RESERVE: u64 = 4 << 20;
/// Most bytes of a reserve.
const MAX_RESERVE: u64 = 64 << 20;
/// Least clusters of a reserve.
const MIN_RESERVE_CLUSTERS: u64 = 8;
/// Most refcount blocks that are searched for holes at a time.
const MAX_SEARCH: u32 = 64;
/// Most places behind the end of the file that are tried. Only a damaged image has used clusters there.
const MAX_TRIES: u32 = 1024;
/// Most runs of clusters that wait to be freed, after which a sync is due.
pub(super) const MAX_FREED: usize = 1 << 14;

/// Manages the clusters of a file.
#[derive(Debug)]
pub(super) struct Allocator {
    file: Arc<dyn ImageFile>,
    gate: Arc<SyncGate>,
    metadata: Arc<RwLock<Metadata>>,
    pub refcounts: Refcounts,
    cluster_bits: u32,
    /// Size of the file in bytes. What is beyond reads as zeroes.
    file_size: u64,
    /// Where the search for holes goes on.
    search: u64,
    reserve: Vec<Range<u64>>,
    reserve_clusters: u64,
    freed: Vec<Range<u64>>,
}

/// Clusters at the end of the file that are to be taken, and the blocks that count them.
struct Tail {
    clusters: Range<u64>,
    /// Index and offset of each new block. They follow the clusters.
    blocks: Vec<(u64, u64)>,
    /// How many of the blocks, the first ones, count themselves. The others are counted by these or by
    /// blocks that exist already.
    own: usize,
}

impl Tail {
    fn all(&self) -> Range<u64> {
        self.clusters.start..self.clusters.end + self.blocks.len() as u64
    }
}

impl Allocator {
    pub fn new(
        file: Arc<dyn ImageFile>,
        gate: Arc<SyncGate>,
        metadata: Arc<RwLock<Metadata>>,
        refcounts: Refcounts,
        cluster_bits: u32,
        file_size: u64,
    ) -> Allocator {
        Allocator {
            file,
            gate,
            metadata,
            refcounts,
            cluster_bits,
            file_size,
            search: 0,
            reserve: Vec::new(),
            reserve_clusters: (MIN_RESERVE >> cluster_bits).max(MIN_RESERVE_CLUSTERS),
            freed: Vec::new(),
        }
    }

    /// Size of the file in bytes.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// Takes between one and `count` clusters that follow each other, from the reserve.
    ///
    /// # Errors
    /// If there are none and the host has no room for more, or the image is damaged.
    pub fn take(&mut self, count: u64) -> io::Result<Range<u64>> {
        if self.reserve.is_empty() {
            self.refill(self.reserve_clusters)?;
            let most = (MAX_RESERVE >> self.cluster_bits).max(MIN_RESERVE_CLUSTERS);
            self.reserve_clusters = (self.reserve_clusters * 2).min(most);
        }
        let run = self.reserve.last_mut().ok_or(io::ErrorKind::StorageFull)?;
        let taken = run.start..run.end.min(run.start + count);
        run.start = taken.end;
        if run.is_empty() {
            self.reserve.pop();
        }
        Ok(taken)
    }

    /// Takes `count` clusters that follow each other, as if from the reserve.
    ///
    /// # Errors
    /// Those of [`Self::take`].
    pub fn take_contiguous(&mut self, count: u64) -> io::Result<Range<u64>> {
        let tail = self.plan_tail(count)?;
        self.make_reserve(&[], Some(&tail))?;
        Ok(tail.clusters)
    }

    /// Frees clusters to which nothing refers any more. They can be used again after a sync.
    pub fn free(&mut self, clusters: Range<u64>) {
        match self.freed.last_mut() {
            _ if clusters.is_empty() => {}
            // A cluster is freed twice if two compressed clusters have shared it.
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.freed.push(clusters),
        }
    }

    /// Whether so much has been freed that a sync is due.
    pub fn has_many_freed(&self) -> bool {
        self.freed.len() > MAX_FREED
    }

    /// Returns what has been freed so far. It goes to [`Self::release`] after a sync that begins later.
    pub fn take_freed(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.freed)
    }

    /// Keeps clusters freed whose sync has failed.
    pub fn keep_freed(&mut self, clusters: Vec<Range<u64>>) {
        self.freed.extend(clusters);
    }

    /// Lowers the refcounts of clusters to which stable storage does not refer any more.
    ///
    /// # Errors
    /// If the image is damaged or the host cannot write. Clusters are leaked then.
    pub fn release(&mut self, clusters: Vec<Range<u64>>) -> io::Result<()> {
        let mut holes: Vec<Range<u64>> = Vec::new();
        let mut result = Ok(());
        for run in clusters {
            let freed = |cluster| match holes.last_mut() {
                Some(hole) if hole.end == cluster => hole.end += 1,
                _ => holes.push(cluster..cluster + 1),
            };
            result = result.and(self.refcounts.add(run, -1, freed));
        }
        result = result.and(self.refcounts.write_back());
        for hole in holes {
            self.search = self.search.min(hole.start);
            // Only storage is lost if the host cannot do it.
            let _ = self.file.punch_hole(self.bytes(&hole));
        }
        result
    }

    /// Gives the reserve back.
    ///
    /// # Errors
    /// If the host cannot write. The reserve is leaked then.
    pub fn give_back(&mut self) -> io::Result<()> {
        let mut end = self.file_size.div_ceil(1 << self.cluster_bits);
        let mut reserve = std::mem::take(&mut self.reserve);
        reserve.sort_unstable_by_key(|run| run.start);
        for run in reserve.iter().rev() {
            self.refcounts.set(run.clone(), 0)?;
            self.search = self.search.min(run.start);
            if run.end == end {
                end = run.start;
            }
        }
        self.refcounts.write_back()?;
        let size = end << self.cluster_bits;
        if size < self.file_size {
            self.file.set_size(size)?;
            self.file_size = size;
        }
        Ok(())
    }

    /// Adds about `count` clusters to the reserve.
    fn refill(&mut self, count: u64) -> io::Result<()> {
        let end = self.end();
        let per_block = self.refcounts.per_block();
        let mut holes = Vec::new();
        let mut missing = count;
        let mut searched = 0;
        while self.search < end && missing > 0 && searched < MAX_SEARCH {
            let block_end = end.min((self.search / per_block + 1) * per_block);
            let found = holes.len();
            self.search = self
                .refcounts
                .free_runs(self.search..block_end, missing, &mut holes)?;
            // A run that goes on is counted in part only, which makes the reserve larger at most.
            missing -= missing.min(holes[found..].iter().map(|run| run.end - run.start).sum());
            searched += 1;
        }
        // One large run is worth more than the last few holes.
        let tail = if missing > count / 2 {
            Some(self.plan_tail(missing)?)
        } else {
            None
        };
        self.make_reserve(&holes, tail.as_ref())?;
        self.reserve.extend(holes);
        self.reserve.extend(tail.map(|tail| tail.clusters));
        self.reserve.reverse();
        Ok(())
    }

    /// Finds `count` clusters behind everything that is used.
    fn plan_tail(&mut self, count: u64) -> io::Result<Tail> {
        let mut start = self.end();
        for _ in 0..MAX_TRIES {
            let tail = self.tail_at(start, count);
            let last = tail.all().end - 1;
            let needed = last / self.refcounts.per_block() + 1;
            if needed > self.refcounts.table_len() {
                self.grow_table(start, needed)?;
                start = start.max(self.end());
                continue;
            }
            // A crash may have cut the file off behind which clusters are counted.
            match self.last_used(tail.all())? {
                Some(used) => start = used + 1,
                None => return Ok(tail),
            }
        }
        Err(io::Error::other(
            "there are used clusters behind the end of the image",
        ))
    }

    /// Returns the first cluster behind the end of the file.
    fn end(&self) -> u64 {
        self.file_size.div_ceil(1 << self.cluster_bits).max(1)
    }

    /// Returns which blocks are missing if `count` clusters are taken at `start`.
    fn tail_at(&self, start: u64, count: u64) -> Tail {
        let clusters = start..start + count;
        let mut blocks = 0;
        loop {
            let missing = self.refcounts.missing_blocks(start..clusters.end + blocks);
            if missing.len() as u64 <= blocks {
                return self.place_blocks(clusters, missing);
            }
            blocks = missing.len() as u64;
        }
    }

    /// Places new blocks behind `clusters`.
    fn place_blocks(&self, clusters: Range<u64>, mut missing: BTreeSet<u64>) -> Tail {
        let places = clusters.end..clusters.end + missing.len() as u64;
        let mut blocks = Vec::with_capacity(missing.len());
        let mut rest = Vec::new();
        for place in places {
            let index = place / self.refcounts.per_block();
            if missing.remove(&index) {
                blocks.push((index, place << self.cluster_bits));
            } else {
                rest.push(place << self.cluster_bits);
            }
        }
        let own = blocks.len();
        blocks.extend(missing.into_iter().zip(rest));
        Tail {
            clusters,
            blocks,
            own,
        }
    }

    /// Returns the last cluster of a range that is not free.
    fn last_used(&mut self, clusters: Range<u64>) -> io::Result<Option<u64>> {
        for cluster in clusters.rev() {
            if self.refcounts.get(cluster)? != 0 {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    /// Makes clusters what those of the reserve are: counted, zeroes, and both on stable storage.
    fn make_reserve(&mut self, holes: &[Range<u64>], tail: Option<&Tail>) -> io::Result<()> {
        let tail_clusters = tail.map_or(0..0, Tail::all);
        for run in holes.iter().chain([&tail_clusters]) {
            if let Some(kind) = read(&self.metadata).find(run.clone()) {
                let start = run.start << self.cluster_bits;
                return Err(
                    Error::Damaged(format!("{kind} at or behind {start:#x} is free")).into(),
                );
            }
        }
        let result = self.write_reserve(holes, tail);
        if result.is_err() {
            // Nothing refers to them, so this is right at any time. What cannot be written is leaked.
            self.refcounts.forget();
            for run in holes.iter().chain(tail.map(|tail| &tail.clusters)) {
                let _ = self.refcounts.set(run.clone(), 0);
            }
            let _ = self.refcounts.write_back();
        }
        result
    }

    fn write_reserve(&mut self, holes: &[Range<u64>], tail: Option<&Tail>) -> io::Result<()> {
        for run in holes {
            self.refcounts.set(run.clone(), 1)?;
            self.clear(run)?;
        }
        if let Some(tail) = tail {
            let all = tail.all();
            self.count_tail(&all, &tail.blocks)?;
            self.extend_to(all.end)?;
        }
        self.refcounts.write_back()?;
        self.gate.sync()?;
        // A block is in the table before those that it counts.
        let (own, others) = tail.map_or((&[][..], &[][..]), |tail| tail.blocks.split_at(tail.own));
        for blocks in [own, others]
            .into_iter()
            .filter(|blocks| !blocks.is_empty())
        {
            for &(index, offset) in blocks {
                self.refcounts.add_block(index, offset)?;
                write(&self.metadata).add(offset >> self.cluster_bits, Kind::RefcountBlock);
            }
            self.gate.sync()?;
        }
        Ok(())
    }

    /// Counts the clusters `all`, in new blocks and those that exist.
    fn count_tail(&mut self, all: &Range<u64>, blocks: &[(u64, u64)]) -> io::Result<()> {
        let per_block = self.refcounts.per_block();
        for &(index, offset) in blocks {
            self.refcounts.write_block(index, offset, all)?;
        }
        for index in all.start / per_block..all.end.div_ceil(per_block) {
            if !blocks.iter().any(|&(new, _)| new == index) {
                let counted =
                    all.start.max(index * per_block)..all.end.min((index + 1) * per_block);
                self.refcounts.set(counted, 1)?;
            }
        }
        Ok(())
    }

    /// Moves the refcount table to a place from `start` on, where it has at least `needed` entries.
    ///
    /// The new table, and the blocks that count it, are on stable storage before the header names it.
    fn grow_table(&mut self, start: u64, needed: u64) -> io::Result<()> {
        let mut start = start;
        let mut entries = needed.max(self.refcounts.table_len() * 2);
        let (clusters, tail) = loop {
            let clusters = (entries * 8).div_ceil(1 << self.cluster_bits);
            if clusters << self.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                let error =
                    "the refcount table of the image cannot grow: convert it to larger clusters";
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, error));
            }
            let tail = self.tail_at(start, clusters);
            let covered = (clusters << self.cluster_bits >> 3) * self.refcounts.per_block();
            if tail.all().end > covered {
                entries *= 2;
            } else if let Some(used) = self.last_used(tail.all())? {
                start = used + 1;
                entries += 1;
            } else {
                break (clusters, tail);
            }
        };
        let all = tail.all();
        let offset = tail.clusters.start << self.cluster_bits;
        let table = self.refcounts.grown_table(clusters, &tail.blocks);
        self.count_tail(&all, &tail.blocks)?;
        self.refcounts.write_back()?;
        self.refcounts.write_table(&table, offset)?;
        self.extend_to(all.end)?;
        self.gate.sync()?;
        let field = Field::RefcountTable {
            offset,
            clusters: clusters as u32,
        };
        let (place, bytes) = field.bytes();
        self.file.write_at(&bytes, place)?;
        self.gate.sync()?;
        let old = self.refcounts.table_clusters();
        self.refcounts.use_table(table, offset);
        let mut metadata = write(&self.metadata);
        metadata.replace(Kind::RefcountTable, self.refcounts.table_clusters());
        for &(_, offset) in &tail.blocks {
            metadata.add(offset >> self.cluster_bits, Kind::RefcountBlock);
        }
        drop(metadata);
        self.free(old);
        Ok(())
    }

    /// Makes the file at least as long as `clusters` clusters.
    fn extend_to(&mut self, clusters: u64) -> io::Result<()> {
        let size = clusters << self.cluster_bits;
        if size > self.file_size {
            self.file.set_size(size)?;
            self.file_size = size;
            write(&self.metadata).file_clusters = clusters;
        }
        Ok(())
    }

    /// Makes clusters read as zeroes.
    fn clear(&self, clusters: &Range<u64>) -> io::Result<()> {
        let bytes = self.bytes(clusters);
        let end = bytes.end.min(self.file_size);
        if bytes.start >= end {
            return Ok(());
        }
        match self.file.punch_hole(bytes.start..end) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                write_zeroes(&*self.file, bytes.start..end)
            }
            result => result,
        }
    }

    fn bytes(&self, clusters: &Range<u64>) -> Range<u64> {
        clusters.start << self.cluster_bits..clusters.end << self.cluster_bits
    }
}

/// Writes zeroes to a range of a file.
pub(super) fn write_zeroes(file: &dyn ImageFile, range: Range<u64>) -> io::Result<()> {
    const ZEROES: [u8; 65536] = [0; 65536];
    let mut next = range.start;
    while next < range.end {
        let len = (range.end - next).min(ZEROES.len() as u64);
        file.write_at(&ZEROES[..len as usize], next)?;
        next += len;
    }
    Ok(())
}
