//! The host's end of a connection: a stream over a Unix domain socket.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bantam_memory::GuestBuffers;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};

/// A stream whose calls never block or raise `SIGPIPE`.
#[derive(Debug)]
pub(super) struct HostStream(UnixStream);

impl AsRawFd for HostStream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl HostStream {
    /// Takes a stream that is non-blocking already.
    pub(super) fn new(stream: UnixStream) -> HostStream {
        HostStream(stream)
    }

    /// Makes a stream that has yet to be connected.
    pub(super) fn unconnected() -> io::Result<HostStream> {
        let stream = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        Ok(HostStream(stream.into()))
    }

    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if the backlog of the program there is full; others if nothing listens
    /// there.
    pub(super) fn connect(&self, path: &Path) -> io::Result<()> {
        let address = UnixAddr::new(path)?;
        retry(|| Ok(connect(self.as_raw_fd(), &address)?))
    }

    /// Copies bytes that have arrived to `bytes`, without taking them.
    pub(super) fn peek(&self, bytes: &mut [u8]) -> io::Result<usize> {
        retry(|| Ok(recv(self.as_raw_fd(), bytes, MsgFlags::MSG_PEEK)?))
    }

    /// Takes bytes that have arrived.
    pub(super) fn receive(&self, bytes: &mut [u8]) -> io::Result<usize> {
        retry(|| Ok(recv(self.as_raw_fd(), bytes, MsgFlags::empty())?))
    }

    /// Takes bytes that have arrived into the front of `buffers`.
    pub(super) fn receive_into(&self, buffers: &mut GuestBuffers) -> io::Result<usize> {
        retry(|| buffers.read_from(self.0.as_fd(), None))
    }

    /// Sends `bytes`, and returns how many were sent.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        retry(|| Ok(send(self.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?))
    }

    /// Sends from the front of `buffers`, and returns how many bytes were sent.
    pub(super) fn send_from(&self, buffers: &mut GuestBuffers) -> io::Result<usize> {
        retry(|| buffers.send_to(self.0.as_fd()))
    }

    /// Ends one direction. That fails only if the other end has done so already.
    pub(super) fn shut_down(&self, direction: Shutdown) {
        let _ = self.0.shutdown(direction);
    }
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
