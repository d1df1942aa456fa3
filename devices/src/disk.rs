//! Raw disk images: a regular file or a block device whose bytes are the disk's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};

use crate::virtio::GuestBuffers;

/// Disks are addressed in units of this many bytes.
pub const SECTOR_SIZE: u64 = 512;

/// First bytes of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Size of the zeroes that are written at a time where a file system cannot zero a range itself.
const ZEROES_SIZE: usize = 64 << 10;

mod block_device {
    //! Requests to block devices (`linux/fs.h`).
    nix::ioctl_read!(size_in_bytes, 0x12, 114, u64);
    // These two are numbered without a size, so nix's "bad" form is the right one.
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(zero_out, nix::request_code_none!(0x12, 127), [u64; 2]);
}

/// Why a disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("cannot open disk '{path}' for {access}: {source}{remedy}", path = .path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// Why not.
        source: io::Error,
        /// What may help, as a continuation of the line.
        remedy: &'static str,
    },
    /// It is neither a regular file nor a block device.
    #[error("cannot use disk '{path}': it is {kind}, not a regular file or a block device", path = .path.display())]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Its size cannot be a disk's.
    #[error("cannot use disk '{path}': its size of {size} bytes is {reason}", path = .path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Why it cannot be used and what to do.
        reason: &'static str,
    },
    /// Another machine uses it.
    #[error(
        "cannot lock disk '{path}': it is in use by another machine, disk or mount; \
         only read-only disks can be shared",
        path = .path.display()
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// It is an image of a format that is not raw, which would reach the guest as garbage.
    #[error(
        "cannot use disk '{path}': it is a qcow2 image; \
         'qemu-img convert -O raw' makes a raw one of it",
        path = .path.display()
    )]
    Qcow2 {
        /// The image.
        path: PathBuf,
    },
    /// The file system refused something else.
    #[error("cannot {action} disk '{path}': {source}", path = .path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// An open raw disk image, locked against other users for as long as it is open.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    size: u64,
    read_only: bool,
    is_block_device: bool,
}

impl DiskFile {
    /// Opens and locks the image at `path`.
    ///
    /// A writable disk is locked exclusively and a read-only one shared, by open file description
    /// locks over the whole file, which other monitors see as well.
    ///
    /// # Errors
    /// When it cannot be opened, is no disk, or is in use.
    pub fn open(path: &Path, read_only: bool) -> Result<DiskFile, DiskError> {
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
        // Before it is measured: whoever has it may change its size.
        let access = if read_only {
            Access::Shared
        } else {
            Access::Exclusive
        };
        lock_file(&file, access).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied => DiskError::InUse {
                path: path.to_path_buf(),
            },
            _ => with_path("lock")(source),
        })?;
        let size = if kind.is_file() {
            file.metadata().map_err(with_path("measure"))?.len()
        } else {
            let mut size = 0;
            // SAFETY: the request writes one u64 to the place it is given.
            unsafe { block_device::size_in_bytes(file.as_raw_fd(), &mut size) }
                .map_err(|errno| with_path("measure")(errno.into()))?;
            size
        };
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
        Ok(DiskFile {
            file,
            size,
            read_only,
            is_block_device: kind.is_block_device(),
        })
    }

    /// Size in bytes, a multiple of [`SECTOR_SIZE`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether nothing may be written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `buffers` with the bytes from `offset` on.
    ///
    /// # Errors
    /// As `preadv`; also when the file ends before the buffers do.
    pub fn read(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        self.transfer(buffers, offset, GuestBuffers::read_from)
    }

    /// Writes `buffers` to the bytes from `offset` on.
    ///
    /// # Errors
    /// As `pwritev`.
    pub fn write(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        self.transfer(buffers, offset, GuestBuffers::write_to)
    }

    fn transfer(
        &self,
        buffers: &mut GuestBuffers,
        mut offset: u64,
        call: impl Fn(&mut GuestBuffers, BorrowedFd<'_>, Option<u64>) -> io::Result<usize>,
    ) -> io::Result<()> {
        while !buffers.is_empty() {
            match call(buffers, self.file.as_fd(), Some(offset)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => offset += count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Brings everything written so far to stable storage.
    ///
    /// # Errors
    /// As `fdatasync`.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
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
    /// can do so and still reads zeroes.
    ///
    /// # Errors
    /// As `fallocate` and `pwrite`, or the block device's.
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
        let zeroes = [0; ZEROES_SIZE];
        while len > 0 {
            let count = len.min(ZEROES_SIZE as u64);
            self.file.write_all_at(&zeroes[..count as usize], offset)?;
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

/// How a file is shared with others that lock it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// With any number that share it too.
    Shared,
    /// With nobody.
    Exclusive,
}

/// Locks all of `file` for as long as it is open, without waiting.
///
/// The lock belongs to the open file, so it conflicts also with one of the same process, unlike
/// traditional record locks.
///
/// # Errors
/// As `fcntl` with `F_OFD_SETLK`: `EAGAIN` or `EACCES` when another has it.
pub fn lock_file(file: &File, access: Access) -> io::Result<()> {
    let kind = match access {
        Access::Shared => libc::F_RDLCK,
        Access::Exclusive => libc::F_WRLCK,
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
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
mod tests {
    use super::*;
    use crate::GuestMemory;
    use std::fs;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempdir::TempDir;

    fn directory() -> TempDir {
        TempDir::new().unwrap()
    }

    fn image(directory: &TempDir, size: usize) -> PathBuf {
        let path = directory.as_path().join("disk.img");
        fs::write(&path, vec![0x5a; size]).unwrap();
        path
    }

    fn message(path: &Path, read_only: bool) -> String {
        DiskFile::open(path, read_only).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let directory = directory();
        let path = directory.as_path().join("disk.img");
        assert!(message(&path, false).contains("No such file"));
        assert!(message(directory.as_path(), false).contains("it is a directory"));
        assert!(message(directory.as_path(), true).contains("it is a directory"));
        assert!(message(Path::new("/dev/null"), false).contains("not a regular file"));
        assert!(message(&image(&directory, 0), false).contains("truncate"));
        assert!(message(&image(&directory, 1000), false).contains("no multiple of 512"));
    }

    #[test]
    fn a_qcow2_image_and_a_pipe_are_refused() {
        let directory = directory();
        let path = image(&directory, 1024);
        fs::write(&path, [&QCOW2_MAGIC[..], &[0; 508]].concat()).unwrap();
        assert!(message(&path, true).contains("qemu-img convert"));
        let pipe = directory.as_path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for read_only in [true, false] {
            assert!(message(&pipe, read_only).contains("it is a pipe"));
        }
    }

    #[test]
    fn a_writable_disk_is_used_once() {
        let directory = directory();
        let path = image(&directory, 1024);
        let writable = DiskFile::open(&path, false).unwrap();
        assert!(message(&path, false).contains("in use"));
        assert!(message(&path, true).contains("in use"));
        drop(writable);
        let _reader = DiskFile::open(&path, true).unwrap();
        let _second_reader = DiskFile::open(&path, true).unwrap();
        assert!(message(&path, false).contains("in use"));
    }

    #[test]
    fn bytes_go_both_ways_and_ranges_become_zero() {
        let directory = directory();
        let path = image(&directory, 64 << 10);
        let disk = DiskFile::open(&path, false).unwrap();
        assert_eq!(disk.size(), 64 << 10);
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 10)]).unwrap());
        let mut buffers = GuestBuffers::new(memory.clone());

        memory.write_slice(b"first", GuestAddress(0)).unwrap();
        buffers.push(GuestAddress(0), 512).unwrap();
        disk.write(&mut buffers, 4096).unwrap();
        disk.flush().unwrap();
        assert_eq!(&fs::read(&path).unwrap()[4096..4101], b"first");

        for (offset, deallocate) in [(8192, true), (16384, false)] {
            disk.write_zeroes(offset, 4096, deallocate).unwrap();
            let bytes = fs::read(&path).unwrap();
            let (start, end) = (offset as usize, offset as usize + 4096);
            assert!(bytes[start..end].iter().all(|&byte| byte == 0));
            assert_eq!((bytes[start - 1], bytes[end]), (0x5a, 0x5a));
        }
        disk.fill_with_zeroes(100, 70).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes[99..171].iter().filter(|&&byte| byte == 0).count(), 70);
        disk.discard(0, 4096).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 64 << 10);
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let directory = directory();
        let path = image(&directory, 4096);
        let disk = DiskFile::open(&path, false).unwrap();
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(700)
            .unwrap();
        let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
        let mut buffers = GuestBuffers::new(memory);
        buffers.push(GuestAddress(0), 1024).unwrap();
        let error = disk.read(&mut buffers, 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
