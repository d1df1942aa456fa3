//! Unix domain sockets to which programs on the host connect.
//!
//! A socket's file outlives a process that is killed, so the next process has to find out whether anyone
//! still listens on it. A process that takes a path or gives it up holds the [`PathLock`] from its check of
//! the file until it has changed it. So if several find an abandoned socket only one replaces it, and none
//! removes a socket that has taken its place meanwhile. The lock is not held while the socket is in use, so a
//! path whose file was removed can be used again.

mod error;
mod path_lock;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use bantam_storage::patiently;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

use path_lock::PathLock;

pub use error::ListenError;

/// Suffix of a socket's name until it listens.
const STAGING_SUFFIX: &str = ".new";
/// Longest path in bytes that fits into the address of a socket together with its final zero byte.
const MAX_PATH_SIZE: usize = size_of::<libc::sockaddr_un>() - size_of::<libc::sa_family_t>() - 1;

/// A socket in the file system that listens for as long as this exists, and is removed then.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: FileIdentity,
}

/// Who can connect to a socket.
#[derive(Clone, Copy, Debug)]
enum Clients {
    /// Those whom the file mode creation mask lets write to the file.
    OfUmask,
    /// The user of this process, and root.
    OfUser,
}

impl Clients {
    /// Listens at `path`, which must be free.
    fn listen(self, path: &Path) -> io::Result<UnixListener> {
        match self {
            Clients::OfUmask => UnixListener::bind(path),
            Clients::OfUser => {
                let socket = socket(
                    AddressFamily::Unix,
                    SockType::Stream,
                    SockFlag::SOCK_CLOEXEC,
                    None,
                )?;
                // The file gets the mode that the socket has when it is bound, so there is no moment at which others
                // could connect.
                fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
                bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
                listen(&socket, Backlog::MAXCONN)?;
                Ok(socket.into())
            }
        }
    }
}

/// Device and inode numbers of a file.
type FileIdentity = (u64, u64);

impl ListeningSocket {
    /// Listens at `path`, and replaces a socket that a process has left behind there. Waits for one that is
    /// in use, as [`patiently`] does. The file appears only once clients can connect.
    ///
    /// # Errors
    /// If there is a file of another kind, another process listens there, or nothing can be created.
    pub fn bind(path: &Path) -> Result<ListeningSocket, ListenError> {
        ListeningSocket::bind_for(Clients::OfUmask, path)
    }

    /// Listens at `path` like [`ListeningSocket::bind`], but only the user of this process and root can connect,
    /// whatever the file mode creation mask (umask) allows.
    ///
    /// # Errors
    /// Those of [`ListeningSocket::bind`].
    pub fn bind_private(path: &Path) -> Result<ListeningSocket, ListenError> {
        ListeningSocket::bind_for(Clients::OfUser, path)
    }

    fn bind_for(clients: Clients, path: &Path) -> Result<ListeningSocket, ListenError> {
        check_path(path)?;
        patiently(
            |error| matches!(error, ListenError::InUse),
            || take_path(path, clients),
        )
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts a client that has connected; its stream is non-blocking.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none; otherwise those of `accept`.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Makes a second descriptor of the listening socket, which is non-blocking and accepts clients for as
    /// long as it exists.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn try_clone_listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl AsRawFd for ListeningSocket {
    /// Readable once a client has connected.
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for ListeningSocket {
    /// Removes the file while the socket still listens, unless another file has taken its place.
    fn drop(&mut self) {
        let lock = match PathLock::take(&self.path) {
            // No other process replaces a socket that listens, so only one whose user has removed this one could
            // come in between.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                Ok(None)
            }
            lock => lock.map(Some),
        };
        let removed = lock.and_then(|_lock| match identity(&self.path) {
            Ok(found) if found == self.identity => fs::remove_file(&self.path),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        });
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove socket '{}': {error}", self.path.display());
        }
    }
}

/// Refuses a path that a socket cannot have, before anything is created.
fn check_path(path: &Path) -> Result<(), ListenError> {
    let size = path.as_os_str().len();
    if size > MAX_PATH_SIZE {
        return Err(ListenError::TooLong {
            size,
            max: MAX_PATH_SIZE,
        });
    }
    if path.file_name().is_none() || path.as_os_str().as_bytes().contains(&0) {
        return Err(ListenError::InvalidPath);
    }
    Ok(())
}

/// Listens at `path` if it is free or abandoned now.
fn take_path(path: &Path, clients: Clients) -> Result<ListeningSocket, ListenError> {
    let _lock = PathLock::take(path).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => ListenError::Contended,
        _ => error.into(),
    })?;
    let is_abandoned = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            if !is_abandoned(path)? {
                return Err(ListenError::InUse);
            }
            true
        }
        Ok(_) => return Err(ListenError::NotASocket),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error.into()),
    };
    let staged = stage(path, clients);
    if is_abandoned {
        fs::remove_file(path)?;
    }
    let listener = match staged {
        Some(staged) => staged.publish(path)?,
        None => listen_directly(path, clients)?,
    };
    listener.set_nonblocking(true)?;
    Ok(ListeningSocket {
        identity: identity(path)?,
        listener,
        path: path.to_path_buf(),
    })
}

/// A listening socket that has yet to get its name.
struct Staged {
    listener: UnixListener,
    path: PathBuf,
    clients: Clients,
}

/// Listens under a name beside `path`, if that name fits into an address and is free. No other process uses
/// that name, as it would have to hold the lock.
fn stage(path: &Path, clients: Clients) -> Option<Staged> {
    let path = with_suffix(path, STAGING_SUFFIX);
    SocketAddr::from_pathname(&path).ok()?;
    let is_socket =
        fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && matches!(is_abandoned(&path), Ok(true)) {
        // Its maker was killed.
        fs::remove_file(&path).ok()?;
    }
    let listener = clients.listen(&path).ok()?;
    Some(Staged {
        listener,
        path,
        clients,
    })
}

impl Staged {
    /// Gives the socket its name, which must be free.
    fn publish(self, path: &Path) -> Result<UnixListener, ListenError> {
        let published = fs::hard_link(&self.path, path);
        fs::remove_file(&self.path)?;
        match published {
            Ok(()) => Ok(self.listener),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(ListenError::InUse),
            // Not every file system has hard links.
            Err(_) => listen_directly(path, self.clients),
        }
    }
}

/// Listens at `path` directly. Between the two system calls that this takes, clients are refused.
fn listen_directly(path: &Path, clients: Clients) -> Result<UnixListener, ListenError> {
    clients.listen(path).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse,
        _ => error.into(),
    })
}

fn identity(path: &Path) -> io::Result<FileIdentity> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether no process has the socket at `path` open.
///
/// The probe connects a socket of another type, so that no process gets a client. The kernel refuses it
/// because of the wrong type if there is a process (unix(7), `EPROTOTYPE`), and as a refused connection if
/// there is none.
fn is_abandoned(path: &Path) -> Result<bool, ListenError> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let client =
        socket(AddressFamily::Unix, SockType::Datagram, flags, None).map_err(io::Error::from)?;
    let address = UnixAddr::new(path).map_err(io::Error::from)?;
    match connect(client.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED) => Ok(true),
        // If the socket at `path` is a datagram socket, it takes the connection, or refuses it if it is
        // connected already.
        Ok(()) | Err(Errno::EPROTOTYPE | Errno::EPERM) => Ok(false),
        Err(Errno::EACCES) => Err(ListenError::Foreign),
        Err(error) => Err(ListenError::Io(error.into())),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = OsString::from(path);
    path.push(suffix);
    path.into()
}

#[cfg(test)]
mod tests;
