//! Reads and writes disk images in the qcow2 format, versions 2 and 3.
//!
//! An image is a file that is divided into clusters. Two levels of tables (L1 and L2) map clusters of the disk to
//! clusters of the file, and two levels of refcounts say how many references each cluster of the file has. What
//! is not mapped comes from the backing file. The [specification] is QEMU's; the tests compare with QEMU's
//! tools.
//!
//! # Crash consistency
//! A crash of the host may keep any part of what was written since the last sync, in any order. Each reference
//! on stable storage is covered by a refcount there at every moment, so a crash leaks clusters at most, and a
//! check frees them. `allocator.rs` says how this is kept cheap.
//!
//! Each sector that was written and not flushed holds its old bytes or its new ones after a crash. Therefore a new
//! cluster that replaces anything but zeroes has to be on stable storage before the file has its L2 entry. The first
//! write to a cluster of a backing file or snapshot does not sync for this reason: it leaves the entry *pending*, in
//! memory only. A flush syncs the data, writes the pending entries and syncs them. If more than
//! [`Options::max_pending`] clusters are pending, the request that exceeds this syncs the data of all of them and
//! writes their entries.
//!
//! All other metadata is written through: the file has it when a request ends. If only the process is killed,
//! what was flushed is kept, and so are all acknowledged writes, except those to pending clusters. These hold the bytes
//! of before their first write, as after a power failure of a disk with a volatile cache.
//!
//! Images with lazy refcounts are rebuilt if they are dirty, and otherwise written like all others: refcounts
//! that are raised in advance are as cheap, and leave nothing to rebuild.
//!
//! # Locks
//! A request locks its clusters of the disk: shared to transfer data, exclusive to change their mapping. Below
//! that lock there are, in this order, those for the creation of L2 tables, for the allocator, for the tables and for the
//! reserve of clusters. Reads need only that for the tables, which is never held during a sync. [`Image::map`] waits for
//! none of them, and [`Image::allocate`] gives up if one of the first four is in use.
//!
//! [specification]: https://www.qemu.org/docs/master/interop/qcow2.html

mod allocate;
mod allocator;
mod amend;
mod backing;
mod cache;
mod chain;
mod check;
mod compress;
mod create;
mod entry;
mod error;
mod header;
mod locks;
mod overlap;
mod pending;
mod pull;
mod read;
mod refcounts;
mod reserve;
mod resize;
mod rewrite;
mod snapshot_table;
mod snapshots;
mod tables;
mod walk;
mod write;
mod zero;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

pub use amend::Amendment;
pub use chain::{Layer, MAX_DEPTH, open_chain};
pub use check::{Repair, Report};
pub(crate) use create::Unsynced;
pub use create::{CreateOptions, Preallocation};
pub use error::Error;
pub use header::{BackingName, Compression, Header};
pub(crate) use locks::{ALL, RangeLocks};
pub use snapshot_table::Snapshot;

use crate::{Allocation, BlockStatus, Direction, Extent, Image, ImageFile};
use allocator::Allocator;
use backing::{Backing, Below};
use entry::{Compressed, Geometry, L2Entry};
use header::{Field, incompatible};
use locks::{SyncGate, lock, read};
use overlap::{Kind, Metadata};
use refcounts::Refcounts;
use reserve::Reserve;
use tables::{L1, Tables};

/// Default size of the cache of L2 tables: enough for 64 GiB of disk with clusters of 64 KiB.
const CACHE_BYTES: u64 = 8 << 20;

/// Default number of clusters whose entries may be pending.
const MAX_PENDING: usize = 1024;

/// How an image is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether writes are refused, and the file is not changed at all.
    pub read_only: bool,
    /// Maximum size of the cache of L2 tables in bytes.
    pub cache_bytes: u64,
    /// Maximum number of clusters that have replaced old bytes and are not in the tables of the file before the next
    /// flush. With 0, each request that replaces the bytes of a backing file or snapshot for the first time
    /// syncs.
    pub max_pending: usize,
    /// The opened backing file, if the image has one.
    pub backing: Option<Arc<dyn Image>>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            read_only: false,
            cache_bytes: CACHE_BYTES,
            max_pending: MAX_PENDING,
            backing: None,
        }
    }
}

/// An image in qcow2 format.
///
/// Dropping it syncs the file and gives back what was reserved. Errors of that are not reported: call
/// [`Image::flush`] before.
#[derive(Debug)]
pub struct Qcow2 {
    file: Arc<dyn ImageFile>,
    backing: Backing,
    read_only: bool,
    geometry: Geometry,
    compression: Compression,
    max_pending: usize,
    size: AtomicU64,
    /// What the header in the file says.
    header: Mutex<Header>,
    tables: Tables,
    allocator: Mutex<Allocator>,
    /// That of the allocator.
    reserve: Arc<Mutex<Reserve>>,
    metadata: Arc<RwLock<Metadata>>,
    gate: Arc<SyncGate>,
    ranges: RangeLocks,
    /// Held while an L2 table is created.
    new_table: Mutex<()>,
    /// Held while the size or the snapshots change. It is taken before all other locks.
    layout: Mutex<()>,
    /// Whether the metadata has been found damaged. No more is written then.
    is_damaged: AtomicBool,
    /// The compressed cluster that was read last, as requests are often smaller than a cluster.
    decompressed: Mutex<Option<(Compressed, Vec<u8>)>>,
    /// Whether the file is not to be changed any more.
    writing_has_ended: AtomicBool,
    /// Taken before all other locks.
    backing_sync: Mutex<BackingSync>,
}

/// Whether a flush of an image has to bring its backing file to stable storage too.
#[derive(Debug)]
enum BackingSync {
    /// It has not.
    NotNeeded,
    /// The disk has gone on with this image since the backing file was written.
    Due(Arc<dyn Image>),
    /// It has failed, and the host would report success for the next one all the same.
    Failed,
}

impl Header {
    /// Reads the header of the image in `file`.
    ///
    /// # Errors
    /// Those of [`Self::parse`], or if the host cannot read it.
    pub fn read(file: &dyn ImageFile) -> Result<Header, Error> {
        let file_size = file.size().map_err(Error::io("measure the image"))?;
        let mut bytes = vec![0; file_size.min(512) as usize];
        file.read_at(&mut bytes, 0)
            .map_err(Error::io("read the header of the image"))?;
        if bytes.len() < 72 {
            return Err(Error::Magic);
        }
        let cluster_size = 1u64 << header::be32(&bytes, 20).clamp(9, 21);
        bytes.resize(file_size.min(cluster_size) as usize, 0);
        file.read_at(&mut bytes, 0)
            .map_err(Error::io("read the header of the image"))?;
        Header::parse(&bytes)
    }
}

impl Qcow2 {
    /// Opens the image in `file`. [`Header::read`] says beforehand whether it needs a backing file.
    ///
    /// # Errors
    /// If it is damaged, uses features that are not supported, or the host cannot read it.
    pub fn open(file: Arc<dyn ImageFile>, options: Options) -> Result<Qcow2, Error> {
        let header = Header::read(&*file)?;
        if header.is_corrupt() && !options.read_only {
            return Err(Error::Corrupt);
        }
        if let (Some(backing), None) = (&header.backing, &options.backing) {
            return Err(Error::BackingMissing(backing.name.clone()));
        }
        let image = Qcow2::assemble(file, header, options)?;
        if !image.read_only {
            image.prepare_to_write()?;
        }
        Ok(image)
    }

    /// Opens an image, read-only, without its backing file, to examine what is its own: what the backing file holds
    /// reads as zeroes.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_alone(file: Arc<dyn ImageFile>) -> Result<Qcow2, Error> {
        let header = Header::read(&*file)?;
        let options = Options {
            read_only: true,
            ..Options::default()
        };
        Qcow2::assemble(file, header, options)
    }

    /// Reads the tables of an image whose header is known. Nothing is written.
    fn assemble(
        file: Arc<dyn ImageFile>,
        header: Header,
        options: Options,
    ) -> Result<Qcow2, Error> {
        let geometry = header.geometry();
        let gate = Arc::new(SyncGate::new(Arc::clone(&file)));
        let l1 = L1::read(&*file, header.l1_offset, header.l1_size.into())
            .map_err(Error::io("read the L1 table of the image"))?;
        let refcounts = Refcounts::read(
            Arc::clone(&file),
            header.cluster_bits,
            header.refcount_order,
            header.refcount_table_offset,
            header.refcount_table_clusters,
        )
        .map_err(Error::io("read the refcount table of the image"))?;
        let measured = file.size().and_then(|size| Ok((size, file.fixed_size()?)));
        let (file_size, fixed_size) = measured.map_err(Error::io("measure the image"))?;
        let metadata = Arc::new(RwLock::new(Metadata::default()));
        let allocator = Allocator::new(
            Arc::clone(&file),
            Arc::clone(&gate),
            Arc::clone(&metadata),
            refcounts,
            header.cluster_bits,
            file_size,
            fixed_size,
        );
        Ok(Qcow2 {
            backing: Backing::new(options.backing.filter(|_| header.backing.is_some())),
            read_only: options.read_only,
            geometry,
            compression: header.compression,
            max_pending: options.max_pending,
            size: AtomicU64::new(header.size),
            header: Mutex::new(header),
            tables: Tables::new(Arc::clone(&file), geometry, l1, options.cache_bytes),
            file,
            reserve: Arc::clone(allocator.reserve()),
            allocator: Mutex::new(allocator),
            metadata,
            gate,
            ranges: RangeLocks::default(),
            new_table: Mutex::new(()),
            layout: Mutex::new(()),
            is_damaged: AtomicBool::new(false),
            decompressed: Mutex::new(None),
            writing_has_ended: AtomicBool::new(false),
            backing_sync: Mutex::new(BackingSync::NotNeeded),
        })
    }

    /// Returns what the header says now.
    pub fn header(&self) -> Header {
        lock(&self.header).clone()
    }

    /// Returns the sizes of a cluster and of a subcluster in bytes.
    pub(crate) fn unit_sizes(&self) -> (u64, u64) {
        (self.geometry.cluster_size(), self.geometry.unit_size())
    }

    /// Returns the backing file, if there is one.
    pub fn backing(&self) -> Option<Arc<dyn Image>> {
        self.backing.get().map(|below| below.image)
    }

    /// Goes on with another opened backing file, which reads as the present one wherever this image takes its bytes
    /// from there, and whose files have the same numbers. The name of the backing file in the header stays.
    ///
    /// The caller makes sure that data is transferred by earlier answers of [`Image::map`] only if these hold for
    /// the other one too.
    ///
    /// # Errors
    /// If the image has no backing file.
    pub fn replace_backing(&self, image: Arc<dyn Image>) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        let _guard = self.ranges.exclusive(ALL);
        let Some(Below { distance, .. }) = self.backing.get() else {
            let error = "the image has no backing file";
            return Err(Error::NotPossible(error.to_owned()));
        };
        self.backing.replace(Some(Below { image, distance }));
        Ok(())
    }

    /// Uses the backing file of `other`, which is the same image, with the numbers that files have there.
    pub(crate) fn share_backing_of(&self, other: &Qcow2) {
        let _guard = self.ranges.exclusive(ALL);
        self.backing.replace(other.backing.get());
    }

    /// Has the next flush flush the backing file too, to which the guest has written before this image took its place.
    fn flush_backing_too(&self) {
        if let Some(backing) = self.backing() {
            *lock(&self.backing_sync) = BackingSync::Due(backing);
        }
    }

    fn sync_backing(&self) -> io::Result<()> {
        let mut state = lock(&self.backing_sync);
        let flushed = match &*state {
            BackingSync::NotNeeded => return Ok(()),
            BackingSync::Due(backing) => backing.flush(),
            BackingSync::Failed => Err(io::Error::other(
                "the host has failed to write the backing file, which held the disk before",
            )),
        };
        *state = match flushed {
            Ok(()) => BackingSync::NotNeeded,
            Err(_) => BackingSync::Failed,
        };
        flushed
    }

    /// Does what has to be done before the first write.
    fn prepare_to_write(&self) -> Result<(), Error> {
        let header = self.header();
        if header.is_dirty() {
            self.find_metadata()?;
            let repair = self.check_unlocked(Repair::All);
            let report = repair.map_err(Error::io("rebuild the refcounts of the image"))?;
            if report.corruptions > 0 {
                return Err(Error::Damaged(report.findings.join("; ")));
            }
        }
        lock(&self.allocator)
            .find_end()
            .map_err(Error::io("read the refcounts of the image"))?;
        self.find_metadata()?;
        if header.autoclear != 0 {
            // Bitmaps would not follow what is written from now on.
            self.write_header(Field::Autoclear(0), |header| header.autoclear = 0)
                .and_then(|()| self.gate.sync())
                .map_err(Error::io("write the header of the image"))?;
        }
        Ok(())
    }

    /// Finds out which clusters hold metadata.
    fn find_metadata(&self) -> Result<(), Error> {
        let header = self.header();
        let geometry = self.geometry;
        let mut metadata = Metadata::default();
        let allocator = lock(&self.allocator);
        metadata.file_clusters = allocator.file_size().div_ceil(geometry.cluster_size());
        metadata.add_range(0..1, Kind::Header);
        metadata.add_range(allocator.refcounts.table_clusters(), Kind::RefcountTable);
        for (_, cluster) in allocator.refcounts.block_clusters() {
            metadata.add(cluster, Kind::RefcountBlock);
        }
        drop(allocator);
        if header.snapshots > 0 {
            let (snapshots, len) = snapshot_table::read(&*self.file, &header)
                .map_err(Error::io("read the snapshot table of the image"))?;
            let start = header.snapshots_offset;
            metadata.add_range(geometry.clusters(start..start + len), Kind::Snapshots);
            for Snapshot {
                l1_offset, l1_size, ..
            } in snapshots
            {
                let end = l1_offset + u64::from(l1_size) * 8;
                metadata.add_range(geometry.clusters(l1_offset..end), Kind::SnapshotL1);
            }
        }
        let l1_bytes = u64::from(header.l1_size) * 8;
        metadata.add_range(
            geometry.clusters(header.l1_offset..header.l1_offset + l1_bytes),
            Kind::L1,
        );
        for index in 0..self.tables.l1_len() {
            if let Some(table) = self.tables.l1_entry(index).table() {
                metadata.add(table >> geometry.cluster_bits, Kind::L2);
            }
        }
        *locks::write(&self.metadata) = metadata;
        Ok(())
    }

    /// Writes a field of the header, and makes the same change in memory.
    ///
    /// # Errors
    /// If the host cannot write it. No more is written then, as the header may name either of two tables.
    fn write_header(&self, field: Field, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let mut header = lock(&self.header);
        let (offset, bytes) = field.bytes();
        if let Err(error) = self.file.write_at(&bytes, offset) {
            self.gate.fail();
            return Err(error);
        }
        change(&mut header);
        Ok(())
    }

    /// Refuses writes to an image that takes none.
    fn check_writable(&self) -> io::Result<()> {
        if self.read_only || self.writing_has_ended.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if self.is_damaged.load(Ordering::Relaxed) {
            return Err(io::Error::other(
                "the image is damaged and takes no more writes",
            ));
        }
        self.gate.check()
    }

    /// Refuses a range beyond the end of the disk.
    fn check_range(&self, range: &Range<u64>) -> io::Result<()> {
        if range.start > range.end || range.end > self.size.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }

    /// Stops all writes, and marks the image as corrupt, if `result` says that it is damaged.
    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && let Some(Error::Damaged(what)) = error
                .get_ref()
                .and_then(|error| error.downcast_ref::<Error>())
        {
            self.mark_damaged(what);
        }
        result
    }

    fn mark_damaged(&self, what: &str) {
        if self.read_only || self.is_damaged.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::error!("a qcow2 image is damaged and takes no more writes: {what}");
        let features = lock(&self.header).incompatible | incompatible::CORRUPT;
        if lock(&self.header).version >= 3 {
            // Writes are refused whether or not this one succeeds.
            let _ = self
                .write_header(Field::Incompatible(features), |header| {
                    header.incompatible = features;
                })
                .and_then(|()| self.gate.sync());
        }
    }

    /// Checks an entry that comes into the cache. If it pointed to metadata or behind the end of the file, a
    /// write to the disk would destroy the image.
    fn inspect(&self, entry: L2Entry) {
        if self.read_only || entry.host().is_none() {
            return;
        }
        let clusters = entry.host_clusters(self.geometry);
        let metadata = read(&self.metadata);
        let start = clusters.start << self.geometry.cluster_bits;
        let what = if clusters.end > metadata.file_clusters {
            format!("an L2 entry points behind the end of the file, to {start:#x}")
        } else if let Some(kind) = metadata.find(clusters) {
            format!("an L2 entry points to {kind} at {start:#x}")
        } else {
            return;
        };
        drop(metadata);
        self.mark_damaged(&what);
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.check_writable().is_ok() {
            // What cannot be given back is leaked, and a check frees it.
            let _ = self
                .flush()
                .and_then(|()| lock(&self.allocator).give_back());
        }
    }
}

impl Image for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, range: Range<u64>, direction: Direction) -> Extent {
        self.map_range(range, direction)
    }

    fn prefetch_map(&self, offset: u64) {
        self.tables.prefetch(offset);
    }

    fn allocate(&self, range: Range<u64>) -> Option<Allocation> {
        self.allocate_range(range)
    }

    fn prepare(&self) -> io::Result<()> {
        self.note(self.fill_reserve())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.check_range(&(offset..offset.saturating_add(bytes.len() as u64)))?;
        let range = offset..offset + bytes.len() as u64;
        let _guard = self.ranges.shared(self.geometry.clusters(range));
        self.note(self.read_unlocked(bytes, offset))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        self.check_range(&(offset..offset.saturating_add(bytes.len() as u64)))?;
        self.note(self.write_range(bytes, offset))
    }

    fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> io::Result<()> {
        self.check_writable()?;
        self.check_range(&range)?;
        self.note(self.zero_range(range, unmap))
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.check_writable()?;
        self.check_range(&range)?;
        self.note(self.discard_range(range))
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.sync_backing()?;
        self.sync_and_release()
    }

    fn end_writing(&self) -> io::Result<()> {
        self.flush()?;
        // A thread that fills the reserve has ended before, or finds that nothing is written any more.
        let _layout = lock(&self.layout);
        if self.check_writable().is_ok() {
            // What cannot be given back is leaked, and a check frees it.
            let _ = lock(&self.allocator).give_back();
            self.writing_has_ended.store(true, Ordering::Relaxed);
            self.gate.sync()?;
        }
        Ok(())
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let _layout = lock(&self.layout);
        if size <= self.size() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.resize_locked(size)?)
    }

    fn status(&self, range: Range<u64>) -> io::Result<BlockStatus> {
        self.check_range(&range)?;
        let _guard = self.ranges.shared(self.geometry.clusters(range.clone()));
        self.note(self.status_unlocked(range))
    }
}
