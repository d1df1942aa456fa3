//! Raw disk images: a regular file or a block device whose bytes are the disk's.

mod error;
mod lock;

use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};

use crate::virtio::{FilePosition, GuestBuffers};

pub use error::DiskError;
pub use lock::{Lock, lock_file, lock_patiently};

/// Disks are addressed in units of this many bytes.
pub const SECTOR_SIZE: u64 = 512;

/// First bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Size of the zeroes that are written at a time where a file system cannot zero a range itself.
const ZEROES_SIZE: usize = 64 << 10;

/// Largest block size that is passed on to the guest.
const MAX_BLOCK_SIZE: u32 = 64 << 10;
/// Physical block size where the host does not tell: a page.
const DEFAULT_PHYSICAL_BLOCK_SIZE: u32 = 4096;

mod block_device {
    //! Requests to block devices (`linux/fs.h`).
    nix::ioctl_read!(size_in_bytes, 0x12, 114, u64);
    nix::ioctl_read_bad!(
        logical_block_size,
        nix::request_code_none!(0x12, 104),
        libc::c_int
    );
    nix::ioctl_read_bad!(
        physical_block_size,
        nix::request_code_none!(0x12, 123),
        libc::c_uint
    );
    // These two are numbered without a size, so nix's "bad" form is the right one.
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(zero_out, nix::request_code_none!(0x12, 127), [u64; 2]);
}

/// Where what a guest has written is kept until it asks for a flush, and what a flush does.
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
    /// In the host's page cache, flushes included: a crash of the host can lose it all.
    Unsafe,
}

/// One of the files by which a disk is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The image, opened as the cache mode wants it.
    Usual,
    /// The image by way of the page cache, for requests that `O_DIRECT` does not take.
    Buffered,
}

/// What `O_DIRECT` asks of a request.
#[derive(Debug, Clone, Copy)]
struct Alignment {
    /// Multiple that offset and size must be of, a power of two of bytes.
    offset: u64,
    /// Multiple that addresses in memory must be of, a power of two of bytes.
    memory: usize,
}

/// An open raw disk image, locked against other users for as long as it is open.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    file: File,
    /// For requests that are not aligned, where the usual file bypasses the page cache.
    buffered: Option<(File, Alignment)>,
    size: AtomicU64,
    read_only: bool,
    is_block_device: bool,
    cache: CacheMode,
    logical_block_size: u32,
    physical_block_size: u32,
}

impl DiskFile {
    /// Opens and locks the image at `path`.
    ///
    /// A writable disk is locked exclusively and a read-only one shared, by open file description
    /// locks over the whole file, which other monitors see as well.
    ///
    /// # Errors
    /// When it cannot be opened, is no disk, is in use, or cannot be used with `cache`.
    pub fn open(path: &Path, read_only: bool, cache: CacheMode) -> Result<DiskFile, DiskError> {
        let with_path = |action| {
            move |source| DiskError::Io {
                path: path.to_path_buf(),
                action,
                source,
            }
        };
        let mut flags = libc::O_NONBLOCK;
        if !read_only && is_block_device(path) {
            // One that is mounted, or opened so by another, is refused as busy.
            flags |= libc::O_EXCL;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(flags)
            .open(path)
            .map_err(|source| open_error(path, read_only, source))?;
        let kind = file.metadata().map_err(with_path("examine"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = if kind.is_dir() {
                "a directory"
            } else if kind.is_fifo() {
                "a pipe"
            } else {
                "a device of another kind"
            };
            let path = path.to_path_buf();
            return Err(DiskError::Kind { path, kind });
        }
        // It kept a pipe from being waited for. Requests to a disk are to be waited for.
        clear_non_blocking(&file).map_err(with_path("set up"))?;
        // Before it is measured: whoever has it may change its size.
        let lock = if read_only {
            Lock::Shared
        } else {
            Lock::Exclusive
        };
        lock_patiently(&file, lock).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied => DiskError::InUse {
                path: path.to_path_buf(),
            },
            _ => with_path("lock")(source),
        })?;
        let size = measure(&file, kind).map_err(with_path("measure"))?;
        let reason = match size {
            0 => Some("no disk at all; 'truncate --size=1G FILE' makes an empty one"),
            size if size % SECTOR_SIZE != 0 => {
                Some("no multiple of 512; 'truncate --size=%512 FILE' rounds it up")
            }
            _ => None,
        };
        if let Some(reason) = reason {
            let path = path.to_path_buf();
            return Err(DiskError::Size { path, size, reason });
        }
        let mut magic = [0; QCOW2_MAGIC.len()];
        file.read_exact_at(&mut magic, 0)
            .map_err(with_path("read"))?;
        if magic == QCOW2_MAGIC {
            return Err(DiskError::Qcow2 {
                path: path.to_path_buf(),
            });
        }
        let (mut logical_block_size, physical_block_size) =
            block_sizes(&file, kind).map_err(with_path("examine"))?;
        let mut buffered = None;
        let mut usual = file;
        if cache == CacheMode::None {
            let alignment = direct_alignment(&usual, logical_block_size);
            if !size.is_multiple_of(alignment.offset) {
                let path = path.to_path_buf();
                let reason = "no multiple of what its storage reads at a time, which 'cache=none' \
                              needs; use another cache mode";
                return Err(DiskError::Size { path, size, reason });
            }
            logical_block_size = logical_block_size.max(alignment.offset as u32);
            // The lock stays with this first open file, which serves requests that are not aligned.
            let direct = open_direct(&usual, read_only).map_err(|source| DiskError::Direct {
                path: path.to_path_buf(),
                source,
            })?;
            buffered = Some((std::mem::replace(&mut usual, direct), alignment));
        }
        Ok(DiskFile {
            path: path.to_path_buf(),
            file: usual,
            buffered,
            size: AtomicU64::new(size),
            read_only,
            is_block_device: kind.is_block_device(),
            cache,
            logical_block_size,
            physical_block_size: physical_block_size.max(logical_block_size),
        })
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether `path` leads to the image that is open.
    ///
    /// # Errors
    /// When one of them cannot be looked at.
    pub fn is_at(&self, path: &Path) -> io::Result<bool> {
        let open = self.file.metadata()?;
        let there = fs::metadata(path)?;
        Ok((open.dev(), open.ino()) == (there.dev(), there.ino()))
    }

    /// Size in bytes, a multiple of [`SECTOR_SIZE`].
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Takes the size that the image has now for the disk's, and gives it.
    ///
    /// # Errors
    /// When it cannot be measured, or cannot be the size of this disk: that is a multiple of
    /// [`DiskFile::logical_block_size`] and not zero.
    pub fn update_size(&self) -> io::Result<u64> {
        let size = measure(&self.file, self.file.metadata()?.file_type())?;
        if size == 0 || !size.is_multiple_of(self.logical_block_size.into()) {
            let error = format!(
                "its size of {size} bytes is not a multiple of {}",
                self.logical_block_size
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        self.size.store(size, Ordering::Release);
        Ok(size)
    }

    /// Whether nothing may be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What becomes of written data.
    pub fn cache(&self) -> CacheMode {
        self.cache
    }

    /// Smallest unit in which the guest should address the disk, in bytes.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// Unit that the host writes without reading the rest of it first, in bytes; a multiple of
    /// [`DiskFile::logical_block_size`].
    pub fn physical_block_size(&self) -> u32 {
        self.physical_block_size
    }

    /// The image as it is opened for `access`, if it is.
    pub fn file(&self, access: Access) -> Option<&File> {
        match access {
            Access::Usual => Some(&self.file),
            Access::Buffered => self.buffered.as_ref().map(|(file, _)| file),
        }
    }

    /// By which file a transfer between `offset` and `buffers` goes.
    pub fn access_for(&self, buffers: &GuestBuffers, offset: u64) -> Access {
        match &self.buffered {
            Some((_, alignment))
                if !offset.is_multiple_of(alignment.offset)
                    || !buffers.are_aligned(alignment.memory, alignment.offset as usize) =>
            {
                Access::Buffered
            }
            _ => Access::Usual,
        }
    }

    /// Fills `buffers` with the bytes from `offset` on.
    ///
    /// # Errors
    /// As `preadv`; also when the file ends before the buffers do.
    pub fn read(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        self.transfer(buffers, offset, 0, GuestBuffers::read_from)
    }

    /// As [`DiskFile::read`], but only with what the page cache holds: what is not read is left in
    /// `buffers`.
    ///
    /// # Errors
    /// As [`DiskFile::read`].
    pub fn read_cached(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        match self.transfer(buffers, offset, libc::RWF_NOWAIT, GuestBuffers::read_from) {
            // A file system that cannot tell says `EOPNOTSUPP`.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::EINVAL)
                ) =>
            {
                Ok(())
            }
            result => result,
        }
    }

    /// Writes `buffers` to the bytes from `offset` on; if it is to be `durable`, to stable storage.
    ///
    /// # Errors
    /// As `pwritev2`.
    pub fn write(&self, buffers: &mut GuestBuffers, offset: u64, durable: bool) -> io::Result<()> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        self.transfer(buffers, offset, flags, GuestBuffers::write_to)
    }

    fn transfer(
        &self,
        buffers: &mut GuestBuffers,
        mut offset: u64,
        flags: libc::c_int,
        call: fn(&mut GuestBuffers, BorrowedFd<'_>, Option<FilePosition>) -> io::Result<usize>,
    ) -> io::Result<()> {
        while !buffers.is_empty() {
            let file = match self.access_for(buffers, offset) {
                Access::Usual => &self.file,
                Access::Buffered => self.plain_file(),
            };
            match call(buffers, file.as_fd(), Some(FilePosition { offset, flags })) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => offset += count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Brings everything written so far to stable storage, unless the cache mode is
    /// [`CacheMode::Unsafe`].
    ///
    /// # Errors
    /// As `fdatasync`.
    pub fn flush(&self) -> io::Result<()> {
        match self.cache {
            CacheMode::Unsafe => Ok(()),
            _ => self.file.sync_data(),
        }
    }

    /// Gives the storage of a range back to the host. What the range reads as afterwards is not
    /// defined; where the host cannot do it, nothing happens.
    ///
    /// # Errors
    /// As `fallocate`, or the block device's.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.deallocate(offset, len) {
            Err(error) if is_unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Makes a range read as zeroes; with `deallocate` by giving its storage back, where the host
    /// can do so and still reads zeroes. Gives how many bytes were written for that, as far as it is
    /// known: a block device may write all of them.
    ///
    /// # Errors
    /// As `fallocate` and `pwrite`, or the block device's.
    pub fn write_zeroes(&self, offset: u64, len: u64, deallocate: bool) -> io::Result<u64> {
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
            Ok(()) if self.is_block_device => Ok(len),
            Ok(()) => Ok(0),
            Err(error) if is_unsupported(&error) => {
                self.fill_with_zeroes(offset, len)?;
                Ok(len)
            }
            Err(error) => Err(error),
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

    /// The file that takes any offset and size.
    fn plain_file(&self) -> &File {
        self.file(Access::Buffered).unwrap_or(&self.file)
    }

    fn fill_with_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeroes = [0; ZEROES_SIZE];
        while len > 0 {
            let count = len.min(ZEROES_SIZE as u64);
            self.plain_file()
                .write_all_at(&zeroes[..count as usize], offset)?;
            offset += count;
            len -= count;
        }
        Ok(())
    }
}

fn open_error(path: &Path, read_only: bool, source: io::Error) -> DiskError {
    let remedy = match source.raw_os_error() {
        Some(libc::EACCES | libc::EROFS) if !read_only => "; ',ro' opens it read-only",
        Some(libc::EBUSY) => {
            return DiskError::InUse {
                path: path.to_path_buf(),
            };
        }
        Some(libc::EISDIR) => {
            let path = path.to_path_buf();
            let kind = "a directory";
            return DiskError::Kind { path, kind };
        }
        _ => "",
    };
    DiskError::Open {
        path: path.to_path_buf(),
        access: if read_only {
            "reading"
        } else {
            "reading and writing"
        },
        source,
        remedy,
    }
}

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Size in bytes of an open image of this kind.
fn measure(file: &File, kind: FileType) -> io::Result<u64> {
    if kind.is_file() {
        return Ok(file.metadata()?.len());
    }
    let mut size = 0;
    // SAFETY: the request writes one u64 to the place it is given.
    unsafe { block_device::size_in_bytes(file.as_raw_fd(), &mut size) }?;
    Ok(size)
}

/// Logical and physical block size, in bytes.
fn block_sizes(file: &File, kind: FileType) -> io::Result<(u32, u32)> {
    if kind.is_file() {
        let preferred = std::os::unix::fs::MetadataExt::blksize(&file.metadata()?);
        let physical = match u32::try_from(preferred) {
            Ok(size @ 512..=MAX_BLOCK_SIZE) if size.is_power_of_two() => size,
            _ => DEFAULT_PHYSICAL_BLOCK_SIZE,
        };
        return Ok((SECTOR_SIZE as u32, physical));
    }
    let (mut logical, mut physical) = (0, 0);
    // SAFETY: the requests each write one integer of the type that they are declared with.
    unsafe {
        block_device::logical_block_size(file.as_raw_fd(), &mut logical)?;
        block_device::physical_block_size(file.as_raw_fd(), &mut physical)?;
    }
    Ok((logical as u32, physical))
}

/// What `O_DIRECT` asks of requests to `file`: what the kernel says, or else what suits any storage
/// of that block size.
fn direct_alignment(file: &File, logical_block_size: u32) -> Alignment {
    const SAFE: u32 = 4096;
    // SAFETY: all-zero bytes are a valid `struct statx`, which is plain numbers.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty string with its NUL, and the call writes one `struct statx`.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut status,
        )
    };
    let known = result == 0
        && status.stx_mask & libc::STATX_DIOALIGN != 0
        && status.stx_dio_offset_align.is_power_of_two()
        && status.stx_dio_mem_align.is_power_of_two();
    let (offset, memory) = if known {
        (status.stx_dio_offset_align, status.stx_dio_mem_align)
    } else {
        (SAFE.max(logical_block_size), SAFE)
    };
    Alignment {
        offset: u64::from(offset),
        memory: memory as usize,
    }
}

fn clear_non_blocking(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Opens the file that `file` is once more, to bypass the page cache.
fn open_direct(file: &File, read_only: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Whether the host cannot do what was asked for. A block device whose sectors are larger than those
/// of the guest's disk says `EINVAL` to a range that is no multiple of them.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL)
    )
}

#[cfg(test)]
mod tests;
