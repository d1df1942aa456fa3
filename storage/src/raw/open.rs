//! Opening of disk images, and the checks before a guest gets one.

use std::fs::{File, FileType};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::geometry::{block_sizes, direct_alignment, disk_size, measure};
use super::{Bounce, CacheMode, Direct, DiskError, DiskFile, ImageFormat, SECTOR_SIZE, format};
use crate::direct_file::{DirectFile, LayerFile, read_nothing_ahead};
use crate::lock::{LockMode, has_no_locks, lock_image};
use crate::opener::{FileAccess, FileOpener, HostOpener};

/// How a disk image is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// How written data is cached.
    pub cache: CacheMode,
    /// The image's format. If it is not given, the name of the image decides whether it is raw or qcow2, and
    /// one that suggests another format is refused.
    pub format: Option<ImageFormat>,
    /// Whether the image may have backing files, which are then opened too.
    pub backing: bool,
    /// Smallest unit in which the guest is to address the disk in bytes, a power of two and at least
    /// [`SECTOR_SIZE`]. If it is not given, that of a block device, and [`SECTOR_SIZE`] for a file.
    pub block_size: Option<u32>,
    /// How the image is locked against other users.
    pub lock: LockMode,
    /// Whether to accept an empty image, and a writable one that ends within a block. The guest does not see
    /// the bytes after the last whole block.
    pub any_size: bool,
}

impl DiskFile {
    /// Opens and locks the image at `path`.
    ///
    /// It is locked in the way that QEMU does it: nobody else may write to it, and while this one writes,
    /// nobody may read it who needs its content to stay as it is.
    ///
    /// # Errors
    /// If it cannot be opened, is not a disk, is in use, or cannot be used with `options`.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<DiskFile, DiskError> {
        DiskFile::open_by(&HostOpener, path, options)
    }

    /// Opens and locks the image at `path` like [`DiskFile::open`], but with `opener`.
    ///
    /// # Errors
    /// Those of [`DiskFile::open`].
    pub fn open_by(
        opener: &dyn FileOpener,
        path: &Path,
        options: &DiskOptions,
    ) -> Result<DiskFile, DiskError> {
        let lock =
            |file: &File| lock_as_wanted(path, options, || lock_image(file, options.read_only));
        let (disk, format) = DiskFile::open_silently(opener, path, options, lock)?;
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

    /// Checks whether [`DiskFile::open`] could open the image at `path`, provided that it is not in use then.
    ///
    /// # Errors
    /// Those of [`DiskFile::open`].
    pub fn check(path: &Path, options: &DiskOptions) -> Result<(), DiskError> {
        DiskFile::open_silently(&HostOpener, path, options, |_| Ok(())).map(drop)
    }

    /// Opens an image, locks it by `lock`, and returns the format other than raw that its first bytes suggest.
    pub(crate) fn open_silently(
        opener: &dyn FileOpener,
        path: &Path,
        options: &DiskOptions,
        lock: impl FnOnce(&File) -> Result<(), DiskError>,
    ) -> Result<(DiskFile, Option<&'static str>), DiskError> {
        let with_path = |action| {
            move |source| DiskError::Io {
                path: path.to_path_buf(),
                action,
                source,
            }
        };
        let (file, kind) = open_file(opener, path, options.read_only)?;
        if options.format.is_none()
            && let Some(format) = format::of_name(path)
        {
            let path = path.to_path_buf();
            return Err(DiskError::NamedFormat { path, format });
        }
        // Before it is measured: its present user may change its size.
        lock(&file)?;
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
        // The flag kept the open from waiting for a pipe's other end. Requests to a disk must wait.
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

    /// Reads the first bytes of the image. This also shows whether it can be read in the way that it was
    /// opened.
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

/// Opens the file or block device at `path`.
pub(crate) fn open_file(
    opener: &dyn FileOpener,
    path: &Path,
    read_only: bool,
) -> Result<(File, FileType), DiskError> {
    let access = match read_only {
        true => FileAccess::Read,
        false => FileAccess::ReadWriteDisk,
    };
    let file = opener
        .file(path, access)
        .map_err(|source| open_error(path, read_only, source))?;
    let kind = file
        .metadata()
        .map_err(|source| DiskError::Io {
            path: path.to_path_buf(),
            action: "examine",
            source,
        })?
        .file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok((file, kind));
    }
    let kind = if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a device of another kind"
    };
    let path = path.to_path_buf();
    Err(DiskError::Kind { path, kind })
}

/// Opens and locks the file or block device at `path`, which an image that is not raw is kept in.
pub(crate) fn open_locked(
    opener: &dyn FileOpener,
    path: &Path,
    options: &DiskOptions,
) -> Result<File, DiskError> {
    open_image(opener, path, options, |file| {
        lock_as_wanted(path, options, || lock_image(file, options.read_only))
    })
}

/// Opens a file like [`open_locked`], but locks it by `lock`.
pub(crate) fn open_image(
    opener: &dyn FileOpener,
    path: &Path,
    options: &DiskOptions,
    lock: impl FnOnce(&File) -> Result<(), DiskError>,
) -> Result<File, DiskError> {
    let (file, _) = open_file(opener, path, options.read_only)?;
    lock(&file)?;
    // The flag kept the open from waiting for a pipe's other end.
    let flags =
        file_flags(&file).and_then(|flags| set_file_flags(&file, flags - OFlag::O_NONBLOCK));
    flags.map_err(|source| DiskError::Io {
        path: path.to_path_buf(),
        action: "set up",
        source,
    })?;
    Ok(file)
}

/// Creates and locks a regular file at `path`, which an image that is not raw is to be kept in.
pub(crate) fn create_locked(
    opener: &dyn FileOpener,
    path: &Path,
    options: &DiskOptions,
) -> Result<File, DiskError> {
    let create = opener.file(path, FileAccess::Create);
    let file = create.map_err(|source| DiskError::Io {
        path: path.to_path_buf(),
        action: "create",
        source,
    })?;
    let flags =
        file_flags(&file).and_then(|flags| set_file_flags(&file, flags - OFlag::O_NONBLOCK));
    let flags = flags.map_err(|source| DiskError::Io {
        path: path.to_path_buf(),
        action: "set up",
        source,
    });
    match flags.and_then(|()| lock_as_wanted(path, options, || lock_image(&file, false))) {
        Ok(()) => Ok(file),
        Err(error) => {
            // The first error says more than a second one.
            let _ = opener.remove(path);
            Err(error)
        }
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

/// Opens the image `file` at `path` a second time, for [`Access::Tail`].
fn open_tail(opener: &dyn FileOpener, path: &Path, file: &File) -> Result<File, DiskError> {
    let tail = open_again(opener, path, file, false)?;
    read_nothing_ahead(&tail).map_err(|source| DiskError::Io {
        path: path.to_path_buf(),
        action: "set up",
        source,
    })?;
    Ok(tail)
}

/// Makes `cached`, the open file at `path`, one whose bytes of the disk go as the cache mode requires: with
/// [`CacheMode::None`] it is opened a second time for that, past the page cache.
pub(crate) fn open_direct(
    opener: &dyn FileOpener,
    path: &Path,
    cached: File,
    options: &DiskOptions,
) -> Result<LayerFile, DiskError> {
    if options.cache != CacheMode::None {
        return Ok(LayerFile::from(cached));
    }
    let with_path = |source| DiskError::Io {
        path: path.to_path_buf(),
        action: "set up",
        source,
    };
    let no_direct = |source| DiskError::Direct {
        path: path.to_path_buf(),
        source,
    };
    let file = open_again(opener, path, &cached, options.read_only)?;
    let kind = file.metadata().map_err(with_path)?.file_type();
    let (logical, _) = block_sizes(&file, kind).map_err(with_path)?;
    let alignment = direct_alignment(&file, kind.is_block_device(), logical);
    let flags = file_flags(&file).map_err(with_path)?;
    set_file_flags(&file, flags | OFlag::O_DIRECT).map_err(no_direct)?;
    // Only a read shows whether the file system takes requests of this kind.
    let mut bounce = Bounce::new(alignment, 1);
    let bytes = bounce.bytes(0..alignment.offset as usize);
    file.read_at(bytes, 0).map_err(no_direct)?;
    let direct = DirectFile::new(file, alignment);
    LayerFile::locked_beside(cached, direct).map_err(with_path)
}

/// Opens the image `file` at `path` a second time, through the page cache.
pub(crate) fn open_again(
    opener: &dyn FileOpener,
    path: &Path,
    file: &File,
    read_only: bool,
) -> Result<File, DiskError> {
    let with_path = |action| {
        move |source| DiskError::Io {
            path: path.to_path_buf(),
            action,
            source,
        }
    };
    let access = match read_only {
        true => FileAccess::Read,
        false => FileAccess::ReadWrite,
    };
    let again = opener.file(path, access).map_err(with_path("open"))?;
    let identity = |file: &File| file.metadata().map(|it| (it.dev(), it.ino()));
    let same = identity(&again).and_then(|again| Ok(again == identity(file)?));
    if !same.map_err(with_path("examine"))? {
        return Err(DiskError::Changed {
            path: path.to_path_buf(),
        });
    }
    let flags = file_flags(&again).map_err(with_path("set up"))?;
    set_file_flags(&again, flags - OFlag::O_NONBLOCK).map_err(with_path("set up"))?;
    Ok(again)
}

/// Locks an image by `lock` in the way that `options` ask for.
pub(crate) fn lock_as_wanted(
    path: &Path,
    options: &DiskOptions,
    lock: impl FnOnce() -> io::Result<()>,
) -> Result<(), DiskError> {
    if options.lock == LockMode::Off {
        return Ok(());
    }
    let Err(source) = lock() else {
        return Ok(());
    };
    let has_no_locks = has_no_locks(&source);
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
