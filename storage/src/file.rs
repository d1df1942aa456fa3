//! The file that an image is kept in.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::direct_file::{DirectFile, LayerFile};
use crate::raw::block_device;

/// The most zeroes that are written at a time, aligned so that no storage needs another buffer for them.
#[repr(align(4096))]
pub(crate) struct Zeroes(pub [u8; 64 << 10]);
pub(crate) static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

/// A file, or something like it, that an image is kept in.
///
/// What has been written is on stable storage once [`Self::sync`] has returned, not before. Until then, a
/// crash of the host can keep any part of it, in any order.
pub trait ImageFile: Debug + Send + Sync {
    /// Reads the bytes from `offset` on. Bytes beyond the end of the file read as zeroes.
    ///
    /// # Errors
    /// If the host cannot read them.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes `bytes` to `offset`. The file grows if it ends before they do.
    ///
    /// # Errors
    /// If the host cannot write all of them; some may have been written then.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Writes `bytes` to `offset` and brings them to stable storage, with the size of the file if it grows.
    /// Other writes may stay behind, so this is less work than a [`Self::sync`].
    ///
    /// # Errors
    /// Those of [`Self::write_at`] and [`Self::sync`].
    fn write_durably(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(bytes, offset)?;
        self.sync()
    }

    /// Reads bytes of the disk like [`Self::read_at`], past the page cache if the file is open for that.
    ///
    /// # Errors
    /// Those of [`Self::read_at`].
    fn read_data(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(bytes, offset)
    }

    /// Writes bytes of the disk like [`Self::write_at`], past the page cache if the file is open for that.
    ///
    /// # Errors
    /// Those of [`Self::write_at`].
    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(bytes, offset)
    }

    /// Makes the bytes of `range` read as zeroes, by writing them unless there is a better way.
    ///
    /// # Errors
    /// Those of [`Self::write_at`].
    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        write_zero_bytes(self, range)
    }

    /// Makes the bytes of `range` read as zeroes and gives their storage back to the host. The file does
    /// not grow.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the host cannot do this to the file, which is unchanged then.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()>;

    /// Gives the bytes of `range` storage, so that writing to them does not fail for the lack of it. Those that
    /// had none read as zeroes. The file does not grow.
    ///
    /// # Errors
    /// If the host has no room, or [`io::ErrorKind::Unsupported`] if it cannot do this to the file.
    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        let _ = range;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Brings everything written so far to stable storage.
    ///
    /// # Errors
    /// If the host has failed to write something.
    fn sync(&self) -> io::Result<()>;

    /// Returns the size of the file in bytes.
    ///
    /// # Errors
    /// If it cannot be measured.
    fn size(&self) -> io::Result<u64>;

    /// Returns the size in bytes that the file always has: that of a block device. Such a file holds anything where
    /// nothing was written.
    ///
    /// # Errors
    /// If it cannot be measured.
    fn fixed_size(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// Sets the size of the file in bytes. What is added reads as zeroes. A file of a fixed size keeps it.
    ///
    /// # Errors
    /// If the host cannot change it; [`io::ErrorKind::StorageFull`] if the fixed size is smaller.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Returns whether the first bytes of `range` are a hole, which takes no storage and reads as zeroes,
    /// and how many they are. A file that cannot tell has no holes.
    ///
    /// # Errors
    /// If the host cannot look for holes.
    fn next_run(&self, range: Range<u64>) -> io::Result<(bool, u64)> {
        Ok((false, range.end - range.start))
    }
}

/// Writes zeroes to a range of a file.
fn write_zero_bytes<F: ImageFile + ?Sized>(file: &F, range: Range<u64>) -> io::Result<()> {
    let mut next = range.start;
    while next < range.end {
        let len = (range.end - next).min(ZEROES.0.len() as u64);
        file.write_data(&ZEROES.0[..len as usize], next)?;
        next += len;
    }
    Ok(())
}

/// A regular file or block device of the host.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    /// The file for bytes of the disk, if they go past the page cache.
    direct: Option<DirectFile>,
    /// Held during a write. File systems let one thread at a time write to a file, and others that try meanwhile may
    /// spin in the kernel: with it they sleep. Past the page cache, it also keeps others from a block that is read,
    /// changed and written.
    writing: Mutex<()>,
}

impl From<LayerFile> for HostFile {
    /// Keeps an image in a file of a disk.
    fn from(layer: LayerFile) -> HostFile {
        let LayerFile { cached, direct, .. } = layer;
        HostFile {
            file: cached,
            direct,
            writing: Mutex::new(()),
        }
    }
}

/// Returns the size in bytes of a regular file or block device.
pub(crate) fn file_size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        let end = lseek(file, 0, Whence::SeekEnd)?;
        return u64::try_from(end).map_err(io::Error::other);
    }
    Ok(metadata.len())
}

impl HostFile {
    /// Keeps an image in `file`.
    pub fn new(file: File) -> HostFile {
        HostFile::from(LayerFile::from(file))
    }

    fn is_block_device(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.file_type().is_block_device())
    }

    /// Changes the storage of a range, never the size of the file.
    fn fallocate(&self, flags: FallocateFlags, range: Range<u64>) -> io::Result<()> {
        let too_large = |_| io::ErrorKind::InvalidInput;
        let start = i64::try_from(range.start).map_err(too_large)?;
        let length = i64::try_from(range.end - range.start).map_err(too_large)?;
        let flags = flags | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self.file.as_fd(), flags, start, length) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            // A block device takes whole sectors only.
            Err(Errno::EINVAL) if self.is_block_device()? => Err(io::ErrorKind::Unsupported.into()),
            result => Ok(result?),
        }
    }
}

impl ImageFile for HostFile {
    fn read_at(&self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.file.read_at(bytes, offset) {
                Ok(0) => {
                    bytes.fill(0);
                    break;
                }
                Ok(count) => {
                    bytes = &mut bytes[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let _guard = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.write_all_at(bytes, offset)
    }

    fn read_data(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(direct) => direct.read_at(bytes, offset),
            None => self.read_at(bytes, offset),
        }
    }

    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let Some(direct) = &self.direct else {
            return self.write_at(bytes, offset);
        };
        let _guard = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        direct.write_at(bytes, offset, &self.file)
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() || !self.is_block_device()? {
            return write_zero_bytes(self, range);
        }
        let place = [range.start, range.end - range.start];
        // SAFETY: the request reads two u64 from the place it is given.
        match unsafe { block_device::zero_out(self.file.as_raw_fd(), &place) } {
            // It takes whole sectors only.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOTTY) => write_zero_bytes(self, range),
            result => Ok(result.map(drop)?),
        }
    }

    fn write_durably(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let vector = libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            };
            let position = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: the kernel reads the one vector, and through it only `bytes`, which outlive the call.
            let count = unsafe {
                libc::pwritev2(
                    self.file.as_raw_fd(),
                    &raw const vector,
                    1,
                    position,
                    libc::RWF_DSYNC,
                )
            };
            match usize::try_from(count) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    bytes = &bytes[count..];
                    offset += count as u64;
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.fallocate(FallocateFlags::empty(), range)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        file_size(&self.file)
    }

    fn fixed_size(&self) -> io::Result<Option<u64>> {
        self.is_block_device()?.then(|| self.size()).transpose()
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        match self.fixed_size()? {
            None => self.file.set_len(size),
            Some(fixed) if size <= fixed => Ok(()),
            Some(_) => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    fn next_run(&self, range: Range<u64>) -> io::Result<(bool, u64)> {
        let length = range.end - range.start;
        let start = i64::try_from(range.start).map_err(|_| io::ErrorKind::InvalidInput)?;
        let up_to = |position: i64| {
            let end = u64::try_from(position).unwrap_or_default().min(range.end);
            end.saturating_sub(range.start)
        };
        match lseek(&self.file, start, Whence::SeekData) {
            Ok(data) if data > start => Ok((true, up_to(data))),
            Ok(_) => match lseek(&self.file, start, Whence::SeekHole) {
                // Another process can make a hole here meanwhile; then the bytes can still be read.
                Ok(hole) if hole > start => Ok((false, up_to(hole))),
                _ => Ok((false, length)),
            },
            // There is no data from here to the end of the file.
            Err(Errno::ENXIO) => Ok((true, length)),
            Err(_) => Ok((false, length)),
        }
    }
}
