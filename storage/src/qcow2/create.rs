//! Creates images.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::entry::{Geometry, L2Entry};
use super::error::Error;
use super::header::{
    BackingName, Compression, Header, LAZY_REFCOUNTS, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
    incompatible,
};
use super::locks::lock;
use super::refcounts::write_first_blocks;
use super::tables::NewEntry;
use super::{Options, Qcow2};
use crate::{Image, ImageFile};

/// What a new image allocates in advance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Tables and clusters. The file stays sparse.
    Metadata,
    /// Also storage of the host.
    Falloc,
    /// Also storage of the host, by writing zeroes.
    Full,
}

/// Options of a new image. The defaults are those of `qemu-img create`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Disk size in bytes, a multiple of 512.
    pub size: u64,
    /// Version of the format, 2 or 3. Version 2 has 16-bit refcounts, deflate, and no subclusters or lazy refcounts.
    pub version: u32,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount: a power of two up to 64 bits.
    pub refcount_bits: u32,
    /// Whether QEMU may write refcounts late.
    pub lazy_refcounts: bool,
    /// Whether clusters have subclusters. They need clusters of 16 KiB or more.
    pub extended_l2: bool,
    /// How clusters are compressed.
    pub compression: Compression,
    /// What is allocated in advance.
    pub preallocation: Preallocation,
    /// The backing file.
    pub backing: Option<BackingName>,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            preallocation: Preallocation::Off,
            backing: None,
        }
    }
}

impl CreateOptions {
    /// Refuses what is not possible.
    fn check(&self) -> Result<(), Error> {
        let refuse = |what: &str| Err(Error::Option(what.to_owned()));
        let cluster_size = self.cluster_size;
        if !self.size.is_multiple_of(512) || self.size > 1 << 62 {
            return refuse("the size of a disk is a multiple of 512 bytes");
        }
        if !(2..=3).contains(&self.version) {
            return Err(Error::Version(self.version));
        }
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
            return refuse("the cluster size is a power of two from 512 bytes to 2 MiB");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return refuse("refcounts have 1, 2, 4, 8, 16, 32 or 64 bits");
        }
        if self.version == 2
            && (self.refcount_bits != 16
                || self.lazy_refcounts
                || self.extended_l2
                || self.compression != Compression::Zlib)
        {
            return refuse("version 2 has no other refcounts, subclusters or compression");
        }
        if self.extended_l2 && cluster_size < 16384 {
            return refuse("subclusters need clusters of 16 KiB or more");
        }
        if self
            .backing
            .as_ref()
            .is_some_and(|backing| backing.format.is_none())
        {
            return refuse("the format of the backing file has to be given");
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off {
            return refuse("an image with a backing file cannot be preallocated");
        }
        Ok(())
    }
}

/// A file whose syncs do nothing, for an image that is synced as a whole when it is complete, or need not survive a
/// crash of the host.
#[derive(Debug)]
pub(crate) struct Unsynced(pub(crate) Arc<dyn ImageFile>);

impl ImageFile for Unsynced {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn read_data(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_data(bytes, offset)
    }

    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_data(bytes, offset)
    }

    fn write_durably(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        self.0.write_zeroes(range)
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.0.punch_hole(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.0.allocate(range)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn fixed_size(&self) -> io::Result<Option<u64>> {
        self.0.fixed_size()
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.0.set_size(size)
    }
}

impl Qcow2 {
    /// Creates an image in `file`, and overwrites what it holds.
    ///
    /// # Errors
    /// If an option is not possible, or the host cannot write the file.
    pub fn create(file: Arc<dyn ImageFile>, options: &CreateOptions) -> Result<(), Error> {
        options.check()?;
        let cluster_bits = options.cluster_size.trailing_zeros();
        let mut header = Header {
            version: options.version,
            cluster_bits,
            size: options.size,
            l1_size: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: if options.lazy_refcounts {
                LAZY_REFCOUNTS
            } else {
                0
            },
            autoclear: 0,
            refcount_order: options.refcount_bits.trailing_zeros(),
            compression: options.compression,
            backing: options.backing.clone(),
            bitmaps: None,
        };
        if options.compression == Compression::Zstd {
            header.incompatible |= incompatible::COMPRESSION;
        }
        if options.extended_l2 {
            header.incompatible |= incompatible::EXTENDED_L2;
        }
        let layout = Layout::new(header.geometry(), options)?;
        header.l1_size = layout.l1_entries;
        if layout.l1_entries > 0 {
            header.l1_offset = layout.l1.start << cluster_bits;
        }
        header.refcount_table_offset = layout.table.start << cluster_bits;
        header.refcount_table_clusters = (layout.table.end - layout.table.start) as u32;
        let bytes = header.to_bytes()?;
        layout
            .write(&*file, &header)
            .map_err(Error::io("write a new image"))?;

        // The header is written last, so an incomplete image is not taken for one.
        let finish = |bytes: &[u8]| {
            file.sync()?;
            file.write_at(bytes, 0)?;
            file.sync()
        };
        if options.preallocation == Preallocation::Off {
            return finish(&bytes).map_err(Error::io("write a new image"));
        }
        let unsynced: Arc<dyn ImageFile> = Arc::new(Unsynced(Arc::clone(&file)));
        let image = Qcow2::assemble(unsynced, header.clone(), Options::default())?;
        let result = lock(&image.allocator).find_end();
        let clusters = image.geometry.clusters(0..options.size);
        let result = result.and_then(|()| image.preallocate(clusters, options.preallocation));
        // It may have moved to become larger.
        let table = lock(&image.allocator).refcounts.table_clusters();
        header.refcount_table_offset = table.start << cluster_bits;
        header.refcount_table_clusters = (table.end - table.start) as u32;
        let bytes = header.to_bytes()?;
        drop(image);
        result
            .and_then(|()| finish(&bytes))
            .map_err(Error::io("preallocate a new image"))
    }

    /// Creates an image in `file` whose backing file is `base`, the open image of a disk, and opens it. The disk goes on
    /// with it, and `base` is not written any more then. The first flush flushes `base` too.
    ///
    /// # Errors
    /// Those of [`Self::create`] and [`Self::open`].
    pub fn create_overlay(
        file: Arc<dyn ImageFile>,
        create: &CreateOptions,
        base: Arc<dyn Image>,
        options: Options,
    ) -> Result<Qcow2, Error> {
        Qcow2::create(Arc::clone(&file), create)?;
        let options = Options {
            backing: Some(base),
            ..options
        };
        let image = Qcow2::open(file, options)?;
        image.flush_backing_too();
        Ok(image)
    }

    /// Maps those of `clusters` of the disk that read as zeroes and have no place.
    pub(super) fn preallocate(
        &self,
        clusters: Range<u64>,
        preallocation: Preallocation,
    ) -> io::Result<()> {
        let cluster_bits = self.geometry.cluster_bits;
        let slice = self.tables.slice_clusters();
        let mut next = clusters.start;
        while next < clusters.end {
            let end = clusters.end.min((next / slice + 1) * slice);
            let old = self
                .tables
                .entries(next..end, |entry| self.inspect(entry))?;
            let count = old
                .iter()
                .take_while(|&&entry| self.is_empty(entry))
                .count();
            if count == 0 {
                next += 1;
                continue;
            }
            self.ensure_table(next)?;
            let taken = lock(&self.allocator).take(count as u64)?;
            let bytes = taken.start << cluster_bits..taken.end << cluster_bits;
            let reserved = match preallocation {
                Preallocation::Off | Preallocation::Metadata => Ok(()),
                Preallocation::Falloc => self.file.allocate(bytes),
                Preallocation::Full => self.file.write_zeroes(bytes),
            };
            if let Err(error) = reserved {
                lock(&self.allocator).free(taken);
                return Err(error);
            }
            let entries: Vec<NewEntry> = taken
                .clone()
                .map(|cluster| L2Entry::whole(self.geometry, cluster << cluster_bits))
                .map(NewEntry::immediate)
                .collect();
            let replaced = self.tables.store(next, &old[..entries.len()], &entries)?;
            self.free_old(&replaced);
            next += taken.end - taken.start;
        }
        Ok(())
    }
}

/// Where the tables of a new image are, in clusters. The header is the first one.
struct Layout {
    l1_entries: u32,
    l1: Range<u64>,
    table: Range<u64>,
    blocks: Range<u64>,
}

impl Layout {
    fn new(geometry: Geometry, options: &CreateOptions) -> Result<Layout, Error> {
        let cluster_size = geometry.cluster_size();
        let per_block = cluster_size * 8 / u64::from(options.refcount_bits);
        let l1_entries = geometry.l1_entries(options.size);
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(Error::Option(format!(
                "a disk of {} bytes needs larger clusters than {cluster_size} bytes",
                options.size
            )));
        }
        // A table that is large enough for the whole disk need not grow.
        let data = options.size.div_ceil(cluster_size) + l1_entries;
        let entries = (data + data / per_block).div_ceil(per_block) + 2;
        let table = (entries * 8)
            .min(MAX_REFCOUNT_TABLE_BYTES)
            .div_ceil(cluster_size);
        let l1 = (l1_entries * 8).div_ceil(cluster_size);
        let mut blocks = 1;
        while blocks * per_block < 1 + l1 + table + blocks {
            blocks += 1;
        }
        let l1 = 1..1 + l1;
        let table = l1.end..l1.end + table;
        let blocks = table.end..table.end + blocks;
        Ok(Layout {
            l1_entries: l1_entries as u32,
            l1,
            table,
            blocks,
        })
    }

    /// Writes everything but the header.
    fn write(&self, file: &dyn ImageFile, header: &Header) -> io::Result<()> {
        let cluster_bits = header.cluster_bits;
        let size = self.blocks.end << cluster_bits;
        if file.fixed_size()?.is_some() {
            file.set_size(size)?;
            file.write_zeroes(0..size)?;
        } else {
            // A new file is not truncated, as ext4 would write all of it when it is closed, and its owner wait.
            if file.size()? > 0 {
                file.set_size(0)?;
            }
            file.set_size(size)?;
        }
        let words: Vec<u8> = self
            .blocks
            .clone()
            .flat_map(|block| (block << cluster_bits).to_be_bytes())
            .collect();
        file.write_at(&words, header.refcount_table_offset)?;
        write_first_blocks(
            file,
            header.refcount_order,
            cluster_bits,
            self.blocks.clone(),
        )
    }
}
