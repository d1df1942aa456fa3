//! The connection to gdb.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use gdbstub::conn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::debugger::Debugger;

/// A stream of bytes to gdb, which does not block.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn reader(&self) -> &dyn AsFd {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Unix(stream) => stream,
        }
    }

    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).read(bytes),
            Stream::Unix(stream) => (&*stream).read(bytes),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).write(bytes),
            Stream::Unix(stream) => (&*stream).write(bytes),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader().as_fd()
    }
}

/// Why a session ends by itself.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// By the machine's end.
    #[error("the machine has ended")]
    Machine,
    /// By gdb's.
    #[error("the connection was closed")]
    Closed,
    /// By an error of the connection.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a session has to do next.
pub(super) enum Next {
    Byte(u8),
    /// A vCPU has stopped.
    Stopped,
}

/// The two directions of a connection. No wait for gdb outlasts the machine.
pub(super) struct Connection {
    stream: Stream,
    debugger: Arc<Debugger>,
    /// What has been read, in reverse, so that the next byte is the last.
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Connection {
    pub(super) fn new(stream: Stream, debugger: Arc<Debugger>) -> Connection {
        Connection {
            stream,
            debugger,
            input: Vec::new(),
            output: Vec::new(),
        }
    }

    /// Waits for a byte from gdb.
    pub(super) fn next_byte(&mut self) -> Result<u8, Ended> {
        loop {
            if let Some(byte) = self.take_byte()? {
                return Ok(byte);
            }
            self.wait(PollFlags::POLLIN, false)?;
        }
    }

    /// Waits for a byte from gdb or a vCPU that stops.
    pub(super) fn next(&mut self) -> Result<Next, Ended> {
        loop {
            if let Some(byte) = self.take_byte()? {
                return Ok(Next::Byte(byte));
            }
            if self.wait(PollFlags::POLLIN, true)? {
                return Ok(Next::Stopped);
            }
        }
    }

    fn take_byte(&mut self) -> Result<Option<u8>, Ended> {
        if let Some(byte) = self.input.pop() {
            return Ok(Some(byte));
        }
        // A client that never stops sending must not hide the machine's end.
        if self.debugger.control().is_stopping() {
            return Err(Ended::Machine);
        }
        let mut bytes = [0; 1024];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(Ended::Closed),
            Ok(len) => {
                self.input.extend(bytes[..len].iter().rev());
                Ok(self.input.pop())
            }
            Err(error) if is_temporary(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the stream is ready for `flags`, or a vCPU `stops`, and returns whether one has.
    fn wait(&self, flags: PollFlags, stops: bool) -> Result<bool, Ended> {
        let read = PollFlags::POLLIN;
        let mut events = [
            PollFd::new(self.debugger.control().exit_event(), read),
            PollFd::new(self.stream.as_fd(), flags),
            PollFd::new(self.debugger.stopped_event(), read),
        ];
        let count = if stops { 3 } else { 2 };
        match poll(&mut events[..count], PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        let is_ready = |event: &PollFd<'_>| event.any().unwrap_or(false);
        if is_ready(&events[0]) {
            return Err(Ended::Machine);
        }
        Ok(stops && is_ready(&events[2]))
    }

    /// Sends the answer to a request that has no other.
    pub(super) fn send_ok(&mut self) -> Result<(), Ended> {
        self.output.extend(b"$OK#9a");
        self.send()
    }

    /// Sends what has been written, even if the machine has ended, unless gdb does not take it.
    pub(super) fn send(&mut self) -> Result<(), Ended> {
        let output = std::mem::take(&mut self.output);
        let mut rest = &output[..];
        while !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(0) => return Err(Ended::Closed),
                Ok(len) => rest = &rest[len..],
                Err(error) if is_temporary(&error) => {
                    self.wait(PollFlags::POLLOUT, false)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl conn::Connection for Connection {
    type Error = Ended;

    fn write(&mut self, byte: u8) -> Result<(), Ended> {
        self.output.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Ended> {
        self.send()
    }
}
