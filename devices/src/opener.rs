//! Opening of the files, sockets and taps that a machine uses on its host.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bantam_storage::{FileOpener, HostOpener};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::listening_socket::{ListenError, ListeningSocket};
use crate::tap::{QueueCount, Tap, TapError};

/// Opens the files, sockets and taps that a machine uses on its host.
///
/// A program can have them opened by another process, or refuse some of them. [`HostOpener`] opens them with
/// the rights of the calling process.
pub trait Opener: FileOpener {
    /// Listens on a Unix socket at `path`.
    ///
    /// # Errors
    /// Those of [`ListeningSocket::bind`].
    fn listen(&self, path: &Path) -> Result<ListeningSocket, ListenError>;

    /// Listens on a TCP port.
    ///
    /// # Errors
    /// If the address is in use, or is not an address of this host.
    fn listen_tcp(&self, address: SocketAddr) -> io::Result<TcpListener> {
        TcpListener::bind(address)
    }

    /// Attaches to the tap `name`.
    ///
    /// # Errors
    /// Those of [`Tap::open`].
    fn tap(&self, name: &str, mtu: Option<u16>, queues: QueueCount) -> Result<Tap, TapError>;

    /// Uses the tap that the process has as descriptor `fd`.
    ///
    /// # Errors
    /// Those of [`Tap::adopt`].
    fn adopt_tap(&self, fd: RawFd) -> Result<Tap, TapError> {
        Tap::adopt(fd)
    }

    /// Connects to the Unix stream socket at `path`, without waiting: the thread of a device may call it.
    ///
    /// # Errors
    /// Those of `connect`; [`io::ErrorKind::WouldBlock`] if too many others wait for the listener.
    fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(socket.into())
    }
}

impl Opener for HostOpener {
    fn listen(&self, path: &Path) -> Result<ListeningSocket, ListenError> {
        ListeningSocket::bind(path)
    }

    fn tap(&self, name: &str, mtu: Option<u16>, queues: QueueCount) -> Result<Tap, TapError> {
        Tap::open(name, mtu, queues)
    }
}
