//! A client of the serial port's socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use nix::sys::socket::{MsgFlags, recv, send};

use super::history::History;
use crate::device_log::DeviceLog;

/// How long a client that has kept up so far may take nothing while the guest waits for it.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// Most bytes sent by one call. The kernel has room again once a client has read that many.
const CHUNK_SIZE: usize = 4096;

/// One client, which gets all output, and whose input becomes part of the port's.
pub(super) struct Client {
    log: DeviceLog,
    stream: UnixStream,
    /// Position of the next byte that it gets.
    position: u64,
    /// Whether it has once had all output, and since then has taken some whenever the guest waited for it.
    /// The guest waits only for such clients.
    follows: bool,
    /// When the guest stops waiting for it, unless it takes something before.
    deadline: Option<Instant>,
    /// Bytes of output that it has missed since it last had all.
    missed: u64,
    /// Whether it still takes output.
    takes_output: bool,
    /// Whether the stream took no more when it was last tried.
    is_blocked: bool,
    /// Whether there may be something to read.
    may_have_input: bool,
    /// Whether input may still come.
    has_input: bool,
    /// What the event loop watches the stream for.
    pub(super) watched: EventSet,
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Client {
    /// Makes a client that first gets the content of `history`. Its stream is non-blocking.
    pub(super) fn new(stream: UnixStream, history: &History, log: DeviceLog) -> Client {
        Client {
            stream,
            log,
            position: history.start(),
            follows: false,
            deadline: None,
            missed: 0,
            takes_output: true,
            is_blocked: false,
            may_have_input: true,
            has_input: true,
            watched: EventSet::empty(),
        }
    }

    /// Returns the events to watch the stream for. They are edge-triggered, so that none is repeated for
    /// something that cannot be served.
    pub(super) fn interest(&self) -> EventSet {
        let mut interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        interest.set(EventSet::OUT, self.takes_output && self.is_blocked);
        interest
    }

    /// Takes note of the stream's readiness.
    pub(super) fn is_ready(&mut self, ready: EventSet) {
        let hung_up = EventSet::HANG_UP | EventSet::ERROR;
        self.may_have_input |= ready.intersects(hung_up | EventSet::IN | EventSet::READ_HANG_UP);
        if ready.contains(EventSet::OUT) {
            self.is_blocked = false;
        }
        if ready.intersects(hung_up) {
            self.takes_output = false;
        }
    }

    /// Whether it will neither send nor take anything more.
    pub(super) fn is_gone(&self) -> bool {
        !self.takes_output && !self.has_input
    }

    /// Whether it has left, and only input that it sent before is left.
    pub(super) fn has_left(&self) -> bool {
        !self.takes_output
    }

    /// Sends output that it has not had yet, as far as the stream takes it.
    pub(super) fn send(&mut self, history: &History) {
        if self.takes_output && self.position < history.start() {
            let missed = history.start() - self.position;
            if self.missed == 0 {
                self.log.warn_of_host(format_args!(
                    "a client of the socket reads too slowly and misses output"
                ));
            }
            self.missed += missed;
            self.position = history.start();
        }
        while self.takes_output && !self.is_blocked {
            let bytes = history.from(self.position);
            if bytes.is_empty() {
                self.has_all();
                return;
            }
            let bytes = &bytes[..bytes.len().min(CHUNK_SIZE)];
            match send(self.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).map_err(io::Error::from) {
                Ok(count) => {
                    self.position += count as u64;
                    self.deadline = None;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.is_blocked = true,
                Err(_) => self.takes_output = false,
            }
        }
    }

    fn has_all(&mut self) {
        self.follows = true;
        self.deadline = None;
        self.report_missed();
    }

    fn report_missed(&mut self) {
        let missed = std::mem::take(&mut self.missed);
        if missed > 0 {
            self.log.warn_of_host(format_args!(
                "a client of the socket has missed {missed} bytes of output"
            ));
        }
    }

    /// Returns the position from which output must be kept for it, if the guest waits for it.
    pub(super) fn kept_from(&self) -> Option<u64> {
        (self.takes_output && self.follows).then_some(self.position)
    }

    /// Returns how many bytes of `history` it has not had yet.
    pub(super) fn unsent(&self, history: &History) -> u64 {
        match self.takes_output {
            true => history.end() - self.position,
            false => 0,
        }
    }

    /// Has the guest wait for it from now on, if the guest does not do so already.
    pub(super) fn hold_up(&mut self, now: Instant) {
        self.deadline.get_or_insert(now + PATIENCE);
    }

    /// Returns when the guest stops waiting for it.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Stops waiting for it if its time is over and it still takes nothing.
    pub(super) fn expire(&mut self, history: &History, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            // The event loop hears of room only once most of what the kernel holds has been read.
            self.is_blocked = false;
            self.send(history);
            if self.deadline.is_some() {
                self.deadline = None;
                self.follows = false;
            }
        }
    }

    /// Tries again to send to a stream that was full.
    pub(super) fn retry(&mut self, history: &History) {
        self.is_blocked = false;
        self.send(history);
    }

    /// Whether there may be input.
    pub(super) fn may_read(&self) -> bool {
        self.has_input && self.may_have_input
    }

    /// Reads input into `bytes` and returns how many bytes. Takes note if the input has ended, or if there is
    /// none for now.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> usize {
        loop {
            match recv(self.as_raw_fd(), bytes, MsgFlags::empty()).map_err(io::Error::from) {
                Ok(0) => self.has_input = false,
                Ok(count) => return count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.may_have_input = false;
                }
                Err(_) => {
                    self.has_input = false;
                    self.takes_output = false;
                }
            }
            return 0;
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.report_missed();
    }
}
