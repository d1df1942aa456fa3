//! The connection of the two ends.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bantam_memory::GuestBuffers;
use socket2::{Domain, Socket};

use crate::MigrationError;

/// For how long the other end may neither send nor take anything that is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Most connections of one migration: each takes a thread at both ends.
pub const MAX_CONNECTIONS: u8 = 16;

/// A stream socket that leads to the other end, and others over which pages go too.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    pub(crate) others: Vec<Connection>,
}

#[derive(Debug)]
struct Shared {
    socket: Socket,
    is_broken_off: AtomicBool,
}

/// Breaks a connection off, from any thread.
#[derive(Debug, Clone)]
pub struct Breaker(Vec<Arc<Shared>>);

impl Breaker {
    /// Breaks the connection off: whoever uses it fails with [`MigrationError::Cancelled`].
    pub fn break_off(&self) {
        for shared in &self.0 {
            shared.is_broken_off.store(true, Ordering::SeqCst);
            // It may be broken already.
            let _ = shared.socket.shutdown(Shutdown::Both);
        }
    }
}

impl Connection {
    /// Uses a connected stream socket.
    ///
    /// # Errors
    /// If it is not one.
    pub fn new(socket: impl Into<OwnedFd>) -> io::Result<Connection> {
        let socket = Socket::from(socket.into());
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        if socket.domain()? != Domain::UNIX {
            // Answers are waited for.
            socket.set_tcp_nodelay(true)?;
        }
        Ok(Connection {
            shared: Arc::new(Shared {
                socket,
                is_broken_off: AtomicBool::new(false),
            }),
            others: Vec::new(),
        })
    }

    /// Has pages go over `other` too, which leads to the same end. Both ends have to add as many.
    pub fn add(&mut self, other: Connection) {
        self.others.push(other);
    }

    /// Returns the sockets, this one first, for another process. Nothing of the streams is kept here.
    ///
    /// # Errors
    /// If the host is out of descriptors.
    pub(crate) fn into_descriptors(self) -> io::Result<Vec<OwnedFd>> {
        let duplicate = |it: &Connection| Ok(it.socket().try_clone()?.into());
        self.all().map(duplicate).collect()
    }

    /// Returns this connection and the others.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Connection> {
        std::iter::once(self).chain(&self.others)
    }

    /// Returns what breaks the connection off.
    pub fn breaker(&self) -> Breaker {
        Breaker(self.all().map(|it| it.shared.clone()).collect())
    }

    /// Receives nothing more. What is received fails with [`MigrationError::Closed`].
    pub(crate) fn stop_receiving(&self) {
        // It may be broken already.
        let _ = self.socket().shutdown(Shutdown::Read);
    }

    pub(crate) fn send(&self, mut bytes: &[u8]) -> Result<(), MigrationError> {
        while !bytes.is_empty() {
            // Without a signal to the process if the other end is gone.
            let sent = self.socket().send_with_flags(bytes, libc::MSG_NOSIGNAL);
            match sent {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    pub(crate) fn send_buffers(&self, buffers: &mut GuestBuffers) -> Result<(), MigrationError> {
        while !buffers.is_empty() {
            match buffers.send_to(self.socket().as_fd()) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    pub(crate) fn receive(&self, bytes: &mut [u8]) -> Result<(), MigrationError> {
        let mut socket = self.socket();
        let read = socket.read_exact(bytes);
        read.map_err(|error| self.failed(error))
    }

    /// Receives at most `len` bytes, for which no memory is taken before they come.
    pub(crate) fn receive_body(&self, len: usize) -> Result<Vec<u8>, MigrationError> {
        let mut bytes = Vec::new();
        let read = self.socket().take(len as u64).read_to_end(&mut bytes);
        match read {
            Ok(count) if count == len => Ok(bytes),
            Ok(_) => Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.failed(error)),
        }
    }

    pub(crate) fn receive_buffers(&self, buffers: &mut GuestBuffers) -> Result<(), MigrationError> {
        while !buffers.is_empty() {
            match buffers.read_from(self.socket().as_fd(), None) {
                Ok(0) => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    fn socket(&self) -> &Socket {
        &self.shared.socket
    }

    fn failed(&self, error: io::Error) -> MigrationError {
        match self.shared.is_broken_off.load(Ordering::SeqCst) {
            true => MigrationError::Cancelled,
            false => MigrationError::of_connection(error),
        }
    }
}
