//! The host's side of a serial port that is connected to descriptors.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use vmm_sys_util::eventfd::EventFd;

use super::{Serial, lock};

/// How long the last output waits for a reader that reads none of it.
const LAST_OUTPUT_TIMEOUT_MS: u16 = 1_000;
/// Size in bytes of a pipe that holds both its earlier content (64 KiB, unless its creator changed the size)
/// and all output that can be left for it.
const LAST_OUTPUT_PIPE_SIZE: libc::c_int = 1 << 20;

/// Moves bytes between a serial port and descriptors, on the event loop.
pub(super) struct SerialWorker {
    port: Arc<Mutex<Serial>>,
    attention: Arc<EventFd>,
    input: Option<Endpoint>,
    output: Option<Endpoint>,
    /// Bytes sent by the guest and not yet taken by the endpoint.
    pending_output: VecDeque<u8>,
}

/// One direction of the endpoint.
struct Endpoint {
    stream: Stream,
    /// Whether the event loop watches it.
    watched: bool,
}

/// A descriptor of any kind, read and written like a file.
type Stream = std::fs::File;

impl Endpoint {
    fn new(descriptor: OwnedFd) -> Endpoint {
        Endpoint {
            stream: Stream::from(descriptor),
            watched: false,
        }
    }

    /// Starts or stops watching for `events`.
    fn watch(&mut self, wanted: bool, events: EventSet, operations: &mut EventOps<'_>) -> bool {
        if wanted != self.watched {
            let events = Events::new(&self.stream, events);
            let result = if wanted {
                operations.add(events)
            } else {
                operations.remove(events)
            };
            if let Err(error) = result {
                tracing::warn!("serial port: cannot watch its endpoint: {error}");
                return false;
            }
            self.watched = wanted;
        }
        true
    }
}

impl SerialWorker {
    /// Makes a worker for `port`, which sends its output to `output` from now on.
    pub(super) fn new(
        port: Arc<Mutex<Serial>>,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> SerialWorker {
        let attention = {
            let mut port = lock(&port);
            if output.is_some() {
                port.connect();
            }
            port.attention()
        };
        SerialWorker {
            port,
            attention,
            input: input.map(Endpoint::new),
            output: output.map(Endpoint::new),
            pending_output: VecDeque::new(),
        }
    }

    /// Sends what the guest has written so far, as far as the endpoint takes it. What the guest writes
    /// meanwhile wakes the worker again, so that a guest that never stops does not hold up other devices.
    fn send(&mut self) -> io::Result<()> {
        self.send_pending()?;
        if self.output.is_some() {
            self.pending_output = lock(&self.port).take_output();
        }
        self.send_pending()
    }

    fn send_pending(&mut self) -> io::Result<()> {
        let Some(output) = &mut self.output else {
            return Ok(());
        };
        loop {
            let (bytes, _) = self.pending_output.as_slices();
            if bytes.is_empty() {
                return Ok(());
            }
            match output.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.pending_output.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn process_output(&mut self, operations: &mut EventOps<'_>) {
        let (blocked, closed) = match self.send() {
            Ok(()) => (false, false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (true, false),
            Err(error) => {
                tracing::warn!("serial port: its output is lost from here on: {error}");
                (false, true)
            }
        };
        if let Some(output) = &mut self.output {
            let watching = output.watch(blocked, EventSet::OUT, operations);
            if closed || !watching {
                self.close_output(operations);
            }
        }
    }

    /// Moves input to the guest until the guest has no room or the endpoint has no more.
    fn process_input(&mut self, operations: &mut EventOps<'_>) {
        loop {
            let Some(input) = &mut self.input else {
                // Input that was read before may still wait for room.
                lock(&self.port).move_input();
                return;
            };
            let read = lock(&self.port).read_input(|bytes| input.stream.read(bytes));
            match read {
                Ok(Some(0)) => return self.close_input(operations),
                Ok(Some(_)) => {}
                Ok(None) => {
                    // The guest asks for more by emptying its FIFO.
                    input.watch(false, EventSet::IN, operations);
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !input.watch(true, EventSet::IN, operations) {
                        self.close_input(operations);
                    }
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!("serial port: its input has ended: {error}");
                    return self.close_input(operations);
                }
            }
        }
    }

    fn close_input(&mut self, operations: &mut EventOps<'_>) {
        if let Some(mut input) = self.input.take() {
            input.watch(false, EventSet::IN, operations);
        }
    }

    fn close_output(&mut self, operations: &mut EventOps<'_>) {
        if let Some(mut output) = self.output.take() {
            output.watch(false, EventSet::OUT, operations);
        }
        self.pending_output.clear();
        lock(&self.port).disconnect();
    }
}

impl MutEventSubscriber for SerialWorker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        let watched = operations.add(Events::new(&*self.attention, EventSet::IN));
        if let Err(error) = watched {
            tracing::error!("serial port: cannot watch its endpoint: {error}");
        }
        self.process_output(operations);
        self.process_input(operations);
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if events.fd() == self.attention.as_raw_fd() {
            // It fails only if the event was not signalled.
            let _ = self.attention.read();
        }
        self.process_output(operations);
        self.process_input(operations);
    }
}

impl Drop for SerialWorker {
    /// The guest's last output reaches a reader that is still reading, and waits in a pipe for one that may
    /// read later.
    fn drop(&mut self) {
        lock(&self.port).release_output();
        while let Err(error) = self.send() {
            let Some(output) = &self.output else {
                return;
            };
            let stream = &output.stream;
            let retry = error.kind() == io::ErrorKind::WouldBlock
                && (make_room_in_pipe(stream) || wait_for_reader(stream));
            if !retry {
                let lost = self.pending_output.len() + lock(&self.port).take_output().len();
                tracing::warn!(
                    "serial port: the last {lost} bytes of output are lost: nobody read them"
                );
                return;
            }
        }
    }
}

/// Whether `stream` is a pipe, and could be made large enough for all that is left.
pub(crate) fn make_room_in_pipe(stream: &Stream) -> bool {
    let size = fcntl(stream, FcntlArg::F_GETPIPE_SZ).unwrap_or(LAST_OUTPUT_PIPE_SIZE);
    size < LAST_OUTPUT_PIPE_SIZE
        && fcntl(stream, FcntlArg::F_SETPIPE_SZ(LAST_OUTPUT_PIPE_SIZE)).is_ok()
}

/// Waits a while for a reader of `stream`; `false` if there is none.
pub(crate) fn wait_for_reader(stream: &Stream) -> bool {
    let mut poll = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    nix::poll::poll(&mut poll, PollTimeout::from(LAST_OUTPUT_TIMEOUT_MS))
        .is_ok_and(|ready| ready > 0)
}
