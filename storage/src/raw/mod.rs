//! Raw disk images: a regular file or a block device whose bytes are the disk's.

mod bounce;
mod error;
mod format;
mod geometry;
mod open;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bantam_memory::{FilePosition, GuestBuffers};
use nix::fcntl::{FallocateFlags, fallocate};

use crate::direct_file::DirectFile;
use crate::file::{HostFile, ImageFile, ZEROES};
use bounce::Zeroes;
use geometry::measure;

pub(crate) use bounce::{Alignment, Blocks, Written, bounce_all};
pub use bounce::{Bounce, Step};
pub use error::DiskError;
pub use format::ImageFormat;
pub(crate) use format::format_of_name;
pub(crate) use geometry::{block_device, disk_size};
pub use open::DiskOptions;
pub(crate) use open::{
    create_locked, lock_as_wanted, open_again, open_direct, open_file, open_image, open_locked,
};

/// Disks are addressed in units of this many bytes.
pub const SECTOR_SIZE: u64 = 512;

/// Where written data is kept until the guest asks for a flush, and what a flush does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// In the host's page cache; a flush brings it to stable storage.
    #[default]
    Writeback,
    /// Nowhere: every write is on stable storage before it is acknowledged.
    Writethrough,
    /// In the storage's own cache: the host's page cache is bypassed (`O_DIRECT`). A flush brings it
    /// to stable storage.
    None,
    /// In the host's page cache, even after a flush: a crash of the host can lose all of it.
    Unsafe,
}

/// One of the open files of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The image, opened as the cache mode requires.
    Usual,
    /// The image through the page cache, for writes behind the last block that `O_DIRECT` takes.
    Tail,
}

/// How the page cache is bypassed.
#[derive(Debug)]
struct Direct {
    alignment: Alignment,
    /// For [`Access::Tail`].
    tail: Option<File>,
}

/// An open raw disk image, locked against other users for as long as it is open.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    file: File,
    /// Present with [`CacheMode::None`].
    direct: Option<Direct>,
    /// Size of the disk in bytes.
    size: AtomicU64,
    /// Size of the image in bytes.
    length: AtomicU64,
    options: DiskOptions,
    is_block_device: bool,
    logical_block_size: u32,
    physical_block_size: u32,
}

impl DiskFile {
    fn warn_of_hidden_bytes(&self) {
        let (size, length) = (self.size(), self.length.load(Ordering::Relaxed));
        if size == 0 {
            tracing::warn!(
                "disk '{}' of {length} bytes has nothing that the guest can see",
                self.path.display()
            );
        } else if let Some(hidden @ 1..) = length.checked_sub(size) {
            tracing::warn!(
                "the guest does not see the last {hidden} bytes of disk '{path}', as its size of \
                 {length} bytes is not a multiple of {block}; 'truncate --size=%{block} FILE' rounds \
                 it up",
                path = self.path.display(),
                block = self.logical_block_size
            );
        }
    }

    /// Opens an image as if the storage had blocks of `block` bytes, for tests of images of whole blocks.
    #[cfg(any(test, feature = "test-internals"))]
    pub fn with_block(mut self, block: u64) -> DiskFile {
        if let Some(direct) = &mut self.direct {
            direct.alignment.offset = block;
        }
        self
    }

    /// Returns the path with which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether `file` is the image that is open.
    ///
    /// # Errors
    /// If one of the two cannot be examined.
    pub fn is_same_file(&self, file: &File) -> io::Result<bool> {
        let (open, other) = (self.file.metadata()?, file.metadata()?);
        Ok((open.dev(), open.ino()) == (other.dev(), other.ino()))
    }

    /// Returns the disk's size in bytes, a multiple of [`DiskFile::logical_block_size`].
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Updates the disk's size to that of the image, and returns it.
    ///
    /// # Errors
    /// If the image cannot be measured, or its size cannot be that of this disk, as in [`DiskFile::open`].
    pub fn update_size(&self) -> io::Result<u64> {
        let length = self.current_size()?;
        let block = self.logical_block_size;
        let size =
            disk_size(length, block, self.is_block_device, &self.options).map_err(|reason| {
                let error = format!("it has {length} bytes now: {reason}");
                io::Error::new(io::ErrorKind::InvalidData, error)
            })?;
        // In this order: a reader that sees the new size also sees how much of it the image covers.
        let before = self.length.swap(length, Ordering::Relaxed);
        self.size.store(size, Ordering::Release);
        if length != before {
            self.warn_of_hidden_bytes();
        }
        Ok(size)
    }

    /// Makes the file larger. The disk keeps its size until [`DiskFile::update_size`].
    ///
    /// # Errors
    /// If it is a block device, the file is larger already, or the host cannot change it.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        if self.is_block_device {
            let reason = "it is on a block device, whose size the host determines";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let length = self.current_size()?;
        if size < length {
            let reason = format!("its image has {length} bytes, and cannot become smaller");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        self.file.set_len(size)?;
        match self.options.cache {
            CacheMode::Unsafe => Ok(()),
            _ => self.file.sync_all(),
        }
    }

    /// Returns the options with which it was opened.
    pub fn options(&self) -> &DiskOptions {
        &self.options
    }

    /// Whether the disk is read-only.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// Returns how written data is cached.
    pub fn cache(&self) -> CacheMode {
        self.options.cache
    }

    /// Returns the smallest unit in which the guest should address the disk, in bytes.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// Returns the unit that the host writes without a read-modify-write, in bytes; a multiple of
    /// [`DiskFile::logical_block_size`].
    pub fn physical_block_size(&self) -> u32 {
        self.physical_block_size
    }

    /// Returns the file for `access`, if there is one.
    pub fn file(&self, access: Access) -> Option<&File> {
        match access {
            Access::Usual => Some(&self.file),
            Access::Tail => self.direct.as_ref()?.tail.as_ref(),
        }
    }

    /// Returns the file for direct access, if the page cache is bypassed.
    ///
    /// # Errors
    /// If its descriptor cannot be duplicated.
    pub(crate) fn direct_file(&self) -> io::Result<Option<DirectFile>> {
        let direct = self.direct.as_ref().map(|direct| {
            let file = self.file.try_clone()?;
            Ok(DirectFile::new(file, direct.alignment))
        });
        direct.transpose()
    }

    /// Whether the page cache is bypassed, so that some requests need a [`Bounce`].
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Whether a transfer between `offset` and `buffers` can be done as it is; otherwise it needs a
    /// [`Bounce`].
    pub fn takes(&self, buffers: &GuestBuffers, offset: u64) -> bool {
        let Some(Direct { alignment, .. }) = &self.direct else {
            return true;
        };
        buffers.is_empty()
            || offset.is_multiple_of(alignment.offset)
                && buffers.are_aligned(alignment.memory, alignment.offset as usize)
    }

    /// Returns the whole blocks that a write to `range` reads or writes, and whether it covers all of them. A
    /// write that does not must not run while another write to one of them does. `None` if all requests
    /// consist of whole blocks.
    pub fn block_span(&self, range: Range<u64>) -> Option<(Range<u64>, bool)> {
        let alignment = &self.direct.as_ref()?.alignment;
        (alignment.offset > SECTOR_SIZE).then(|| {
            let span = alignment.blocks_around(&range);
            (span, alignment.covers_blocks(&range))
        })
    }

    /// Makes a buffer for requests that the image does not take as they are.
    pub fn bounce(&self) -> Option<Bounce> {
        let direct = self.direct.as_ref()?;
        Some(Bounce::new(direct.alignment, usize::MAX))
    }

    /// Returns the next step of a request that goes through `bounce`: of a write if `writes`, otherwise of a
    /// read.
    pub fn next_step(
        &self,
        bounce: &mut Bounce,
        buffers: &GuestBuffers,
        offset: u64,
        writes: bool,
    ) -> Step {
        bounce.step(self, buffers, offset, writes)
    }

    /// Takes account of a step that has transferred `count` bytes. Returns how many bytes this completes,
    /// which are dropped from `buffers`; zero if another step must come first.
    ///
    /// # Errors
    /// If the image ends before the request does.
    pub fn end_step(
        &self,
        bounce: &mut Bounce,
        buffers: &mut GuestBuffers,
        count: usize,
    ) -> io::Result<usize> {
        bounce.advance(self, buffers, count)
    }

    /// Returns the present size of the image in bytes.
    fn current_size(&self) -> io::Result<u64> {
        measure(&self.file, self.file.metadata()?.file_type())
    }

    /// Zeroes and drops the part of `buffers`, to be filled from `offset` on, that lies beyond the end of the
    /// image.
    pub fn fill_beyond_end(&self, buffers: &mut GuestBuffers, offset: u64) {
        if !self.options.read_only {
            return;
        }
        fill_from(self.length.load(Ordering::Relaxed), buffers, offset);
    }

    /// Fills `bytes` with those from `offset` on. Bytes beyond the end of the image read as zeroes.
    ///
    /// # Errors
    /// If the host cannot read them.
    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match self.direct_file()? {
            Some(direct) => direct.read_at(bytes, offset),
            None => HostFile::new(self.file.try_clone()?).read_at(bytes, offset),
        }
    }

    /// Fills `buffers` with the bytes from `offset` on.
    ///
    /// # Errors
    /// Those of `preadv`; also if the file ends before the buffers do.
    pub fn read(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        let offset = self.transfer(buffers, offset, 0, GuestBuffers::read_from)?;
        // Only direct access leaves something, which it does not take as it is.
        bounce_all(self, buffers, offset, false)
    }

    /// Fills `buffers` like [`DiskFile::read`], but only with data that the page cache holds: the part not
    /// read is left in `buffers`.
    ///
    /// # Errors
    /// Those of [`DiskFile::read`].
    pub fn read_cached(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        match self.transfer(buffers, offset, libc::RWF_NOWAIT, GuestBuffers::read_from) {
            // A file system that cannot do this returns `EOPNOTSUPP`.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::EINVAL)
                ) =>
            {
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// Writes `buffers` to the bytes from `offset` on; with `durable`, to stable storage.
    ///
    /// # Errors
    /// Those of `pwritev2`.
    pub fn write(&self, buffers: &mut GuestBuffers, offset: u64, durable: bool) -> io::Result<()> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        let offset = self.transfer(buffers, offset, flags, GuestBuffers::write_to)?;
        if buffers.is_empty() {
            return Ok(());
        }
        bounce_all(self, buffers, offset, true)?;
        if durable {
            self.file.sync_data()
        } else {
            Ok(())
        }
    }

    /// Transfers as much of `buffers` as needs no bounce buffer, and returns the offset of the rest.
    fn transfer(
        &self,
        buffers: &mut GuestBuffers,
        mut offset: u64,
        flags: libc::c_int,
        call: fn(&mut GuestBuffers, BorrowedFd<'_>, Option<FilePosition>) -> io::Result<usize>,
    ) -> io::Result<u64> {
        while !buffers.is_empty() && self.takes(buffers, offset) {
            let position = FilePosition { offset, flags };
            match call(buffers, self.file.as_fd(), Some(position)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => offset += count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(offset)
    }

    /// Brings everything written so far to stable storage, unless the cache mode is
    /// [`CacheMode::Unsafe`].
    ///
    /// # Errors
    /// Those of `fdatasync`.
    pub fn flush(&self) -> io::Result<()> {
        match self.options.cache {
            CacheMode::Unsafe => Ok(()),
            _ => self.file.sync_data(),
        }
    }

    /// Returns the mode with which `fallocate` discards ranges, if it can.
    pub fn discard_mode(&self) -> Option<libc::c_int> {
        // A block device would make zeroes of them, which not every device can that discards.
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        (!self.is_block_device).then_some(mode.bits())
    }

    /// Returns the mode with which `fallocate` makes ranges read as zeroes, as [`DiskFile::write_zeroes`] does.
    pub fn zero_mode(&self, deallocate: bool) -> libc::c_int {
        let mode = match deallocate && !self.is_block_device {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        (mode | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits()
    }

    /// Whether `error` of `fallocate` says that the host cannot do this, so that [`DiskFile::discard`] or
    /// [`DiskFile::write_zeroes`] has to find another way.
    pub fn is_unsupported(error: &io::Error) -> bool {
        is_unsupported(error)
    }

    /// Gives the storage of a range back to the host. The content of the range is undefined afterwards. If
    /// the host cannot do it, nothing happens.
    ///
    /// # Errors
    /// Those of `fallocate`, or of the block device.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.deallocate(offset, len) {
            Err(error) if is_unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Makes a range read as zeroes; with `deallocate` by giving its storage back, if the host can do so and
    /// the range still reads as zeroes.
    ///
    /// # Errors
    /// Those of `fallocate` and `pwrite`, or of the block device.
    pub fn write_zeroes(&self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        let zeroed = if self.is_block_device {
            // SAFETY: the request reads two u64 from the place it is given.
            let done = unsafe { block_device::zero_out(self.file.as_raw_fd(), &[offset, len]) };
            done.map(drop).map_err(io::Error::from)
        } else if deallocate {
            self.deallocate(offset, len)
        } else {
            self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len)
        };
        match zeroed {
            Err(error) if is_unsupported(&error) => self.fill_with_zeroes(offset, len),
            result => result,
        }
    }

    /// A hole punched into a regular file reads as zeroes.
    fn deallocate(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_block_device {
            // SAFETY: the request reads two u64 from the place it is given.
            unsafe { block_device::discard(self.file.as_raw_fd(), &[offset, len]) }?;
            return Ok(());
        }
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len)
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            // Both are within the size of the file, so neither overflows.
            match fallocate(&self.file, mode, offset as libc::off_t, len as libc::off_t) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn fill_with_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        if self.is_direct() {
            return bounce_all(self, &mut Zeroes(len as usize), offset, true);
        }
        while len > 0 {
            let count = len.min(ZEROES.0.len() as u64);
            self.file
                .write_all_at(&ZEROES.0[..count as usize], offset)?;
            offset += count;
            len -= count;
        }
        Ok(())
    }
}

impl Blocks for DiskFile {
    fn alignment(&self) -> Alignment {
        let direct = self.direct.as_ref();
        direct.map_or(Alignment::NONE, |direct| direct.alignment)
    }

    fn tail(&self) -> u64 {
        self.alignment().tail(self.length.load(Ordering::Relaxed))
    }

    fn current_size(&self) -> io::Result<u64> {
        DiskFile::current_size(self)
    }

    fn file(&self, access: Access) -> Option<&File> {
        DiskFile::file(self, access)
    }
}

/// Zeroes and drops the part of `buffers`, to be filled from `offset` on, that lies beyond `end`.
pub(crate) fn fill_from(end: u64, buffers: &mut GuestBuffers, offset: u64) {
    let missing = (offset + buffers.len() as u64).saturating_sub(end);
    if missing == 0 {
        return;
    }
    let zeroes = [0; 4096];
    let there = (buffers.len() as u64).saturating_sub(missing) as usize;
    let mut position = there;
    while position < buffers.len() {
        let count = (buffers.len() - position).min(zeroes.len());
        position += buffers.write_at(position, &zeroes[..count]);
    }
    buffers.truncate(there);
}

/// Whether the host does not support the operation. A block device whose sectors are larger than those of the
/// guest's disk returns `EINVAL` for a range that is not a multiple of its sectors.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL)
    )
}

#[cfg(test)]
mod tests;
