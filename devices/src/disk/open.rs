//! Opening a disk image: what is looked at before a guest gets it.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};

use super::geometry::{block_sizes, direct_alignment, disk_size, measure};
use super::lock::lock_image;
use super::{
    Bounce, CacheMode, Direct, DiskError, DiskFile, ImageFormat, LockMode, SECTOR_SIZE, format,
};
use crate::opener::{FileAccess, HostOpener, Opener};

/// How a disk image is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Whether nothing may be written.
    pub read_only: bool,
    /// What becomes of written data.
    pub cache: CacheMode,
    /// The image's format. If it is not said, an image whose name says another than raw is refused.
    pub format: Option<ImageFormat>,
    /// Smallest unit in which the guest is to address the disk, a power of two of bytes from
    /// [`SECTOR_SIZE`] on. If it is not said, that of a block device, and [`SECTOR_SIZE`] for a file.
    pub block_size: Option<u32>,
    /// Whether others must leave the image alone.
    pub lock: LockMode,
    /// Whether an image that is empty or, though it is written, ends within a block is taken. The
    /// guest does not see what is beyond the last block.
    pub any_size: bool,
}

impl DiskFile {
    /// Opens and locks the image at `path`.
    ///
    /// It is locked as QEMU does it: nobody else may write to it, nor may another read it who wants
    /// it to stay as it is while this one writes.
    ///
    /// # Errors
    /// When it cannot be opened, is not a disk, is in use, or cannot be used with `options`.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<DiskFile, DiskError> {
        DiskFile::open_by(&HostOpener, path, options)
    }

    /// Opens and locks the image at `path`, like [`DiskFile::open`], by `opener`.
    ///
    /// # Errors
    /// As [`DiskFile::open`].
    pub fn open_by(
        opener: &dyn Opener,
        path: &Path,
        options: &DiskOptions,
    ) -> Result<DiskFile, DiskError> {
        let (disk, format) = DiskFile::open_silently(opener, path, options)?;
        if let Some(format) = format {
            tracing::warn!(
                "disk '{path}' is used as raw, though it begins as a {format} image does. A guest can \
                 write such bytes, so let no program guess the format of this file; only if you know \
                 that it is one, 'qemu-img convert -f {format} -O raw' makes a raw image of it",
                path = path.display()
            );
        }
        disk.warn_of_hidden_bytes();
        Ok(disk)
    }

    /// Finds out whether [`DiskFile::open`] could open the image at `path`, unless it is in use then.
    ///
    /// # Errors
    /// As [`DiskFile::open`].
    pub fn check(path: &Path, options: &DiskOptions) -> Result<(), DiskError> {
        let options = DiskOptions {
            lock: LockMode::Off,
            ..options.clone()
        };
        DiskFile::open_silently(&HostOpener, path, &options).map(drop)
    }

    /// Opens an image, and tells which format other than raw its first bytes are of.
    fn open_silently(
        opener: &dyn Opener,
        path: &Path,
        options: &DiskOptions,
    ) -> Result<(DiskFile, Option<&'static str>), DiskError> {
        let with_path = |action| {
            move |source| DiskError::Io {
                path: path.to_path_buf(),
                action,
                source,
            }
        };
        let access = match options.read_only {
            true => FileAccess::Read,
            false => FileAccess::ReadWriteDisk,
        };
        let file = opener
            .file(path, access)
            .map_err(|source| open_error(path, options.read_only, source))?;
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
        if options.format.is_none()
            && let Some(format) = format::of_name(path)
        {
            let path = path.to_path_buf();
            return Err(DiskError::NamedFormat { path, format });
        }
        // Before it is measured: whoever has it may change its size.
        lock_as_wanted(&file, path, options)?;
        let length = measure(&file, kind).map_err(with_path("measure"))?;
        let (logical, physical_block_size) =
            block_sizes(&file, kind).map_err(with_path("examine"))?;
        let logical_block_size = options.block_size.unwrap_or(logical);
        let is_block_device = kind.is_block_device();
        let size =
            disk_size(length, logical_block_size, is_block_device, options).map_err(|reason| {
                let path = path.to_path_buf();
                DiskError::Size {
                    path,
                    size: length,
                    reason,
                }
            })?;
        let mut flags = file_flags(&file).map_err(with_path("set up"))?;
        // It kept a pipe from being waited for. Requests to a disk are to be waited for.
        flags.remove(OFlag::O_NONBLOCK);
        let mut direct = None;
        let no_direct = |source| DiskError::Direct {
            path: path.to_path_buf(),
            source,
        };
        if options.cache == CacheMode::None {
            let alignment = direct_alignment(&file, is_block_device, logical);
            let has_tail = !options.read_only && !is_block_device && alignment.offset > SECTOR_SIZE;
            let tail = has_tail
                .then(|| open_tail(opener, path, &file))
                .transpose()?;
            direct = Some(Direct { alignment, tail });
            set_file_flags(&file, flags | OFlag::O_DIRECT).map_err(no_direct)?;
        } else {
            set_file_flags(&file, flags).map_err(with_path("set up"))?;
        }
        let block = direct
            .as_ref()
            .map_or(0, |direct| direct.alignment.offset as u32);
        let disk = DiskFile {
            path: path.to_path_buf(),
            file,
            direct,
            size: AtomicU64::new(size),
            length: AtomicU64::new(length),
            options: options.clone(),
            is_block_device,
            logical_block_size,
            physical_block_size: physical_block_size.max(logical_block_size).max(block),
        };
        let head =
            disk.read_head()
                .map_err(|source| match (options.cache, source.raw_os_error()) {
                    (CacheMode::None, Some(libc::EINVAL)) => no_direct(source),
                    _ => with_path("read")(source),
                })?;
        Ok((disk, format::of_bytes(&head)))
    }

    /// The first bytes of the image, which also shows whether it can be read as it is opened.
    fn read_head(&self) -> io::Result<Vec<u8>> {
        if let Some(direct) = &self.direct {
            let mut bounce = Bounce::new(direct.alignment, format::HEAD_SIZE);
            let bytes = bounce.bytes(0..direct.alignment.offset as usize);
            let count = self.file.read_at(bytes, 0)?;
            return Ok(bytes[..count.min(format::HEAD_SIZE)].to_vec());
        }
        let mut head = vec![0; format::HEAD_SIZE];
        let count = self.file.read_at(&mut head, 0)?;
        head.truncate(count);
        Ok(head)
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

/// Opens the image `file` at `path` once more, for [`Access::Tail`].
fn open_tail(opener: &dyn Opener, path: &Path, file: &File) -> Result<File, DiskError> {
    let with_path = |action| {
        move |source| DiskError::Io {
            path: path.to_path_buf(),
            action,
            source,
        }
    };
    let tail = opener
        .file(path, FileAccess::ReadWrite)
        .map_err(with_path("open"))?;
    let identity = |file: &File| file.metadata().map(|it| (it.dev(), it.ino()));
    let same = identity(&tail).and_then(|tail| Ok(tail == identity(file)?));
    if !same.map_err(with_path("examine"))? {
        return Err(DiskError::Changed {
            path: path.to_path_buf(),
        });
    }
    let flags = file_flags(&tail).map_err(with_path("set up"))?;
    set_file_flags(&tail, flags - OFlag::O_NONBLOCK).map_err(with_path("set up"))?;
    // What is before the tail is not to be in the page cache, where it would become outdated.
    let advice = PosixFadviseAdvice::POSIX_FADV_RANDOM;
    posix_fadvise(&tail, 0, 0, advice).map_err(|error| with_path("set up")(error.into()))?;
    Ok(tail)
}

/// Locks an image as far as `options` want it.
fn lock_as_wanted(file: &File, path: &Path, options: &DiskOptions) -> Result<(), DiskError> {
    if options.lock == LockMode::Off {
        return Ok(());
    }
    let Err(source) = lock_image(file, options.read_only) else {
        return Ok(());
    };
    let has_no_locks = matches!(
        source.raw_os_error(),
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    );
    let path = path.to_path_buf();
    let error = match source.kind() {
        io::ErrorKind::WouldBlock => DiskError::InUse { path },
        _ if has_no_locks => DiskError::NoLocks { path, source },
        _ => {
            let action = "lock";
            DiskError::Io {
                path,
                action,
                source,
            }
        }
    };
    match options.lock {
        LockMode::WherePossible if has_no_locks => {}
        LockMode::Warn => {}
        _ => return Err(error),
    }
    tracing::warn!("{error}; it is used without a lock");
    Ok(())
}

fn file_flags(file: &File) -> io::Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?))
}

fn set_file_flags(file: &File, flags: OFlag) -> io::Result<()> {
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}
