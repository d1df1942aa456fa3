//! The multiplexer between the guest's packets and the host's programs, independent of the queues.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam_memory::GuestBuffers;
use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::timerfd::TimerFd;

use super::DriverError;
use super::connection::Connection;
use super::metrics::VsockMetrics;
use super::packet::{HOST_CID, Header, TYPE_STREAM, operation};
use super::receive::ReceiveQueue;
use super::source::Source;
use super::state::WorkerState;
use super::stream::HostStream;
use super::table::{Entry, Table};
use super::waiting::Waiting;
use crate::ListeningSocket;
use crate::virtio::{DriverLink, MAX_TURN};

/// Most refusals that wait for buffers of the guest. At this number, no more of its packets are taken.
const MAX_REFUSALS: usize = 256;
/// Most programs on the host that are accepted before other work gets its turn.
const MAX_ACCEPTED_PER_TURN: usize = 64;
/// How long the guest may take to end its connections after the device was restored, before new ones
/// are begun.
const RESET_TIME: Duration = Duration::from_secs(1);
/// How long to wait before accepting again after the host was out of a resource.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// The connections, and lists of those that have something to do.
pub(super) struct Muxer {
    guest_cid: u64,
    listener: Arc<ListeningSocket>,
    table: Table,
    /// Answers to packets that belong to no connection.
    refusals: VecDeque<Header>,
    /// The connections that have something for the guest, in the order of their turns.
    ready: VecDeque<usize>,
    /// The connections whose state has changed.
    touched: Vec<usize>,
    /// Whether programs may be waiting to be accepted.
    accepts: bool,
    accept_retry: Option<Instant>,
    /// When programs stop waiting. They wait because the guest would take their connections for those that it
    /// has yet to end.
    held_until: Option<Instant>,
    /// When the device was paused, if it is.
    paused_at: Option<Instant>,
    /// Whether it has been logged that programs cannot be accepted.
    accept_has_failed: bool,
    /// The connections of the guest that wait for programs on the host.
    waiting: Waiting,
    timer: TimerFd,
    /// When the timer expires, if it runs.
    timer_end: Option<Instant>,
    metrics: Arc<VsockMetrics>,
    link: Arc<DriverLink>,
}

impl Muxer {
    pub(super) fn new(
        guest_cid: u64,
        listener: Arc<ListeningSocket>,
        metrics: Arc<VsockMetrics>,
        link: Arc<DriverLink>,
    ) -> io::Result<Muxer> {
        Ok(Muxer {
            guest_cid,
            listener,
            table: Table::new(),
            refusals: VecDeque::new(),
            ready: VecDeque::new(),
            touched: Vec::new(),
            accepts: false,
            accept_retry: None,
            held_until: None,
            paused_at: None,
            accept_has_failed: false,
            waiting: Waiting::default(),
            timer: TimerFd::new()?,
            timer_end: None,
            metrics,
            link,
        })
    }

    /// Makes a multiplexer that takes the place of a saved one. If the guest has yet to end its connections,
    /// programs on the host wait until [`Muxer::end_reset`], though not for long.
    ///
    /// # Errors
    /// If the state is not one that a worker can have.
    pub(super) fn restore(
        &mut self,
        state: &WorkerState,
        has_to_reset: bool,
    ) -> Result<(), String> {
        let port = state.next_host_port;
        if !self.table.set_next_host_port(port) {
            return Err(format!("port {port} is not one for programs of the host"));
        }
        self.held_until = has_to_reset.then(|| Instant::now() + RESET_TIME);
        Ok(())
    }

    /// Takes note that the guest has ended its connections.
    pub(super) fn end_reset(&mut self) {
        self.held_until = None;
    }

    /// Returns the state that another worker needs.
    pub(super) fn save(&self) -> WorkerState {
        WorkerState {
            next_host_port: self.table.next_host_port(),
        }
    }

    /// Stops all deadlines until [`Muxer::watch`].
    pub(super) fn pause(&mut self) {
        self.paused_at.get_or_insert_with(Instant::now);
    }

    /// Postpones all deadlines by the length of the pause, during which the guest could do nothing.
    fn end_pause(&mut self) {
        let Some(paused_at) = self.paused_at.take() else {
            return;
        };
        let time = paused_at.elapsed();
        self.held_until = self.held_until.map(|end| end + time);
        for (_, entry) in self.table.iter() {
            entry.connection.put_off_deadline(time);
        }
    }

    /// Has the event loop watch the listener and the timer, and after a pause also the connections.
    pub(super) fn watch(&mut self, operations: &mut EventOps<'_>) -> Result<(), DriverError> {
        self.watch_sources(operations)?;
        self.end_pause();
        // It may run for a deadline that was postponed.
        self.timer_end = None;
        for (place, entry) in self.table.iter() {
            entry.watched = None;
            self.touched.push(place);
        }
        Ok(self.settle(operations)?)
    }

    fn watch_sources(&self, operations: &mut EventOps<'_>) -> event_manager::Result<()> {
        let readiness = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let listener = &*self.listener;
        operations.add(Events::with_data(
            listener,
            Source::Listener.token(),
            readiness,
        ))?;
        operations.add(Events::with_data(
            &self.timer,
            Source::Timer.token(),
            readiness,
        ))
    }

    /// Handles a packet of the guest.
    pub(super) fn handle_packet(&mut self, header: &Header, data: &mut GuestBuffers) {
        self.metrics.tx_packets_count.add(1);
        if header.dst_cid != HOST_CID || header.src_cid != self.guest_cid {
            self.link.warn(format_args!(
                "a packet from CID {} to CID {} is dropped: it is not from the guest, which is {}, \
                 to the host, which is {HOST_CID}",
                header.src_cid, header.dst_cid, self.guest_cid
            ));
            return;
        }
        if header.socket_type != TYPE_STREAM {
            self.refusals.extend(header.refusal());
            return;
        }
        if let Some(place) = self.table.find(header.ports()) {
            if let Some(entry) = self.table.get(place) {
                let connection = &mut entry.connection;
                connection.handle_packet(header, data, &self.metrics, Instant::now());
                let is_forgotten = connection.is_forgotten();
                self.touched.push(place);
                // The next packet may begin another connection with the same ports.
                if is_forgotten {
                    self.table.forget(place);
                }
            }
        } else if header.operation != operation::REQUEST || !self.connect(header) {
            self.refusals.extend(header.refusal());
        }
    }

    /// Connects the guest to the program on the host that listens for the port, or has the connection wait
    /// for it; `false` if there is no such program, or no room.
    fn connect(&mut self, request: &Header) -> bool {
        if self.table.is_full() {
            return false;
        }
        let ports = request.ports();
        let now = Instant::now();
        let Ok(stream) = HostStream::unconnected() else {
            return false;
        };
        // No connection overtakes those that wait for the same program.
        let connected = match self.waiting.has(ports.host) {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => stream.connect(&self.path_of_port(ports.host)),
        };
        let mut connection = Connection::from_guest(stream, ports, request, now);
        match connected {
            Ok(()) => connection.connected(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.waiting.is_full() => {}
            Err(_) => return false,
        }
        let is_waiting = connection.is_waiting();
        let place = self.table.insert(connection);
        if is_waiting {
            self.waiting.add(ports.host, place, now);
        }
        self.metrics.conns_added.add(1);
        self.touched.push(place);
        true
    }

    /// Tries again to connect the guest's waiting connections, in the order in which they came.
    fn retry_waiting(&mut self, now: Instant) {
        let (mut has_connected, mut full_ports) = (false, Vec::new());
        for (port, place) in self.waiting.take() {
            let path = self.path_of_port(port);
            let Some(entry) = self.table.get(place) else {
                continue;
            };
            let connection = &mut entry.connection;
            // Another connection may have taken the place of one that has ended.
            let is_the_same = connection.ports().is_some_and(|ports| ports.host == port);
            if !connection.is_waiting() || !is_the_same {
                continue;
            }
            let connected = match full_ports.contains(&port) {
                true => Err(io::ErrorKind::WouldBlock.into()),
                false => connection.stream().connect(&path),
            };
            match connected {
                Ok(()) => {
                    connection.connected();
                    has_connected = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    full_ports.push(port);
                    self.waiting.keep(port, place);
                    continue;
                }
                Err(_) => connection.reset(),
            }
            self.touched.push(place);
        }
        self.waiting.schedule(has_connected, now);
    }

    fn path_of_port(&self, port: u32) -> PathBuf {
        let mut path = OsString::from(self.listener.path());
        path.push(format!("_{port}"));
        path.into()
    }

    /// Whether further packets of the guest could not be answered.
    pub(super) fn is_stalled(&self) -> bool {
        self.refusals.len() >= MAX_REFUSALS
    }

    /// Remembers that programs on the host have connected.
    pub(super) fn begin_accepting(&mut self) {
        self.accepts = true;
    }

    /// Accepts programs on the host, for one turn at most; `true` if there may be more.
    pub(super) fn accept(&mut self) -> bool {
        for _ in 0..MAX_ACCEPTED_PER_TURN {
            if !self.accepts || self.held_until.is_some() {
                return false;
            }
            match self.listener.accept() {
                Ok(_) if self.table.is_full() => self.link.warn_of_host(format_args!(
                    "a program of the host is turned away: there are {} connections",
                    self.table.capacity()
                )),
                Ok(stream) => {
                    self.accept_has_failed = false;
                    let stream = HostStream::new(stream);
                    let connection = Connection::from_host(stream, Instant::now());
                    let place = self.table.insert(connection);
                    self.touched.push(place);
                    self.greet(place);
                }
                Err(error) => self.stop_accepting(&error),
            }
        }
        self.accepts
    }

    fn stop_accepting(&mut self, error: &io::Error) {
        // A program that left before it was accepted is not a failure.
        if error.kind() == io::ErrorKind::ConnectionAborted
            || error.kind() == io::ErrorKind::Interrupted
        {
            return;
        }
        self.accepts = false;
        if error.kind() != io::ErrorKind::WouldBlock {
            self.metrics.muxer_event_fails.add(1);
            // This is logged once until a program is accepted.
            if !std::mem::replace(&mut self.accept_has_failed, true) {
                self.link.warn_of_host(format_args!(
                    "cannot accept programs on socket '{}' for now: {error}",
                    self.listener.path().display()
                ));
            }
            self.accept_retry = Some(Instant::now() + ACCEPT_RETRY);
        }
    }

    /// Reads which port a program on the host wants, and asks the guest.
    fn greet(&mut self, place: usize) {
        let Some(entry) = self.table.get(place) else {
            return;
        };
        if let Some(port) = entry.connection.wanted_port() {
            let ports = self.table.choose_host_port(port);
            self.table.assign(place, ports);
            if let Some(entry) = self.table.get(place) {
                entry.connection.request(ports, Instant::now());
                self.metrics.conns_added.add(1);
            }
        }
    }

    /// Takes note that the stream of the connection at `place` has become ready.
    pub(super) fn host_is_ready(&mut self, place: usize, ready: EventSet) {
        self.greet(place);
        if let Some(entry) = self.table.get(place) {
            let connection = &mut entry.connection;
            connection.host_is_ready(ready, &self.metrics, Instant::now());
            self.touched.push(place);
        }
    }

    /// Handles the expiry of the timer, which is not read, as its events are edge-triggered.
    pub(super) fn expire(&mut self) {
        self.timer_end = None;
        let now = Instant::now();
        if self.accept_retry.is_some_and(|time| time <= now) {
            self.accept_retry = None;
            self.accepts = true;
        }
        if self.held_until.is_some_and(|time| time <= now) {
            self.held_until = None;
        }
        if self.waiting.retry().is_some_and(|time| time <= now) {
            self.retry_waiting(now);
        }
        for (place, entry) in self.table.iter() {
            if let Some(deadline) = entry.connection.deadline() {
                if deadline <= now {
                    entry.connection.expire();
                }
                // If its time is not over, the timer must be set for it again.
                self.touched.push(place);
            }
        }
    }

    /// Sends packets to the guest, for one turn at most. `true` if there are more: the doorbell is then rung
    /// for the next turn.
    pub(super) fn send(&mut self, queue: &mut ReceiveQueue) -> Result<bool, DriverError> {
        let start = Instant::now();
        let mut packets = 0;
        while (!self.refusals.is_empty() || !self.ready.is_empty()) && queue.has_buffer()? {
            if packets >= queue.size().into() || start.elapsed() >= MAX_TURN {
                queue.ring_doorbell();
                return Ok(true);
            }
            let sent = match self.refusals.pop_front() {
                Some(refusal) => queue.put(&refusal)?.into(),
                None => self.send_next(queue)?,
            };
            self.metrics.rx_packets_count.add(sent as u64);
            packets += sent;
            queue.report(&self.link);
        }
        Ok(false)
    }

    /// Gives the next connection its turn, and returns the number of packets sent.
    fn send_next(&mut self, queue: &mut ReceiveQueue) -> Result<usize, DriverError> {
        let Some(place) = self.ready.pop_front() else {
            return Ok(0);
        };
        let Some(entry) = self.table.get(place) else {
            return Ok(0);
        };
        entry.is_queued = false;
        self.touched.push(place);
        let connection = &mut entry.connection;
        let mut packets = 0;
        if let Some(header) = connection.take_control_packet(self.guest_cid) {
            packets = queue.put(&header)?.into();
        } else if let Some((header, limit)) = connection.data_packet(self.guest_cid) {
            let read = |buffers: &mut GuestBuffers| connection.stream().receive_into(buffers);
            if let Some(result) = queue.put_data(header, limit, read)? {
                if let Ok(sent) = &result {
                    packets = sent.packets;
                    self.metrics.rx_bytes_count.add(sent.bytes as u64);
                }
                let result = result.map(|sent| sent.bytes);
                connection.finish_reading(result, &self.metrics, Instant::now());
            }
        }
        if connection.has_packet() {
            entry.is_queued = true;
            self.ready.push_back(place);
        }
        Ok(packets)
    }

    /// Does what the new state of each changed connection requires.
    pub(super) fn settle(&mut self, operations: &mut EventOps<'_>) -> io::Result<()> {
        while let Some(place) = self.touched.pop() {
            let Some(entry) = self.table.get(place) else {
                continue;
            };
            let connection = &mut entry.connection;
            let interest = connection.interest();
            if interest != entry.watched {
                let events = |interest| {
                    let token = Source::Connection(place).token();
                    Events::with_data(connection.stream(), token, interest)
                };
                let done = match (entry.watched, interest) {
                    (None, Some(interest)) => operations.add(events(interest)),
                    (Some(_), Some(interest)) => operations.modify(events(interest)),
                    (_, None) => {
                        connection.close_stream();
                        operations.remove(events(EventSet::empty()))
                    }
                };
                let is_watched = entry.watched.is_some() || done.is_ok();
                entry.watched = interest.filter(|_| is_watched);
                if done.is_err() {
                    self.metrics.conn_event_fails.add(1);
                    connection.reset();
                    self.touched.push(place);
                    continue;
                }
            }
            if connection.has_packet() && !entry.is_queued {
                entry.is_queued = true;
                self.ready.push_back(place);
            }
            let deadline = connection.deadline();
            if connection.is_finished() {
                self.remove(place);
                continue;
            }
            self.set_timer(deadline)?;
        }
        self.set_timer(self.waiting.retry())?;
        self.set_timer(self.held_until)?;
        self.set_timer(self.accept_retry)
    }

    /// Shows the host's programs that the device does nothing more.
    pub(super) fn close_streams(&mut self) {
        for (_, entry) in self.table.iter() {
            entry.connection.close_stream();
        }
    }

    fn remove(&mut self, place: usize) {
        let Some(Entry {
            connection,
            is_queued,
            ..
        }) = self.table.remove(place)
        else {
            return;
        };
        // Its place may go to another connection. With a guest that receives nothing, the queue would
        // otherwise grow without bound.
        if is_queued {
            self.ready.retain(|&queued| queued != place);
        }
        // Without ports it was not yet a connection.
        if connection.ports().is_some() {
            self.metrics.conns_removed.add(1);
            self.metrics
                .conns_killed
                .add(u64::from(connection.was_killed()));
        }
    }

    /// Sets the timer to expire at `deadline` at the latest.
    fn set_timer(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        if let Some(deadline) = deadline
            && self.timer_end.is_none_or(|end| deadline < end)
        {
            // A time of zero would stop it.
            let wait = deadline.saturating_duration_since(Instant::now());
            self.timer.reset(wait.max(Duration::from_millis(1)), None)?;
            self.timer_end = Some(deadline);
        }
        Ok(())
    }
}

/// The end of the device, or a reset, ends all connections.
impl Drop for Muxer {
    fn drop(&mut self) {
        let places: Vec<usize> = self.table.iter().map(|(place, _)| place).collect();
        for place in places {
            if let Some(entry) = self.table.get(place) {
                entry.connection.end_with_device(&self.metrics);
            }
            self.remove(place);
        }
    }
}
