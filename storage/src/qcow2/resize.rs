//! Changes of the size of a disk.

use std::io;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::create::Preallocation;
use super::entry::L2Entry;
use super::error::Error;
use super::header::{Field, Header, MAX_L1_BYTES};
use super::locks::{ALL, lock, write};
use super::overlap::Kind;
use super::tables::{L1, read_words, to_bytes};
use crate::Image;

impl Qcow2 {
    /// Changes the size of the disk. What is added reads as zeroes; what is cut off is lost, even if this
    /// fails.
    ///
    /// If the disk becomes smaller, the caller makes sure that no data is transferred by an answer of [`Image::map`]
    /// meanwhile.
    ///
    /// # Errors
    /// If the size is not possible, or the host cannot write.
    pub fn resize(&self, size: u64) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        self.resize_locked(size)
    }

    /// Changes the size of the disk like [`Self::resize`], and allocates what is added in advance.
    ///
    /// # Errors
    /// Those of [`Self::resize`]. If the host has no room for what is allocated, the disk has its new size.
    pub fn resize_with(&self, size: u64, preallocation: Preallocation) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        let added = self.size()..size;
        self.resize_locked(size)?;
        if preallocation == Preallocation::Off || added.is_empty() {
            return Ok(());
        }
        let clusters = self.geometry.clusters(added);
        let _guard = self.ranges.exclusive(clusters.clone());
        let allocated = self.note(self.preallocate(clusters, preallocation));
        allocated
            .and_then(|()| self.sync_and_release())
            .map_err(Error::io("allocate what is added to the disk"))
    }

    /// [`Self::resize`] for a caller that has locked the layout.
    pub(super) fn resize_locked(&self, size: u64) -> Result<(), Error> {
        if !size.is_multiple_of(512) {
            let error = "the size of a disk is a multiple of 512 bytes";
            return Err(Error::Option(error.to_owned()));
        }
        if size > 1 << 62 {
            return Err(Error::Option("the disk would be too large".to_owned()));
        }
        let header = self.header();
        if self.geometry.l1_entries(size) * 8 > MAX_L1_BYTES {
            return Err(Error::Option(
                "the disk would be too large for its clusters".to_owned(),
            ));
        }
        if header.version == 2 && header.snapshots > 0 {
            let error = "an image of version 2 with snapshots cannot change its size";
            return Err(Error::NotPossible(error.to_owned()));
        }
        let resized = self.check_writable().and_then(|()| {
            let result = if size < self.size() {
                self.shrink(size)
            } else {
                self.grow(size)
            };
            self.note(result)
        });
        resized.map_err(Error::io("change the size of the disk"))
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        let old = self.size();
        let entries = self.geometry.l1_entries(size);
        if entries > self.tables.l1_len() {
            let _guard = self.ranges.exclusive(ALL);
            self.grow_l1(entries)?;
        }
        // The state of a machine, a larger disk or the backing file may have bytes there, which must not become
        // part of the disk. They are hidden before the size changes.
        let cluster_size = self.geometry.cluster_size();
        let first = old.div_ceil(cluster_size);
        self.write_zero_bytes(old..size.min(first * cluster_size))?;
        let end = size.div_ceil(cluster_size).max(first);
        let backed = self.backing.get().map_or(0, |below| below.image.size());
        let backed = backed.div_ceil(cluster_size).clamp(first, end);
        if self.geometry.zero_flag {
            self.zero_clusters(first..backed, true)?;
        } else {
            self.write_zero_bytes(first * cluster_size..backed * cluster_size)?;
        }
        self.change_entries(backed..end, |_| L2Entry::UNALLOCATED)?;
        self.sync_and_release()?;
        self.set_size(size)
    }

    fn shrink(&self, size: u64) -> io::Result<()> {
        let old = self.size();
        self.set_size(size)?;
        let cluster_size = self.geometry.cluster_size();
        let first = size.div_ceil(cluster_size);
        self.write_zero_bytes(size..old.min(first * cluster_size))?;
        self.change_entries(first..old.div_ceil(cluster_size), |_| L2Entry::UNALLOCATED)?;
        self.sync_and_release()
    }

    /// Writes the size to the header.
    fn set_size(&self, size: u64) -> io::Result<()> {
        let _guard = self.ranges.exclusive(ALL);
        let header = self.header();
        self.write_active(Header { size, ..header })
    }

    /// Writes the size and the place of the active L1 table to the header, and syncs it.
    pub(super) fn write_active(&self, new: Header) -> io::Result<()> {
        let field = Field::Active {
            size: new.size,
            crypt_method: 0,
            l1_size: new.l1_size,
            l1_offset: new.l1_offset,
        };
        let size = new.size;
        self.write_header(field, |header| *header = new)?;
        self.size.store(size, Ordering::Relaxed);
        self.gate.sync()
    }

    /// Moves the L1 table to a place where it has `entries` entries. The caller has exclusive use of
    /// the image.
    fn grow_l1(&self, entries: u64) -> io::Result<()> {
        let header = self.header();
        let (old_offset, old_entries) = (header.l1_offset, u64::from(header.l1_size));
        let mut words = read_words(&*self.file, old_offset, old_entries)?;
        words.resize(entries as usize, 0);
        let clusters = (entries * 8).div_ceil(self.geometry.cluster_size());
        let taken = lock(&self.allocator).take_contiguous(clusters)?;
        let offset = taken.start << self.geometry.cluster_bits;
        let written = self.file.write_at(&to_bytes(&words), offset);
        if let Err(error) = written.and_then(|()| self.gate.sync()) {
            lock(&self.allocator).free(taken);
            return Err(error);
        }
        self.write_active(Header {
            l1_size: entries as u32,
            l1_offset: offset,
            ..header
        })?;
        self.tables
            .replace_l1(L1::read(&*self.file, offset, entries)?);
        write(&self.metadata).replace(Kind::L1, taken);
        let old = self
            .geometry
            .clusters(old_offset..old_offset + old_entries * 8);
        if old_entries > 0 {
            lock(&self.allocator).free(old);
        }
        Ok(())
    }
}
