//! The host's end of a port: the source of its input and the sink of its output.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bantam_memory::GuestBuffers;
use event_manager::{EventOps, EventSet, Events};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::metrics::ConsoleMetrics;
use super::source::Source;
use crate::ListeningSocket;
use crate::serial::SerialEndpoint;
use crate::virtio::DriverLink;

/// Bytes of emergency writes that are kept until the host takes them.
pub(super) const EMERGENCY_CAPACITY: usize = 4096;

/// The host's end of a port. It outlives the worker: a client stays connected while the driver resets the
/// device.
///
/// Its descriptors are watched edge-triggered: a direction that is ready stays so until a call would block.
#[derive(Default)]
pub(super) struct HostEnd {
    listener: Option<Listener>,
    input: Option<Direction>,
    output: Option<Direction>,
    /// Whether the client has closed both of its directions.
    has_hung_up: bool,
    emergency: VecDeque<u8>,
}

struct Listener {
    socket: ListeningSocket,
    /// Whether clients may be waiting.
    is_ready: bool,
    is_watched: bool,
}

struct Direction {
    stream: File,
    is_ready: bool,
    is_watched: bool,
}

impl Direction {
    fn new(descriptor: OwnedFd) -> Direction {
        Direction {
            stream: descriptor.into(),
            is_ready: true,
            is_watched: false,
        }
    }

    fn watch(
        &mut self,
        source: Source,
        readiness: EventSet,
        operations: &mut EventOps<'_>,
    ) -> event_manager::Result<()> {
        if self.is_watched {
            return Ok(());
        }
        let readiness = readiness | EventSet::EDGE_TRIGGERED;
        let events = Events::with_data(&self.stream, source.token(), readiness);
        match operations.add(events) {
            // A descriptor that cannot be watched, such as a regular file, is always ready.
            Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EPERM => Ok(()),
            result => {
                self.is_watched = result.is_ok();
                result
            }
        }
    }
}

/// Closes a direction. The event loop forgets it first, as the next descriptor gets its number.
fn close(direction: &mut Option<Direction>, operations: &mut EventOps<'_>) {
    if let Some(Direction {
        stream,
        is_watched: true,
        ..
    }) = direction.take()
    {
        // It fails only for a descriptor that is not watched.
        let _ = operations.remove(Events::empty(&stream));
    }
}

impl HostEnd {
    /// Connects the port to `endpoint` from now on. A device that is at work does not notice.
    pub(super) fn connect(&mut self, endpoint: SerialEndpoint) {
        *self = match endpoint {
            SerialEndpoint::Descriptors { input, output } => HostEnd {
                input: input.map(Direction::new),
                output: output.map(Direction::new),
                ..HostEnd::default()
            },
            SerialEndpoint::Listener(socket) => HostEnd {
                listener: Some(Listener {
                    socket,
                    is_ready: true,
                    is_watched: false,
                }),
                ..HostEnd::default()
            },
        };
    }

    /// Has an event loop watch the end of `port`, for a new worker. What happened while it was not watched is
    /// found out by trying.
    pub(super) fn begin(
        &mut self,
        port: usize,
        operations: &mut EventOps<'_>,
    ) -> event_manager::Result<()> {
        for direction in [&mut self.input, &mut self.output].into_iter().flatten() {
            direction.is_watched = false;
            direction.is_ready = true;
        }
        if let Some(listener) = &mut self.listener {
            listener.is_ready = true;
            listener.is_watched = false;
            let readiness = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let token = Source::Listener(port).token();
            operations.add(Events::with_data(&listener.socket, token, readiness))?;
            listener.is_watched = true;
        }
        self.watch(port, operations)
    }

    fn watch(&mut self, port: usize, operations: &mut EventOps<'_>) -> event_manager::Result<()> {
        if let Some(input) = &mut self.input {
            input.watch(Source::Input(port), EventSet::IN, operations)?;
        }
        if let Some(output) = &mut self.output {
            output.watch(Source::Output(port), EventSet::OUT, operations)?;
        }
        Ok(())
    }

    /// Takes note of the readiness of `source`.
    pub(super) fn note_readiness(&mut self, source: Source, ready: EventSet) {
        match (source, &mut self.listener) {
            (Source::Listener(_), Some(listener)) => listener.is_ready = true,
            (Source::Input(_), _) => {
                if let Some(input) = &mut self.input {
                    input.is_ready = true;
                }
            }
            (Source::Output(_), _) => {
                if let Some(output) = &mut self.output {
                    output.is_ready = true;
                }
            }
            _ => {}
        }
        let is_of_client = matches!(source, Source::Input(_) | Source::Output(_));
        if is_of_client && ready.contains(EventSet::HANG_UP) {
            self.has_hung_up = true;
        }
    }

    /// Whether anyone is at this end.
    pub(super) fn is_connected(&self) -> bool {
        self.input.is_some() || self.output.is_some()
    }

    /// Takes the next client, if there is a socket and nobody is connected to it.
    pub(super) fn accept(
        &mut self,
        port: usize,
        operations: &mut EventOps<'_>,
        metrics: &ConsoleMetrics,
        link: &DriverLink,
    ) {
        while !self.is_connected()
            && let Some(listener) = &mut self.listener
            && listener.is_ready
        {
            let accepted = match listener.socket.accept().and_then(split) {
                Ok((input, output)) => {
                    self.input = Some(Direction::new(input));
                    self.output = Some(Direction::new(output));
                    self.has_hung_up = false;
                    metrics.clients_count.add(1);
                    self.watch(port, operations)
                        .map_err(|error| error.to_string())
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    listener.is_ready = false;
                    return;
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = accepted {
                metrics.client_fails.add(1);
                link.warn_of_host(format_args!(
                    "cannot accept a client of port {port}: {error}"
                ));
                self.disconnect(operations);
                return;
            }
        }
    }

    /// Closes the connection if it is that of a client.
    pub(super) fn disconnect(&mut self, operations: &mut EventOps<'_>) {
        if self.listener.is_some() {
            close(&mut self.input, operations);
            close(&mut self.output, operations);
        }
    }

    /// Closes the connection like [`HostEnd::disconnect`] when no event loop watches it any more.
    pub(super) fn disconnect_unwatched(&mut self) {
        if self.listener.is_some() {
            (self.input, self.output) = (None, None);
        }
    }

    /// Closes the connection of a client that is gone and whose bytes have all been read.
    pub(super) fn disconnect_if_gone(&mut self, operations: &mut EventOps<'_>) {
        let is_of_client = self.listener.is_some();
        if is_of_client && self.has_hung_up && self.input.as_ref().is_none_or(has_ended) {
            self.disconnect(operations);
        }
    }

    /// Whether there may be input.
    pub(super) fn can_read(&self) -> bool {
        self.input.as_ref().is_some_and(|input| input.is_ready)
    }

    /// Reads input into `buffers`, and returns how many bytes; zero at the end of the input.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none yet; otherwise those of `readv`.
    pub(super) fn read(&mut self, buffers: &mut GuestBuffers) -> io::Result<usize> {
        let Some(input) = &mut self.input else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let result = retry(|| buffers.read_from(input.stream.as_fd(), None));
        if is_blocked(&result) {
            input.is_ready = false;
        }
        result
    }

    /// Closes the input, which has ended.
    pub(super) fn end_input(&mut self, operations: &mut EventOps<'_>) {
        close(&mut self.input, operations);
    }

    /// Whether anyone takes output.
    pub(super) fn has_output(&self) -> bool {
        self.output.is_some()
    }

    /// Sends from the front of `buffers`, and returns how many bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is no room, or nobody to send to; otherwise those of `writev`
    /// and `sendmsg`.
    pub(super) fn write(&mut self, buffers: &mut GuestBuffers) -> io::Result<usize> {
        self.flush_emergency()?;
        let Some(output) = &mut self.output else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        if !output.is_ready {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let fd = output.stream.as_fd();
        let result = retry(|| match &self.listener {
            Some(_) => buffers.send_to(fd),
            None => buffers.write_to(fd, None),
        });
        if is_blocked(&result) {
            output.is_ready = false;
        }
        result
    }

    /// Closes the output, which nobody takes any more.
    pub(super) fn end_output(&mut self, operations: &mut EventOps<'_>) {
        close(&mut self.output, operations);
        self.emergency.clear();
    }

    /// Returns the sink of output, if there is one.
    pub(super) fn output_stream(&self) -> Option<&File> {
        self.output.as_ref().map(|output| &output.stream)
    }

    /// Has the next call of [`HostEnd::write`] try again.
    pub(super) fn try_again(&mut self) {
        if let Some(output) = &mut self.output {
            output.is_ready = true;
        }
    }

    /// Sends a byte on a vCPU thread, which does not wait for the host: a limited number of bytes that the
    /// host does not take at once are kept.
    pub(super) fn write_emergency_byte(&mut self, byte: u8, metrics: &ConsoleMetrics) {
        if self.output.is_none() || self.emergency.len() >= EMERGENCY_CAPACITY {
            metrics.tx_dropped_bytes.add(1);
            return;
        }
        self.emergency.push_back(byte);
        metrics.tx_bytes_count.add(1);
        if self
            .flush_emergency()
            .is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock)
        {
            self.emergency.clear();
        }
    }

    /// Returns the emergency bytes that are kept.
    pub(super) fn emergency_bytes(&self) -> Vec<u8> {
        self.emergency.iter().copied().collect()
    }

    /// Replaces the emergency bytes that are kept by `bytes`, which are at most [`EMERGENCY_CAPACITY`].
    pub(super) fn set_emergency_bytes(&mut self, bytes: Vec<u8>) {
        self.emergency = bytes.into();
    }

    /// Sends the emergency bytes that are kept.
    ///
    /// # Errors
    /// Those of [`HostEnd::write`].
    pub(super) fn flush_emergency(&mut self) -> io::Result<()> {
        let Some(output) = &mut self.output else {
            return Ok(());
        };
        while !self.emergency.is_empty() {
            let (bytes, _) = self.emergency.as_slices();
            let result = retry(|| match &self.listener {
                Some(_) => {
                    let fd = output.stream.as_raw_fd();
                    Ok(send(fd, bytes, MsgFlags::MSG_NOSIGNAL)?)
                }
                None => output.stream.write(bytes),
            });
            if is_blocked(&result) {
                output.is_ready = false;
            }
            let count = result?;
            self.emergency.drain(..count);
        }
        Ok(())
    }
}

fn is_blocked(result: &io::Result<usize>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Whether a client has closed its end and all of its input has been read.
fn has_ended(input: &Direction) -> bool {
    let mut byte = [0];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(input.stream.as_raw_fd(), &mut byte, flags) {
        Ok(count) => count == 0,
        Err(error) => !matches!(error, Errno::EAGAIN | Errno::EINTR),
    }
}

/// Splits a connection into two descriptors, one for each direction: an event loop can watch a descriptor
/// only once.
fn split(client: UnixStream) -> io::Result<(OwnedFd, OwnedFd)> {
    Ok((client.try_clone()?.into(), client.into()))
}

/// Repeats `call` for as long as a signal interrupts it.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
