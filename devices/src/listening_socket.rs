//! Unix domain sockets to which programs of the host connect.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// A socket in the file system that listens for as long as this exists, and is removed then.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: FileIdentity,
}

/// By which a file is known again.
type FileIdentity = (u64, u64);

impl ListeningSocket {
    /// Listens at `path`, in place of a socket that a program has left behind there if there is one.
    ///
    /// # Errors
    /// As `bind`: of the kind [`io::ErrorKind::AddrInUse`] if there is a file, or a socket to which
    /// something listens.
    pub fn bind(path: &Path) -> io::Result<ListeningSocket> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
                fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            result => result,
        }?;
        let socket = ListeningSocket {
            identity: identity(path)?,
            listener,
            path: path.to_path_buf(),
        };
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a client that has connected; its stream is non-blocking.
    ///
    /// # Errors
    /// Of the kind [`io::ErrorKind::WouldBlock`] if there is none; others as `accept`.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

impl AsRawFd for ListeningSocket {
    /// Readable once a client has connected.
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for ListeningSocket {
    /// Removes the socket while it is still listened to: nobody takes its place before that. If
    /// another file has done so all the same, that one stays.
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove socket '{}': {error}", self.path.display());
        }
    }
}

fn identity(path: &Path) -> io::Result<FileIdentity> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether `path` is a socket to which nothing listens any more.
fn is_abandoned(path: &Path) -> bool {
    let is_socket =
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket && is_refused(path)
}

/// Whether a connection to the socket at `path` is refused. One that would have to wait is not.
fn is_refused(path: &Path) -> bool {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (Ok(client), Ok(address)) = (
        socket(AddressFamily::Unix, SockType::Stream, flags, None),
        UnixAddr::new(path),
    ) else {
        return false;
    };
    connect(client.as_raw_fd(), &address) == Err(Errno::ECONNREFUSED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn an_abandoned_socket_is_replaced_and_nothing_else() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let socket = ListeningSocket::bind(&path).unwrap();
        let error = ListeningSocket::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        // The probe of the second is a client of the first.
        socket.accept().unwrap();
        let error = socket.accept().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(socket);
        assert!(!path.exists());

        fs::write(&path, "data").unwrap();
        let error = ListeningSocket::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn what_has_taken_its_place_stays() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("socket");
        let first = ListeningSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = ListeningSocket::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }
}
