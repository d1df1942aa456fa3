//! Allocates and frees clusters of the file.
//!
//! It keeps one rule: *at every moment, each reference on stable storage is covered by a refcount on stable
//! storage.* Two sets of clusters make this cheap.
//!
//! - The **reserve** consists of clusters with refcount 1 that have no reference and read as zeroes, both on stable
//!   storage. A cluster from the reserve may be referred to without a sync: a crash leaves it with zeroes or with
//!   what was written to it, never with old bytes from elsewhere. One sync adds many clusters to it.
//! - **Freed** clusters are those whose last reference may still be on stable storage. Their refcounts are
//!   lowered after the next sync, usually a flush of the guest.
//!
//! A crash leaks the clusters of both sets. A check frees them.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, RwLock};

use super::error::Error;
use super::header::{Field, MAX_REFCOUNT_TABLE_BYTES};
use super::locks::{SyncGate, lock, read, write};
use super::overlap::{Kind, Metadata};
use super::refcounts::{Refcounts, WRITE, WRITE_DURABLY, WriteTo};
use super::reserve::Reserve;
use crate::ImageFile;

/// By how many bytes the reserve is filled first. Each time, it is [`GROWTH`] times as many as the time before.
const MIN_RESERVE: u64 = 4 << 20;
/// By how many bytes the reserve is filled at most. They take no storage before they are written.
const MAX_RESERVE: u64 = 256 << 20;
const GROWTH: u64 = 4;
/// By how many clusters the reserve is filled at least.
const MIN_RESERVE_CLUSTERS: u64 = 8;
/// Most refcount blocks, new or not, that are written durably one by one, in place of a sync.
const MAX_DURABLE_BLOCKS: u64 = 2;
/// Maximum number of refcount blocks that are searched for free clusters at a time.
const MAX_SEARCH: u32 = 64;
/// Maximum number of places behind the end of the file that are tried. Only a damaged image has used clusters at
/// many of them.
const MAX_TRIES: u32 = 1024;
/// Number of freed runs of clusters after which a sync is due.
pub(super) const MAX_FREED: usize = 1 << 14;

/// Manages the clusters of a file.
#[derive(Debug)]
pub(super) struct Allocator {
    file: Arc<dyn ImageFile>,
    gate: Arc<SyncGate>,
    metadata: Arc<RwLock<Metadata>>,
    pub refcounts: Refcounts,
    cluster_bits: u32,
    /// Size of the file in bytes. What is beyond reads as zeroes. If the file has a fixed size, this is where its used
    /// part ends, and what is beyond holds anything.
    file_size: u64,
    /// Number of whole clusters of a file of a fixed size.
    most_clusters: Option<u64>,
    /// Where the search for free clusters goes on.
    search: u64,
    /// Whether stable storage has nothing behind the end of the file, as there was a sync since it was last cut
    /// off.
    is_end_stable: bool,
    reserve: Arc<Mutex<Reserve>>,
    /// How many clusters are added to the reserve the next time.
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
        fixed_size: Option<u64>,
    ) -> Allocator {
        Allocator {
            file,
            gate,
            metadata,
            refcounts,
            cluster_bits,
            file_size,
            most_clusters: fixed_size.map(|size| size >> cluster_bits),
            search: 0,
            is_end_stable: false,
            reserve: Arc::default(),
            reserve_clusters: (MIN_RESERVE >> cluster_bits).max(MIN_RESERVE_CLUSTERS),
            freed: Vec::new(),
        }
    }

    /// Size of the file in bytes; if that is fixed, where its used part ends, once [`Self::find_end`] was called.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// Finds out where the used part of a file of a fixed size ends. Its refcounts are right.
    ///
    /// # Errors
    /// If the image is damaged or the host cannot read it.
    pub fn find_end(&mut self) -> io::Result<()> {
        if let Some(most) = self.most_clusters {
            let end = self.refcounts.end_of_used()?.min(most);
            self.file_size = end << self.cluster_bits;
        }
        Ok(())
    }

    /// Takes between one and `count` clusters that follow each other, from the reserve.
    ///
    /// # Errors
    /// If there are none and the host has no room for more, or the image is damaged.
    pub fn take(&mut self, count: u64) -> io::Result<Range<u64>> {
        loop {
            // The lock is not held while the reserve is filled.
            let taken = lock(&self.reserve).take(count);
            if let Some(taken) = taken {
                return Ok(taken);
            }
            self.refill()?;
        }
    }

    /// Returns the reserve, from which clusters can be taken without the allocator.
    pub fn reserve(&self) -> &Arc<Mutex<Reserve>> {
        &self.reserve
    }

    /// Fills the reserve if it is low.
    ///
    /// # Errors
    /// Those of [`Self::take`].
    pub fn fill_reserve(&mut self) -> io::Result<()> {
        let is_low = lock(&self.reserve).is_low();
        if is_low { self.refill() } else { Ok(()) }
    }

    /// Takes exactly `count` clusters that follow each other. They are like those of the reserve.
    ///
    /// # Errors
    /// Those of [`Self::take`].
    pub fn take_contiguous(&mut self, count: u64) -> io::Result<Range<u64>> {
        let tail = match self.plan_tail(count) {
            Err(error) if self.is_full(&error) => {
                // The reserve can have all that is left.
                self.give_back()?;
                if let Some(run) = self.find_run(count)? {
                    self.make_reserve(std::slice::from_ref(&run), None)?;
                    return Ok(run);
                }
                self.plan_tail(count)?
            }
            tail => tail?,
        };
        self.make_reserve(&[], Some(&tail))?;
        Ok(tail.clusters)
    }

    /// Finds `count` free clusters that follow each other within the file.
    fn find_run(&mut self, count: u64) -> io::Result<Option<Range<u64>>> {
        let (end, per_block) = (self.end(), self.refcounts.per_block());
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut next = 0;
        while next < end {
            let block_end = end.min((next / per_block + 1) * per_block);
            self.refcounts
                .free_runs(next..block_end, u64::MAX, &mut runs)?;
            if let Some(run) = runs.iter().find(|run| run.end - run.start >= count) {
                return Ok(Some(run.start..run.start + count));
            }
            // Only the last one can go on in the next block.
            runs.drain(..runs.len().saturating_sub(1));
            next = block_end;
        }
        Ok(None)
    }

    /// Frees clusters that have lost a reference. They can be used again after a sync.
    pub fn free(&mut self, clusters: Range<u64>) {
        match self.freed.last_mut() {
            _ if clusters.is_empty() => {}
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.freed.push(clusters),
        }
    }

    /// Whether something has been freed that can be used again after a sync.
    pub fn has_freed(&self) -> bool {
        !self.freed.is_empty()
    }

    /// Whether so much has been freed that a sync is due.
    pub fn has_many_freed(&self) -> bool {
        self.freed.len() > MAX_FREED
    }

    /// Returns what has been freed so far. The caller passes it to [`Self::release`] after a sync.
    pub fn take_freed(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.freed)
    }

    /// Takes back freed clusters because the sync has failed.
    pub fn keep_freed(&mut self, clusters: Vec<Range<u64>>) {
        self.freed.extend(clusters);
    }

    /// Lowers the refcounts of clusters that have lost a reference on stable storage too.
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
        let mut reserve = lock(&self.reserve).take_all();
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
            self.is_end_stable = false;
            if self.most_clusters.is_none() {
                self.file.set_size(size)?;
            }
            self.file_size = size;
        }
        Ok(())
    }

    /// Adds about [`Self::reserve_clusters`] clusters to the reserve.
    fn refill(&mut self) -> io::Result<()> {
        let count = self.reserve_clusters;
        let (holes, tail) = self.find_free(count)?;
        self.make_reserve(&holes, tail.as_ref())?;
        let tail = tail.map(|tail| tail.clusters);
        lock(&self.reserve).fill(holes.into_iter().chain(tail));
        let most = (MAX_RESERVE >> self.cluster_bits).max(MIN_RESERVE_CLUSTERS);
        self.reserve_clusters = (count * GROWTH).min(most);
        Ok(())
    }

    /// Finds about `count` free clusters, and at least one.
    fn find_free(&mut self, count: u64) -> io::Result<(Vec<Range<u64>>, Option<Tail>)> {
        let mut holes = Vec::new();
        loop {
            let missing = self.find_holes(count, &mut holes)?;
            // One large run is worth more than the last few holes.
            if missing <= count / 2 {
                return Ok((holes, None));
            }
            match self.plan_reserve_tail(missing) {
                // There is no room behind what is used, but there may be holes in it.
                Err(error) if self.is_full(&error) => {
                    if !holes.is_empty() {
                        return Ok((holes, None));
                    } else if self.search >= self.end() {
                        return Err(error);
                    }
                }
                tail => return Ok((holes, Some(tail?))),
            }
        }
    }

    /// Adds runs of free clusters that it finds within the file, and returns how many are missing to `count`.
    fn find_holes(&mut self, count: u64, holes: &mut Vec<Range<u64>>) -> io::Result<u64> {
        let end = self.end();
        let per_block = self.refcounts.per_block();
        let mut missing = count;
        let mut searched = 0;
        while self.search < end && missing > 0 && searched < MAX_SEARCH {
            let block_end = end.min((self.search / per_block + 1) * per_block);
            let found = holes.len();
            self.search = self
                .refcounts
                .free_runs(self.search..block_end, missing, holes)?;
            // A run that goes on is counted in part only, which makes the reserve larger at most.
            missing -= missing.min(holes[found..].iter().map(|run| run.end - run.start).sum());
            searched += 1;
        }
        Ok(missing)
    }

    /// Finds `count` clusters behind everything that is used, or fewer if a file of a fixed size has no room for more.
    fn plan_reserve_tail(&mut self, mut count: u64) -> io::Result<Tail> {
        loop {
            match self.plan_tail(count) {
                Err(error) if self.is_full(&error) && count > 1 => count /= 2,
                tail => return tail,
            }
        }
    }

    /// Finds `count` clusters behind everything that is used.
    ///
    /// # Errors
    /// If the image is damaged or cannot become that large; [`io::ErrorKind::StorageFull`] if a file of a fixed size has
    /// no room.
    fn plan_tail(&mut self, count: u64) -> io::Result<Tail> {
        let mut start = self.end();
        for _ in 0..MAX_TRIES {
            let tail = self.tail_at(start, count);
            self.check_room(tail.all().end)?;
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

    /// Whether `error` says that a file of a fixed size has no room behind what is used.
    fn is_full(&self, error: &io::Error) -> bool {
        self.most_clusters.is_some() && error.kind() == io::ErrorKind::StorageFull
    }

    /// Refuses to use more clusters than a file of a fixed size has.
    fn check_room(&self, clusters: u64) -> io::Result<()> {
        match self.most_clusters {
            Some(most) if clusters > most => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            _ => Ok(()),
        }
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

    /// Gives clusters refcount 1 and zeroes, both on stable storage.
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
        if let (true, [], Some(tail)) = (self.is_end_stable, holes, tail)
            && self.most_clusters.is_none()
            && self.refcounts.blocks_of(&tail.all()) <= MAX_DURABLE_BLOCKS
        {
            return self.write_tail_durably(tail);
        }
        for run in holes {
            self.refcounts.set(run.clone(), 1)?;
            self.clear(run)?;
        }
        if let Some(tail) = tail {
            let all = tail.all();
            self.extend_to(all.end)?;
            self.count_tail(&all, &tail.blocks, WRITE)?;
        }
        self.refcounts.write_back()?;
        self.gate.sync()?;
        self.is_end_stable = true;
        // A block is in the table before those that it counts.
        let (own, others) = tail.map_or((&[][..], &[][..]), |tail| tail.blocks.split_at(tail.own));
        for blocks in [own, others]
            .into_iter()
            .filter(|blocks| !blocks.is_empty())
        {
            for &(index, offset) in blocks {
                self.add_block(index, offset, WRITE)?;
            }
            self.gate.sync()?;
        }
        Ok(())
    }

    /// Makes clusters behind the end of the file a reserve, with no sync: that would also have to wait for all
    /// that the guest has written.
    fn write_tail_durably(&mut self, tail: &Tail) -> io::Result<()> {
        let all = tail.all();
        let size = all.end << self.cluster_bits;
        if size > self.file_size {
            self.file.write_durably(&[0], size - 1)?;
            self.grown_to(all.end);
        }
        self.count_tail(&all, &tail.blocks, WRITE_DURABLY)?;
        self.refcounts.write_back_durably()?;
        // Those that count themselves come first, as a block is in the table before those that it counts.
        for &(index, offset) in &tail.blocks {
            self.add_block(index, offset, WRITE_DURABLY)?;
        }
        Ok(())
    }

    /// Enters a block into the table. It is on stable storage already.
    fn add_block(&mut self, index: u64, offset: u64, write_to: WriteTo) -> io::Result<()> {
        self.refcounts.add_block(index, offset, write_to)?;
        write(&self.metadata).add(offset >> self.cluster_bits, Kind::RefcountBlock);
        Ok(())
    }

    /// Counts the clusters `all`, in new blocks and those that exist.
    fn count_tail(
        &mut self,
        all: &Range<u64>,
        blocks: &[(u64, u64)],
        write_to: WriteTo,
    ) -> io::Result<()> {
        let per_block = self.refcounts.per_block();
        for &(index, offset) in blocks {
            self.refcounts.write_block(index, offset, all, write_to)?;
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
        self.extend_to(all.end)?;
        self.count_tail(&all, &tail.blocks, WRITE)?;
        self.refcounts.write_back()?;
        self.refcounts.write_table(&table, offset)?;
        self.gate.sync()?;
        let field = Field::RefcountTable {
            offset,
            clusters: clusters as u32,
        };
        let (place, bytes) = field.bytes();
        if let Err(error) = self.file.write_at(&bytes, place) {
            // The header may name either table.
            self.gate.fail();
            return Err(error);
        }
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

    /// Makes the file at least as long as `clusters` clusters. What is added reads as zeroes.
    fn extend_to(&mut self, clusters: u64) -> io::Result<()> {
        let size = clusters << self.cluster_bits;
        if size > self.file_size {
            self.check_room(clusters)?;
            match self.most_clusters {
                None => self.file.set_size(size)?,
                Some(_) => self.zero(self.file_size..size)?,
            }
            self.grown_to(clusters);
        }
        Ok(())
    }

    fn grown_to(&mut self, clusters: u64) {
        self.file_size = clusters << self.cluster_bits;
        write(&self.metadata).file_clusters = clusters;
    }

    /// Makes clusters read as zeroes.
    fn clear(&self, clusters: &Range<u64>) -> io::Result<()> {
        let bytes = self.bytes(clusters);
        let end = bytes.end.min(self.file_size);
        if bytes.start >= end {
            return Ok(());
        }
        self.zero(bytes.start..end)
    }

    /// Makes bytes read as zeroes.
    fn zero(&self, bytes: Range<u64>) -> io::Result<()> {
        match self.file.punch_hole(bytes.clone()) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.file.write_zeroes(bytes)
            }
            result => result,
        }
    }

    fn bytes(&self, clusters: &Range<u64>) -> Range<u64> {
        clusters.start << self.cluster_bits..clusters.end << self.cluster_bits
    }
}
