//! A connection between a port of the guest and a program on the host.

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

/// How long a program on the host may take to say which port it wants, and then the guest to answer; and how
/// long a program may make the guest wait.
pub(super) const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long a connection may take to end once one side is done with it, counted again from each progress.
pub(super) const CLOSE_TIME: Duration = Duration::from_secs(8);

/// Least and most bytes that are read from the host's program before other connections get their turn.
const MIN_READ_SIZE: usize = 4 << 10;
const MAX_READ_SIZE: usize = 64 << 10;

#[derive(Debug)]
enum State {
    /// A program on the host has connected, and has yet to name the port.
    Greeting(Greeting),
    /// The guest has been asked for the connection, and has yet to answer.
    Requesting,
    /// The guest has asked for the connection, and the backlog of the program on the host is full.
    Waiting,
    Connected,
    /// It has ended; only the guest has yet to be told.
    Resetting,
    /// The guest no longer knows it, and the last data that it sent is on its way to the host's program.
    Draining,
    /// Nothing is left.
    Finished,
}

/// The packets without data that are due to the guest: a bit for each operation.
#[derive(Debug, Default)]
struct Due(u8);

impl Due {
    fn insert(&mut self, operation: u16) {
        self.0 |= 1 << operation;
    }

    fn remove(&mut self, operation: u16) {
        self.0 &= !(1 << operation);
    }

    /// Takes the first one in the order of the operations' numbers: an answer precedes the rest, and the end
    /// of a connection is not delayed by credit updates.
    fn take_first(&mut self) -> Option<u16> {
        let operation = self.0.trailing_zeros() as u16;
        (self.0 != 0).then(|| {
            self.remove(operation);
            operation
        })
    }
}

/// A connection, from its first packet or byte until both sides know that it has ended.
#[derive(Debug)]
pub(super) struct Connection {
    state: State,
    ports: Option<Ports>,
    stream: HostStream,
    due: Due,
    credit: Credit,
    /// Whether the guest has been asked for credit since it last gave some.
    asked_for_credit: bool,
    /// Whether there may be something to read.
    readable: bool,
    /// Most bytes to read: taking buffers for more than there is costs time.
    read_size: usize,
    /// Whether the host's program has sent its last byte, and the guest has got it.
    host_ended: bool,
    /// Whether the host's program still reads.
    host_reads: bool,
    /// Bytes that the guest has sent and the stream has not taken yet.
    pending: VecDeque<u8>,
    /// Whether the host's program has been told that the guest sends no more.
    is_end_passed_on: bool,
    /// The directions that the guest has shut down, and those that it knows to be shut down by the host.
    guest_shutdown: u32,
    host_shutdown: u32,
    deadline: Option<Instant>,
    /// Whether it ended otherwise than by both sides shutting it down.
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

    /// Makes the connection of a program on the host that has just connected.
    pub(super) fn from_host(stream: HostStream, now: Instant) -> Connection {
        Connection {
            deadline: Some(now + CONNECT_TIME),
            ..Connection::new(State::Greeting(Greeting::default()), stream)
        }
    }

    /// Makes the connection that the guest asks for with `request`. The stream has yet to be connected.
    pub(super) fn from_guest(
        stream: HostStream,
        ports: Ports,
        request: &Header,
        now: Instant,
    ) -> Connection {
        let mut connection = Connection {
            ports: Some(ports),
            // The event loop reports when there is something to read.
            readable: false,
            deadline: Some(now + CONNECT_TIME),
            ..Connection::new(State::Waiting, stream)
        };
        connection.credit.learn(request);
        connection
    }

    /// Takes note that the stream is connected, for which the guest has waited.
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

    /// Returns the ports by which the guest knows it, if it does.
    pub(super) fn ports(&self) -> Option<Ports> {
        self.ports
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Postpones the deadline by `time`, during which neither side could do anything.
    pub(super) fn put_off_deadline(&mut self, time: Duration) {
        self.deadline = self.deadline.map(|deadline| deadline + time);
    }

    pub(super) fn was_killed(&self) -> bool {
        self.killed
    }

    pub(super) fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished)
    }

    /// Whether it must no longer be found for the guest's packets.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self.state, State::Draining | State::Finished)
    }

    /// Returns the events to watch the stream for; `None` if the stream is not needed any more. They are
    /// edge-triggered, so that none is repeated for something that cannot be served.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let mut interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        interest.set(EventSet::OUT, !self.pending.is_empty());
        match self.state {
            State::Waiting | State::Resetting | State::Finished => None,
            _ => Some(interest),
        }
    }

    /// Takes note of the stream's readiness.
    pub(super) fn host_is_ready(&mut self, ready: EventSet, metrics: &VsockMetrics, now: Instant) {
        let lost = EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= ready.intersects(lost | EventSet::IN | EventSet::READ_HANG_UP);
        if ready.intersects(lost) {
            match self.state {
                // It may have sent all it had and left; nobody waits for an answer.
                State::Greeting(_) | State::Requesting => self.reset(),
                _ => self.lose_reader(),
            }
        }
        if ready.contains(EventSet::OUT) {
            self.flush(metrics, now);
        }
        self.advance(now);
    }

    /// Returns the port that the host's program wants, once it has named one.
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
            // The guest sent this before it could know of the end.
            (State::Resetting, _) => {}
            (State::Requesting, operation::RESPONSE) => {
                self.credit.learn(header);
                self.accept();
            }
            // The guest's program has given up, and another one has got the same port.
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

    /// Answers the host's program once the guest has accepted the connection, with the host's port, which
    /// identifies the connection.
    fn accept(&mut self) {
        let port = self.ports.map_or(0, |ports| ports.host);
        let answer = format!("OK {port}\n");
        // Nothing has been sent before, so there is room for the answer.
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
        // All of it at once, so that it does not grow further; the host allocates only memory that is used.
        self.pending.reserve_exact(room);
        let mut chunk = [0; 4096];
        loop {
            match data.read(&mut chunk) {
                0 => break,
                count => self.pending.extend(&chunk[..count]),
            }
        }
    }

    /// Passes on pending data of the guest, as far as the stream takes it.
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

    /// Drops what the guest sends from now on.
    fn lose_reader(&mut self) {
        self.host_reads = false;
        self.credit.forward(self.pending.len());
        self.pending = VecDeque::new();
    }

    /// Whether it has a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        self.due.0 != 0 || self.readable_bytes() > 0
    }

    /// Returns how many bytes may be read from the host's program for the guest now.
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

    /// Takes the next packet without data for the guest, if there is one.
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

    /// Returns the header of the next data packets for the guest, and the most bytes that they may carry.
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

    /// Takes note of a packet that is sent to the guest: each one announces the room that there is.
    fn has_announced(&mut self) {
        self.credit.has_announced();
        self.due.remove(operation::CREDIT_UPDATE);
    }

    /// Takes note of the result of reading from the host's program for the guest.
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

    /// Does what has become due.
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
            // The guest waits for this last packet.
            self.finish();
            return;
        }
        let mut host_shutdown = self.host_shutdown;
        if self.host_ended {
            host_shutdown |= shutdown::SEND;
        }
        // If there is more to read, its end is near, and the guest is told of both ends together.
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

    /// Ends it because the device ends. Data of the guest is passed on as far as the stream takes it now.
    pub(super) fn end_with_device(&mut self, metrics: &VsockMetrics) {
        self.flush(metrics, Instant::now());
        self.killed = true;
    }

    /// Shows the host's program that the connection has ended.
    pub(super) fn close_stream(&self) {
        self.stream.shut_down(Shutdown::Both);
    }

    /// Ends it because one side wants that or has broken the rules, or they have taken too long.
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

    /// Takes note that the guest no longer knows it. If the guest ended it in order, data that it sent before
    /// is still passed on.
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
