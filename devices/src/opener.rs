//! How a machine gets at the files, sockets and taps of its host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::listening_socket::{ListenError, ListeningSocket};
use crate::tap::{QueueCount, Tap, TapError};

/// What a file is opened for. A pipe that nobody has at its other end is not waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
    /// Reading and writing a file or a block device; a block device that is mounted or opened in this way
    /// elsewhere is refused as busy (`O_EXCL`).
    ReadWriteDisk,
    /// Appending, to a file that is created if there is none.
    Append,
}

/// Opens what a machine uses of its host.
///
/// A program can have a machine's files opened by another process, or refuse those that it does not want to be
/// opened. [`HostOpener`] opens them as the calling process can.
pub trait Opener: Send + Sync {
    /// Opens the file or device at `path`. Descriptors do not block and are closed on exec.
    ///
    /// # Errors
    /// If it cannot be opened for `access`.
    fn file(&self, path: &Path, access: FileAccess) -> io::Result<File>;

    /// Listens on a Unix socket at `path`.
    ///
    /// # Errors
    /// As [`ListeningSocket::bind`].
    fn listen(&self, path: &Path) -> Result<ListeningSocket, ListenError>;

    /// Attaches to the tap `name`.
    ///
    /// # Errors
    /// As [`Tap::open`].
    fn tap(&self, name: &str, mtu: Option<u16>, queues: QueueCount) -> Result<Tap, TapError>;
}

/// Opens everything with the rights of the calling process.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostOpener;

impl Opener for HostOpener {
    fn file(&self, path: &Path, access: FileAccess) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let mut flags = libc::O_NONBLOCK;
        match access {
            FileAccess::Read => options.read(true),
            FileAccess::ReadWrite => options.read(true).write(true),
            FileAccess::ReadWriteDisk => {
                // The kernel defines it for block devices only.
                if is_block_device(path) {
                    flags |= libc::O_EXCL;
                }
                options.read(true).write(true)
            }
            FileAccess::Append => options.append(true).create(true),
        };
        options.custom_flags(flags).open(path)
    }

    fn listen(&self, path: &Path) -> Result<ListeningSocket, ListenError> {
        ListeningSocket::bind(path)
    }

    fn tap(&self, name: &str, mtu: Option<u16>, queues: QueueCount) -> Result<Tap, TapError> {
        Tap::open(name, mtu, queues)
    }
}

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}
