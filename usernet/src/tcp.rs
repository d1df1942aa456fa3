//! A TCP connection of the guest, which is a socket of the host.
//!
//! There is no second TCP in between. What the guest sends is written to the socket, and acknowledged when the
//! socket has taken it. What the socket receives stays there until the guest acknowledges it: a segment to
//! the guest is a peek at the socket's queue, and sending it again is another one. So the guest's window is
//! what holds back the other end, and a connection takes next to no memory here.
//!
//! Only if the socket takes less than the guest was allowed to send, the rest is kept, up to the size of the
//! window; it is at most [`Budget`] for all connections.

mod output;

use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::dns::MessageStream;
use crate::frame::{GuestFrame, WrittenFrame};
use crate::sys;
use crate::wire::{Route, Tcp, tcp_flag};

/// What a guest may send before it is acknowledged.
const WINDOW: u32 = 256 << 10;
/// The payload of segments to a guest that does not say what it takes (RFC 9293, section 3.7.1).
const DEFAULT_MSS: u16 = 536;
/// The smallest payload that a guest can ask for, so that it does not make one byte a frame of work.
const MIN_MSS: u16 = 88;

/// After this time without an answer something is sent again; each further time is twice as long.
const RETRANSMISSION_TIME: Duration = Duration::from_secs(1);
/// Most attempts to send something.
const MAX_ATTEMPTS: u32 = 7;
/// Acknowledgments of the same byte after which what follows it is taken for lost (RFC 5681).
const DUPLICATES_OF_LOSS: u8 = 3;
/// How long the opening of a connection may take, if there is no room for another.
pub(crate) const OPENING_TIME: Duration = Duration::from_secs(5);
/// How long a connection may be idle (RFC 5382, section 5).
const IDLE_TIME: Duration = Duration::from_secs(2 * 3600 + 4 * 60);

/// Bytes that all connections of a guest may have waiting for sockets.
#[derive(Debug)]
pub(crate) struct Budget(usize);

impl Budget {
    const MAX: usize = 16 << 20;

    pub(crate) fn new() -> Budget {
        Budget(Self::MAX)
    }

    fn take(&mut self, size: usize) -> bool {
        let fits = size <= self.0;
        if fits {
            self.0 -= size;
        }
        fits
    }

    fn give_back(&mut self, size: usize) {
        self.0 += size;
    }
}

/// How far the opening of a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The guest opens it; the socket is not connected yet.
    Connecting,
    /// The guest opens it; it has yet to acknowledge that the socket is connected.
    Answering,
    /// The other end opens it; the guest has yet to answer.
    Calling,
    /// Data can be sent.
    Open,
}

/// Whether a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It goes on.
    Lives,
    /// It is over.
    Over,
    /// It is over, and the segment opens another between the same ends.
    Reopened,
}

/// What [`TcpFlow::produce`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Produced {
    /// A frame is written, and there may be more.
    Frame(WrittenFrame),
    /// A frame is written, and the connection is over.
    Last(WrittenFrame),
    /// There is nothing to send now.
    Nothing,
    /// The connection is over.
    Over,
}

/// What a name server sends.
#[derive(Debug)]
struct Answers {
    stream: MessageStream,
    /// The next byte that it has not sent before.
    next: u32,
    messages: Vec<Vec<u8>>,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct TcpFlow {
    route: Route,
    /// Ports in the order of segments to the guest.
    source: u16,
    destination: u16,
    socket: TcpStream,
    stage: Stage,
    must_reset: bool,

    /// The next byte that the guest sends.
    expected: u32,
    /// The end of the window that the guest has been given.
    window_end: u32,
    /// What the socket has not taken yet.
    pending: Vec<u8>,
    /// The guest sends nothing more.
    guest_finished: bool,
    must_acknowledge: bool,

    /// The first byte that the guest has not acknowledged, and the next to send.
    unacknowledged: u32,
    next: u32,
    can_peek_at_offset: bool,
    /// The socket may have more to read.
    is_readable: bool,
    /// A read that returns little does not mean that there is no more: the end of the stream may follow, or
    /// urgent data, before which reads end.
    reads_on: bool,
    /// The other end sends nothing more, and the guest has been sent everything.
    host_finished: bool,
    /// The end of the stream has been sent to the guest.
    sent_finish: bool,
    guest_window: u32,
    guest_scale: Option<u8>,
    guest_mss: u16,
    duplicates: u8,
    must_probe: bool,
    /// If what the other end sends matters to the network.
    answers: Option<Answers>,

    last_use: Instant,
    /// When something was last sent first, or acknowledged.
    progress: Instant,
    attempts: u32,
}

impl TcpFlow {
    /// Makes a connection that the guest opens by `syn`; `socket` is being connected.
    pub(crate) fn outgoing(
        route: Route,
        socket: TcpStream,
        syn: &Tcp,
        isn: u32,
        now: Instant,
    ) -> TcpFlow {
        let mut flow = TcpFlow::new(route, socket, [syn.destination, syn.source], isn, now);
        flow.accept_syn(syn);
        flow
    }

    /// Makes a connection from `source` to the port `destination` of the guest.
    pub(crate) fn incoming(
        route: Route,
        socket: TcpStream,
        ports: [u16; 2],
        isn: u32,
        now: Instant,
    ) -> TcpFlow {
        let mut flow = TcpFlow::new(route, socket, ports, isn, now);
        flow.stage = Stage::Calling;
        flow.start_peeking();
        flow
    }

    fn new(
        route: Route,
        socket: TcpStream,
        [source, destination]: [u16; 2],
        isn: u32,
        now: Instant,
    ) -> TcpFlow {
        TcpFlow {
            route,
            source,
            destination,
            socket,
            stage: Stage::Connecting,
            must_reset: false,
            expected: 0,
            window_end: 0,
            pending: Vec::new(),
            guest_finished: false,
            must_acknowledge: false,
            unacknowledged: isn,
            next: isn,
            can_peek_at_offset: false,
            is_readable: false,
            reads_on: false,
            host_finished: false,
            sent_finish: false,
            guest_window: 0,
            guest_scale: None,
            guest_mss: DEFAULT_MSS,
            duplicates: 0,
            must_probe: false,
            answers: None,
            last_use: now,
            progress: now,
            attempts: 0,
        }
    }

    /// When another may take its place, as it has waited too long to be opened.
    pub(crate) fn gives_way_at(&self) -> Option<Instant> {
        (self.stage != Stage::Open).then(|| self.progress + OPENING_TIME)
    }

    /// Has the messages of a name server, the other end, collected for [`TcpFlow::take_answers`].
    pub(crate) fn inspect(&mut self) {
        self.answers = Some(Answers {
            stream: MessageStream::default(),
            next: self.next.wrapping_add(1),
            messages: Vec::new(),
        });
    }

    /// Returns the messages that the last frame of [`TcpFlow::produce`] has completed.
    pub(crate) fn take_answers(&mut self) -> Vec<Vec<u8>> {
        let answers = self.answers.as_mut();
        answers.map_or_else(Vec::new, |answers| std::mem::take(&mut answers.messages))
    }

    /// Whether the connection needs a timer that is finer than that of idle ones.
    pub(crate) fn is_waiting(&self) -> bool {
        match self.stage {
            Stage::Connecting => false,
            Stage::Answering | Stage::Calling => true,
            Stage::Open => self.unacknowledged != self.next || self.is_held_back(),
        }
    }

    /// Whether the guest's window keeps back something that there is to read.
    fn is_held_back(&self) -> bool {
        self.is_readable && self.guest_window == 0 && !self.host_finished
    }

    fn accept_syn(&mut self, syn: &Tcp) {
        self.expected = syn.sequence.wrapping_add(1);
        self.window_end = self.expected;
        self.guest_mss = syn.mss.unwrap_or(DEFAULT_MSS).max(MIN_MSS);
        self.guest_scale = syn.window_scale;
        // The window of a segment that opens a connection is never scaled.
        self.guest_window = syn.window.into();
    }

    fn start_peeking(&mut self) {
        self.can_peek_at_offset = sys::restart_peeking(&self.socket);
        // Small segments must not wait for acknowledgments of the other end: the guest decides what it sends.
        let _ = self.socket.set_nodelay(true);
        let socket = SockRef::from(&self.socket);
        let _ = socket.set_keepalive(true);
        let _ = socket.set_out_of_band_inline(true);
    }

    /// Takes note of events of the socket. With `reads_on`, there is more to read than bytes.
    pub(crate) fn socket_event(
        &mut self,
        is_writable: bool,
        is_readable: bool,
        reads_on: bool,
        budget: &mut Budget,
    ) {
        self.reads_on |= reads_on;
        if self.stage == Stage::Connecting {
            let error = self.socket.take_error();
            match error {
                Ok(None) if is_writable && self.socket.peer_addr().is_ok() => {
                    self.stage = Stage::Answering;
                    self.start_peeking();
                }
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => self.must_reset = true,
            }
        }
        self.is_readable |= is_readable;
        if is_writable && !self.pending.is_empty() {
            self.flush(budget);
        }
    }

    /// Writes what has waited for the socket.
    fn flush(&mut self, budget: &mut Budget) {
        match self.socket.write(&self.pending) {
            Ok(size) => {
                self.pending.drain(..size);
                budget.give_back(size);
            }
            Err(error) => self.failed(&error),
        }
        if self.pending.is_empty() {
            self.pending = Vec::new();
            self.must_acknowledge = true;
            self.finish_towards_host();
        }
    }

    fn failed(&mut self, error: &io::Error) {
        if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
            self.must_reset = true;
        }
    }

    fn finish_towards_host(&mut self) {
        if self.guest_finished && self.pending.is_empty() {
            // It fails if the other end has reset the connection, as the next read reports.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Takes a segment of the guest, whose payload of `size` bytes is at `offset` in `frame`.
    pub(crate) fn take(
        &mut self,
        segment: &Tcp,
        frame: &mut dyn GuestFrame,
        (offset, size): (usize, usize),
        budget: &mut Budget,
        now: Instant,
    ) -> Fate {
        self.last_use = now;
        if segment.has(tcp_flag::RST) {
            return self.take_reset(segment);
        }
        match self.stage {
            Stage::Connecting => return Fate::Lives,
            Stage::Calling => {
                if !self.take_answer(segment, now) {
                    return Fate::Lives;
                }
            }
            Stage::Answering | Stage::Open if segment.has(tcp_flag::SYN) => {
                if segment.has(tcp_flag::ACK) {
                    // Our acknowledgment of its answer was lost.
                    self.must_acknowledge = true;
                    return Fate::Lives;
                }
                if segment.sequence.wrapping_add(1) == self.expected {
                    // It has not seen our answer.
                    return Fate::Lives;
                }
                // The guest has forgotten the connection, as after a reset.
                return Fate::Reopened;
            }
            Stage::Answering | Stage::Open => {}
        }
        if !segment.has(tcp_flag::ACK) {
            return Fate::Lives;
        }
        self.take_acknowledgment(segment, size, now);
        if self.stage != Stage::Open {
            return Fate::Lives;
        }
        self.take_data(segment, frame, (offset, size), budget);
        Fate::Lives
    }

    fn take_reset(&mut self, segment: &Tcp) -> Fate {
        let is_expected = match self.stage {
            // It refuses what it was sent.
            Stage::Calling => segment.acknowledgment == self.next,
            Stage::Connecting => true,
            _ => {
                is_before(segment.sequence.wrapping_sub(1), self.window_end)
                    && !is_before(segment.sequence, self.expected)
            }
        };
        if is_expected { Fate::Over } else { Fate::Lives }
    }

    /// Takes the guest's answer to a connection from outside.
    fn take_answer(&mut self, segment: &Tcp, now: Instant) -> bool {
        let wanted = tcp_flag::SYN | tcp_flag::ACK;
        if segment.flags & wanted != wanted || segment.acknowledgment != self.next {
            return false;
        }
        self.accept_syn(segment);
        self.unacknowledged = self.next;
        self.stage = Stage::Open;
        self.must_acknowledge = true;
        self.is_readable = true;
        self.made_progress(now);
        true
    }

    fn made_progress(&mut self, now: Instant) {
        self.progress = now;
        self.attempts = 0;
        self.duplicates = 0;
    }

    fn take_acknowledgment(&mut self, segment: &Tcp, size: usize, now: Instant) {
        let acknowledged = segment.acknowledgment.wrapping_sub(self.unacknowledged);
        let in_flight = self.next.wrapping_sub(self.unacknowledged);
        if acknowledged > in_flight {
            // It is of something older, or of something that was never sent.
            self.must_acknowledge |= acknowledged <= u32::MAX / 2;
            return;
        }
        if self.stage == Stage::Answering {
            if acknowledged == 0 {
                return;
            }
            self.stage = Stage::Open;
            self.is_readable = true;
            self.unacknowledged = self.next;
            self.made_progress(now);
        } else if acknowledged > 0 {
            let is_all = acknowledged == in_flight;
            let finish = u32::from(self.sent_finish && is_all);
            self.discard(acknowledged - finish);
            self.unacknowledged = segment.acknowledgment;
            // What is behind it, and the end of the stream, can be seen now.
            self.is_readable |= !self.can_peek_at_offset;
            self.made_progress(now);
        }
        let scale = self.guest_scale.unwrap_or(0);
        let window = if segment.has(tcp_flag::SYN) {
            segment.window.into()
        } else {
            u32::from(segment.window) << scale
        };
        let is_duplicate = acknowledged == 0 && size == 0 && window == self.guest_window;
        self.guest_window = window;
        if is_duplicate && in_flight > 0 && !segment.has(tcp_flag::FIN) {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == DUPLICATES_OF_LOSS {
                self.send_again();
            }
        }
    }

    /// Removes what the guest has acknowledged from the socket's queue.
    fn discard(&mut self, size: u32) {
        let mut left = size as usize;
        while left > 0 {
            match sys::discard(&self.socket, left) {
                // A read ends before urgent data, the next one goes on with it.
                Ok(done @ 1..) => left -= done,
                // It was there when it was sent.
                Ok(0) | Err(_) => {
                    self.must_reset = true;
                    return;
                }
            }
        }
    }

    /// Sends everything again that the guest has not acknowledged.
    fn send_again(&mut self) {
        self.next = self.unacknowledged;
        self.sent_finish = false;
        self.host_finished = false;
        self.is_readable = true;
        if self.can_peek_at_offset {
            self.can_peek_at_offset = sys::restart_peeking(&self.socket);
        }
    }

    fn take_data(
        &mut self,
        segment: &Tcp,
        frame: &mut dyn GuestFrame,
        (offset, size): (usize, usize),
        budget: &mut Budget,
    ) {
        let has_finish = segment.has(tcp_flag::FIN);
        if size == 0 && !has_finish {
            // A probe whether the connection lives (RFC 9293, section 3.8.4).
            self.must_acknowledge |= segment.sequence != self.expected;
            return;
        }
        self.must_acknowledge = true;
        // What was taken before is left out.
        let known = self.expected.wrapping_sub(segment.sequence);
        if known as usize > size {
            // All of it was, or something before it is missing.
            return;
        }
        let (offset, size) = (offset + known as usize, size - known as usize);
        if self.guest_finished {
            return;
        }
        let taken = self.take_payload(frame, (offset, size), budget);
        self.expected = self.expected.wrapping_add(taken as u32);
        if has_finish && taken == size {
            self.expected = self.expected.wrapping_add(1);
            self.guest_finished = true;
            self.finish_towards_host();
        }
    }

    /// Passes payload on, and returns how much of it was taken.
    fn take_payload(
        &mut self,
        frame: &mut dyn GuestFrame,
        (offset, size): (usize, usize),
        budget: &mut Budget,
    ) -> usize {
        let mut sent = 0;
        if size > 0 && self.pending.is_empty() {
            match frame.send_at(offset, size, self.socket.as_fd()) {
                Ok(count) => sent = count,
                Err(error) => self.failed(&error),
            }
            if self.must_reset {
                return 0;
            }
        }
        let rest = size - sent;
        // A guest that keeps to its window does not exceed this.
        if rest > 0 && self.pending.len() + rest <= 2 * WINDOW as usize && budget.take(rest) {
            let start = self.pending.len();
            self.pending.resize(start + rest, 0);
            let read = frame.read_at(offset + sent, &mut self.pending[start..]);
            debug_assert_eq!(read, rest);
            sent = size;
            // Some room may have come since; without a failed attempt the host would not tell of more.
            self.flush(budget);
        }
        sent
    }

    /// Does what is due at `now`. Returns whether the connection goes on.
    pub(crate) fn tick(&mut self, now: Instant) -> Fate {
        if now.duration_since(self.last_use) >= IDLE_TIME {
            self.must_reset = true;
            return Fate::Lives;
        }
        if !self.is_waiting() {
            return Fate::Lives;
        }
        let wait = RETRANSMISSION_TIME * (1 << self.attempts.min(MAX_ATTEMPTS));
        if now.duration_since(self.progress) < wait {
            return Fate::Lives;
        }
        self.progress = now;
        self.attempts += 1;
        if self.stage == Stage::Open && self.unacknowledged == self.next {
            // However often a window is closed, the connection may go on.
            self.attempts = self.attempts.min(MAX_ATTEMPTS);
            self.must_probe = true;
            return Fate::Lives;
        }
        if self.attempts > MAX_ATTEMPTS {
            return Fate::Over;
        }
        match self.stage {
            Stage::Open => self.send_again(),
            _ => self.next = self.unacknowledged,
        }
        Fate::Lives
    }

    /// Whether [`TcpFlow::produce`] may have a frame.
    pub(crate) fn has_work(&self) -> bool {
        let opens = matches!(self.stage, Stage::Answering | Stage::Calling);
        self.must_reset
            || self.must_acknowledge
            || self.must_probe
            || opens && self.next == self.unacknowledged
            || self.stage == Stage::Open && (self.is_readable || self.must_finish())
            || self.is_done()
    }

    fn must_finish(&self) -> bool {
        self.host_finished && !self.sent_finish
    }

    /// Whether both ends have said all, and know it.
    fn is_done(&self) -> bool {
        self.guest_finished
            && self.pending.is_empty()
            && self.sent_finish
            && self.unacknowledged == self.next
    }

    /// Ends the connection. The other end sees a reset unless both have said all.
    pub(crate) fn close(self, budget: &mut Budget) {
        budget.give_back(self.pending.len());
        if !self.is_done() {
            let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsFd for TcpFlow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether `first` comes before `second` among sequence numbers.
fn is_before(first: u32, second: u32) -> bool {
    first != second && second.wrapping_sub(first) <= u32::MAX / 2
}

/// Returns the segment that answers one for which there is no connection (RFC 9293, section 3.10.7.1), or
/// `None` if that is a reset itself.
pub(crate) fn reset(segment: &Tcp, payload_size: usize) -> Option<Tcp> {
    if segment.has(tcp_flag::RST) {
        return None;
    }
    let mut answer = Tcp {
        source: segment.destination,
        destination: segment.source,
        flags: tcp_flag::RST,
        ..Tcp::default()
    };
    if segment.has(tcp_flag::ACK) {
        answer.sequence = segment.acknowledgment;
    } else {
        let [syn, finish] = [tcp_flag::SYN, tcp_flag::FIN].map(|flag| u32::from(segment.has(flag)));
        answer.flags |= tcp_flag::ACK;
        answer.acknowledgment = segment
            .sequence
            .wrapping_add(payload_size as u32)
            .wrapping_add(syn + finish);
    }
    Some(answer)
}
