//! One connection between a port of the guest and a program of the host.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use bantam_memory::GuestBuffers;
use event_manager::EventSet;

use super::credit::{BUFFER_SIZE, Credit};
use super::greeting::Greeting;
use super::metrics::VsockMetrics;
use super::packet::{Header, Ports, operation, shutdown};
use super::stream::HostStream;

/// How long a program of the host may take to say which port it wants, and then the guest to answer; and how
/// long one lets the guest wait.
pub(super) const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long a connection may take to end once one side wants nothing more of it, counted anew
/// whenever there is progress.
pub(super) const CLOSE_TIME: Duration = Duration::from_secs(8);

/// Least and most bytes that are read from the host's program at once, before other connections have
/// their turn.
const MIN_READ_SIZE: usize = 4 << 10;
const MAX_READ_SIZE: usize = 64 << 10;

#[derive(Debug)]
enum State {
    /// A program of the host has connected, and has yet to say to which port.
    Greeting(Greeting),
    /// The guest has been asked, and has yet to answer.
    Requesting,
    /// The guest has asked, and the program of the host lets no more wait for it.
    Waiting,
    Connected,
    /// All that is left is to tell the guest so.
    Resetting,
    /// The guest knows of it no more, and what it sent last is on its way to the host's program.
    Draining,
    /// Nothing is left.
    Finished,
}

/// The kinds of packets without data that the guest is to get: a bit for each operation.
#[derive(Debug, Default)]
struct Due(u8);

impl Due {
    fn insert(&mut self, operation: u16) {
        self.0 |= 1 << operation;
    }

    fn remove(&mut self, operation: u16) {
        self.0 &= !(1 << operation);
    }

    /// Takes the first, in the order of the operations' numbers: an answer precedes the rest, and
    /// the end is not put off for matters of credit.
    fn take_first(&mut self) -> Option<u16> {
        let operation = self.0.trailing_zeros() as u16;
        (self.0 != 0).then(|| {
            self.remove(operation);
            operation
        })
    }
}

/// A connection, from the first sign of it until both sides know that it has ended.
#[derive(Debug)]
pub(super) struct Connection {
    state: State,
    ports: Option<Ports>,
    stream: HostStream,
    due: Due,
    credit: Credit,
    /// Whether the guest has been asked for credit since it gave some.
    asked_for_credit: bool,
    /// Whether there may be something to read.
    readable: bool,
    /// How many bytes to read at most: buffers that are taken for more than there is cost time.
    read_size: usize,
    /// Whether the host's program has sent its last byte, and the guest has it.
    host_ended: bool,
    /// Whether it reads what it is sent.
    host_reads: bool,
    /// What the guest has sent and the stream has not taken.
    pending: VecDeque<u8>,
    /// Whether the host's program knows that there is no more.
    is_end_passed_on: bool,
    /// What the guest has shut down, and what it knows to be shut down here.
    guest_shutdown: u32,
    host_shutdown: u32,
    deadline: Option<Instant>,
    /// Whether it ended in another way than by both sides' wish.
    killed: bool,
}

impl Connection {
    fn new(state: State, stream: HostStream) -> Connection {
        Connection {
            state,
            ports: None,
            stream,
            due: Due::default(),
            credit: Credit::default(),
            asked_for_credit: false,
            readable: true,
            read_size: MIN_READ_SIZE,
            host_ended: false,
            host_reads: true,
            pending: VecDeque::new(),
            is_end_passed_on: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            deadline: None,
            killed: false,
        }
    }

    /// A program of the host has connected.
    pub(super) fn from_host(stream: HostStream, now: Instant) -> Connection {
        Connection {
            deadline: Some(now + CONNECT_TIME),
            ..Connection::new(State::Greeting(Greeting::default()), stream)
        }
    }

    /// The guest asks for a connection by `request`, and the stream has yet to be connected.
    pub(super) fn from_guest(
        stream: HostStream,
        ports: Ports,
        request: &Header,
        now: Instant,
    ) -> Connection {
        let mut connection = Connection {
            ports: Some(ports),
            // The event loop says when there is.
            readable: false,
            deadline: Some(now + CONNECT_TIME),
            ..Connection::new(State::Waiting, stream)
        };
        connection.credit.learn(request);
        connection
    }

    /// The stream of a guest that has waited is connected.
    pub(super) fn connected(&mut self) {
        self.state = State::Connected;
        self.deadline = None;
        self.due.insert(operation::RESPONSE);
    }

    /// Whether the guest waits for the host's program.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Waiting)
    }

    pub(super) fn stream(&self) -> &HostStream {
        &self.stream
    }

    /// Ports by which the guest knows it, if it does.
    pub(super) fn ports(&self) -> Option<Ports> {
        self.ports
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Moves the deadline by `time`, in which neither side could do anything.
    pub(super) fn put_off_deadline(&mut self, time: Duration) {
        self.deadline = self.deadline.map(|deadline| deadline + time);
    }

    pub(super) fn was_killed(&self) -> bool {
        self.killed
    }

    pub(super) fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished)
    }

    /// Whether the guest's packets may not find it any more.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self.state, State::Draining | State::Finished)
    }

    /// What the stream is to be watched for; nothing if it is not needed any more. Each time that it
    /// becomes ready is an event of its own, so that none comes again for what cannot be served.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let mut interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        interest.set(EventSet::OUT, !self.pending.is_empty());
        match self.state {
            State::Waiting | State::Resetting | State::Finished => None,
            _ => Some(interest),
        }
    }

    /// Takes note of what the event loop says of the stream.
    pub(super) fn host_is_ready(&mut self, ready: EventSet, metrics: &VsockMetrics, now: Instant) {
        let lost = EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= ready.intersects(lost | EventSet::IN | EventSet::READ_HANG_UP);
        if ready.intersects(lost) {
            match self.state {
                // It may have said its part and left; nobody waits for an answer.
                State::Greeting(_) | State::Requesting => self.reset(),
                _ => self.lose_reader(),
            }
        }
        if ready.contains(EventSet::OUT) {
            self.flush(metrics, now);
        }
        self.advance(now);
    }

    /// Reads which port the host's program wants, once it has said so.
    pub(super) fn wanted_port(&mut self) -> Option<u32> {
        let State::Greeting(greeting) = &mut self.state else {
            return None;
        };
        match greeting.read(&self.stream) {
            Ok(port) => Some(port),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(_) => {
                self.reset();
                None
            }
        }
    }

    /// Asks the guest for the connection that the host's program wants.
    pub(super) fn request(&mut self, ports: Ports, now: Instant) {
        self.ports = Some(ports);
        self.state = State::Requesting;
        self.due.insert(operation::REQUEST);
        self.deadline = Some(now + CONNECT_TIME);
    }

    /// Handles a packet of the guest.
    pub(super) fn handle_packet(
        &mut self,
        header: &Header,
        data: &mut GuestBuffers,
        metrics: &VsockMetrics,
        now: Instant,
    ) {
        match (&self.state, header.operation) {
            (_, operation::RST) => self.end_by_guest(now),
            // What the guest sent before it could know of the end.
            (State::Resetting, _) => {}
            (State::Requesting, operation::RESPONSE) => {
                self.credit.learn(header);
                self.accept();
            }
            // Its program has given up, and another has got the same port.
            (State::Waiting, operation::REQUEST) => {
                self.credit.learn(header);
                self.deadline = Some(now + CONNECT_TIME);
            }
            (State::Waiting, operation::SHUTDOWN) => self.finish(),
            (State::Connected, operation::RW) => {
                self.credit.learn(header);
                self.receive_data(data, metrics);
            }
            (State::Connected, operation::SHUTDOWN) => {
                self.credit.learn(header);
                self.guest_shutdown |= header.flags & shutdown::BOTH;
                if header.flags & shutdown::RECEIVE != 0 {
                    self.stream.shut_down(Shutdown::Read);
                }
            }
            (State::Connected, operation::CREDIT_UPDATE) => self.credit.learn(header),
            (State::Connected, operation::CREDIT_REQUEST) => {
                self.credit.learn(header);
                self.due.insert(operation::CREDIT_UPDATE);
            }
            _ => self.reset(),
        }
        self.advance(now);
    }

    /// The guest has taken the connection: its port of the host tells connections apart.
    fn accept(&mut self) {
        let port = self.ports.map_or(0, |ports| ports.host);
        let answer = format!("OK {port}\n");
        // Nothing has been sent before, so there is room for it.
        match self.stream.send(answer.as_bytes()) {
            Ok(count) if count == answer.len() => {
                self.state = State::Connected;
                self.deadline = None;
            }
            _ => self.reset(),
        }
    }

    fn receive_data(&mut self, data: &mut GuestBuffers, metrics: &VsockMetrics) {
        let room = BUFFER_SIZE as usize - self.pending.len();
        if self.guest_shutdown & shutdown::SEND != 0 || data.len() > room {
            return self.reset();
        }
        metrics.tx_bytes_count.add(data.len() as u64);
        while self.pending.is_empty() && self.host_reads && !data.is_empty() {
            match self.stream.send_from(data) {
                Ok(count) => self.credit.forward(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    metrics.tx_write_fails.add(1);
                    self.lose_reader();
                }
            }
        }
        if !self.host_reads {
            self.credit.forward(data.len());
            return;
        }
        // All of it at once, so that it does not become more; the host gives memory for what is used.
        self.pending.reserve_exact(room);
        let mut chunk = [0; 4096];
        loop {
            match data.read(&mut chunk) {
                0 => break,
                count => self.pending.extend(&chunk[..count]),
            }
        }
    }

    /// Sends what the guest has sent before, as far as the stream takes it.
    fn flush(&mut self, metrics: &VsockMetrics, now: Instant) {
        while !self.pending.is_empty() {
            let (bytes, _) = self.pending.as_slices();
            match self.stream.send(bytes) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.credit.forward(count);
                    self.deadline = self.deadline.map(|_| now + CLOSE_TIME);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    metrics.tx_flush_fails.add(1);
                    self.lose_reader();
                }
            }
        }
        self.pending = VecDeque::new();
    }

    /// What the guest sends goes nowhere from now on.
    fn lose_reader(&mut self) {
        self.host_reads = false;
        self.credit.forward(self.pending.len());
        self.pending = VecDeque::new();
    }

    /// Whether it has something for the guest.
    pub(super) fn has_packet(&self) -> bool {
        self.due.0 != 0 || self.readable_bytes() > 0
    }

    /// How many bytes may be read from the host's program for the guest now.
    fn readable_bytes(&self) -> usize {
        if self.may_read() {
            self.credit.available()
        } else {
            0
        }
    }

    fn may_read(&self) -> bool {
        matches!(self.state, State::Connected)
            && self.readable
            && !self.host_ended
            && self.guest_shutdown & shutdown::RECEIVE == 0
    }

    /// The next packet for the guest, where it has no data.
    pub(super) fn take_control_packet(&mut self, guest_cid: u64) -> Option<Header> {
        let operation = self.due.take_first()?;
        let mut header = self.header(operation, guest_cid)?;
        self.has_announced();
        match operation {
            operation::SHUTDOWN => header.flags = self.host_shutdown,
            operation::RST => self.state = State::Finished,
            _ => {}
        }
        Some(header)
    }

    /// The header of the next packets for the guest that have data, and how many bytes there may be.
    pub(super) fn data_packet(&self, guest_cid: u64) -> Option<(Header, usize)> {
        let limit = self.readable_bytes().min(self.read_size);
        if limit == 0 {
            return None;
        }
        Some((self.header(operation::RW, guest_cid)?, limit))
    }

    fn header(&self, operation: u16, guest_cid: u64) -> Option<Header> {
        let mut header = Header::to_guest(guest_cid, self.ports?, operation);
        self.credit.write_to(&mut header);
        Some(header)
    }

    /// Takes note of a packet that is sent to the guest: every one says what room there is.
    fn has_announced(&mut self) {
        self.credit.has_announced();
        self.due.remove(operation::CREDIT_UPDATE);
    }

    /// Takes note of the outcome of reading from the host's program for the guest.
    pub(super) fn finish_reading(
        &mut self,
        result: io::Result<usize>,
        metrics: &VsockMetrics,
        now: Instant,
    ) {
        match result {
            Ok(0) => self.host_ended = true,
            Ok(count) => {
                self.read_size = if count >= self.read_size {
                    MAX_READ_SIZE.min(2 * self.read_size)
                } else {
                    count.max(MIN_READ_SIZE)
                };
                self.credit.send(count);
                self.has_announced();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                metrics.rx_read_fails.add(1);
                self.reset();
            }
        }
        self.advance(now);
    }

    /// Does what has become due by what has happened.
    fn advance(&mut self, now: Instant) {
        if matches!(self.state, State::Draining) && self.pending.is_empty() {
            self.state = State::Finished;
        }
        if !matches!(self.state, State::Connected) {
            return;
        }
        let guest_ended = self.guest_shutdown & shutdown::SEND != 0;
        let is_flushed = self.pending.is_empty();
        if guest_ended && is_flushed && !self.is_end_passed_on {
            self.is_end_passed_on = true;
            self.stream.shut_down(Shutdown::Write);
        }
        if self.guest_shutdown == shutdown::BOTH && is_flushed {
            // The guest waits for this, as its last word.
            self.finish();
            return;
        }
        let mut host_shutdown = self.host_shutdown;
        if self.host_ended {
            host_shutdown |= shutdown::SEND;
        }
        // If there is more to read, the end of that is near, and both are told together.
        if !self.host_reads && self.readable_bytes() == 0 {
            host_shutdown |= shutdown::RECEIVE;
        }
        if self.host_ended && guest_ended && is_flushed {
            host_shutdown = shutdown::BOTH;
        }
        if host_shutdown != self.host_shutdown {
            self.host_shutdown = host_shutdown;
            self.due.insert(operation::SHUTDOWN);
        }
        if host_shutdown == shutdown::BOTH || self.guest_shutdown == shutdown::BOTH {
            self.deadline.get_or_insert(now + CLOSE_TIME);
        }
        if self.credit.is_update_due() && !guest_ended {
            self.due.insert(operation::CREDIT_UPDATE);
        }
        let starves = self.may_read() && self.credit.available() == 0;
        if starves && !self.asked_for_credit {
            self.due.insert(operation::CREDIT_REQUEST);
        }
        self.asked_for_credit = starves;
    }

    /// Ends it because its time is over.
    pub(super) fn expire(&mut self) {
        self.deadline = None;
        if matches!(self.state, State::Draining) {
            self.killed = true;
            self.state = State::Finished;
        } else if !matches!(self.state, State::Resetting) {
            self.reset();
        }
    }

    /// Ends it because the device ends. What the guest has sent is passed on as far as the stream
    /// takes it now.
    pub(super) fn end_with_device(&mut self, metrics: &VsockMetrics) {
        self.flush(metrics, Instant::now());
        self.killed = true;
    }

    /// Lets the host's program see that it has ended.
    pub(super) fn close_stream(&self) {
        self.stream.shut_down(Shutdown::Both);
    }

    /// Ends it because one side wants that or did what it must not do, or both have taken too long.
    pub(super) fn reset(&mut self) {
        self.killed = true;
        self.finish();
    }

    fn finish(&mut self) {
        let Some(_) = self.ports.filter(|_| !self.is_forgotten()) else {
            self.state = State::Finished;
            return;
        };
        self.state = State::Resetting;
        self.pending = VecDeque::new();
        self.due = Due::default();
        self.due.insert(operation::RST);
    }

    /// The guest knows of it no more. What it sent before it ended in order is still passed on.
    fn end_by_guest(&mut self, now: Instant) {
        self.due = Due::default();
        let in_order =
            self.guest_shutdown & shutdown::SEND != 0 || self.host_shutdown == shutdown::BOTH;
        self.state = match self.state {
            State::Connected if in_order && !self.pending.is_empty() => {
                self.deadline.get_or_insert(now + CLOSE_TIME);
                State::Draining
            }
            State::Connected => {
                self.killed = !in_order;
                State::Finished
            }
            State::Requesting | State::Waiting => {
                self.killed = true;
                State::Finished
            }
            _ => State::Finished,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_is_put_off_does_not_count() {
        let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let now = Instant::now();
        let mut connection = Connection::from_host(HostStream::new(stream), now);
        let pause = Duration::from_secs(3600);
        connection.put_off_deadline(pause);
        assert_eq!(connection.deadline(), Some(now + CONNECT_TIME + pause));
    }
}
