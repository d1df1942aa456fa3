//! Why a socket cannot be had, and what to do about it.

use std::io;

/// Why a path cannot be listened on. The text is the end of a line that names the path, and has the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A process listens there, or has bound a socket to the path.
    #[error("another process uses it; choose another path")]
    InUse,
    /// Another process is about to take the path, or to give it up, and does not come to an end.
    #[error("another process is about to take it; try again, or choose another path")]
    Contended,
    /// There is a file that is not a socket, which is left alone.
    #[error("a file that is not a socket is in its place; choose another path")]
    NotASocket,
    /// It does not fit into the address of a socket.
    #[error(
        "the path has {size} bytes, and a socket's has at most {max}; choose a shorter one, \
         for instance relative to the current folder"
    )]
    TooLong {
        /// Its size in bytes.
        size: usize,
        /// Most bytes.
        max: usize,
    },
    /// It is empty or has a zero byte.
    #[error("a socket cannot have such a path")]
    InvalidPath,
    /// Its folder does not exist.
    #[error("its folder does not exist; create the folder first")]
    NoFolder,
    /// There is a socket that this user may not connect to, so it is unknown whether it is in use.
    #[error("a socket of another user is in its place; choose another path")]
    Foreign,
    /// Nothing can be created in the folder.
    #[error("permission denied; choose a path in a folder that this user may write to")]
    FolderDenied,
    /// Nothing can be created on the file system.
    #[error("read-only file system; choose a path on one that can be written to")]
    ReadOnly,
    /// Anything else.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for ListenError {
    fn from(error: io::Error) -> ListenError {
        match error.kind() {
            io::ErrorKind::NotFound => ListenError::NoFolder,
            io::ErrorKind::PermissionDenied => ListenError::FolderDenied,
            io::ErrorKind::ReadOnlyFilesystem => ListenError::ReadOnly,
            _ => ListenError::Io(error),
        }
    }
}
