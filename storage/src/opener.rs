//! Opening of files on the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// The access that a file is opened for. Opening a pipe does not wait for its other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
    /// Reading and writing a file or a block device; a block device that is mounted or opened in this way
    /// elsewhere is refused as busy (`O_EXCL`).
    ReadWriteDisk,
    /// Appending, to a file that is created if it does not exist.
    Append,
    /// Reading and writing a file that is created, for its owner alone, and must not exist.
    Create,
}

/// Opens files on the host.
///
/// A program can have its files opened by another process, or refuse some of them. [`HostOpener`] opens them
/// with the rights of the calling process.
pub trait FileOpener: Send + Sync {
    /// Opens the file or device at `path`. Descriptors do not block and are closed on exec.
    ///
    /// # Errors
    /// If it cannot be opened for `access`.
    fn file(&self, path: &Path, access: FileAccess) -> io::Result<File>;

    /// Removes the file at `path`, which was opened by [`FileAccess::Create`] and is of no use. By default with the
    /// rights of the calling process.
    ///
    /// # Errors
    /// If it cannot be removed.
    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
}

/// Opens everything with the rights of the calling process.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostOpener;

impl FileOpener for HostOpener {
    fn file(&self, path: &Path, access: FileAccess) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let mut flags = libc::O_NONBLOCK;
        match access {
            FileAccess::Read => options.read(true),
            FileAccess::ReadWrite => options.read(true).write(true),
            FileAccess::ReadWriteDisk => {
                // The kernel defines `O_EXCL` without `O_CREAT` for block devices only.
                if is_block_device(path) {
                    flags |= libc::O_EXCL;
                }
                options.read(true).write(true)
            }
            FileAccess::Append => options.append(true).create(true),
            FileAccess::Create => options.read(true).write(true).create_new(true).mode(0o600),
        };
        options.custom_flags(flags).open(path)
    }
}

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}
