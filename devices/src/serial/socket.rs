//! The host's side of a serial port that is served on a socket, for several clients.
//!
//! All output goes through a [`History`], in which each client has its own position. So output that clients
//! have yet to get takes no extra memory, and a client that comes late gets the earlier output. The guest
//! waits for clients that keep up with its output. If one stops taking any, the guest waits for a second and
//! then goes on.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::client::Client;
use super::history::History;
use super::{OUTPUT_CAPACITY, Serial, lock};
use crate::ListeningSocket;
use crate::device_log::DeviceLog;

/// Most clients at a time.
pub(super) const MAX_CLIENTS: usize = 16;
/// How long to wait before accepting again after the host was out of a resource.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);
/// How long the last output waits for clients that take none of it, and for clients that are slow.
const LAST_OUTPUT_PATIENCE: Duration = Duration::from_secs(1);
const LAST_OUTPUT_TIME: Duration = Duration::from_secs(3);
/// How often the last output is offered again to clients that are slow to take it.
const LAST_OUTPUT_RETRY_MS: u8 = 50;

/// The event loop's tokens of the descriptors.
const ATTENTION: u32 = 0;
const LISTENER: u32 = 1;
const TIMER: u32 = 2;
const FIRST_CLIENT: u32 = 3;

/// Moves bytes between a serial port and the clients of its socket, on the event loop.
pub(super) struct SocketWorker {
    port: Arc<Mutex<Serial>>,
    attention: Arc<EventFd>,
    log: DeviceLog,
    listener: ListeningSocket,
    history: History,
    clients: [Option<Client>; MAX_CLIENTS],
    /// The client whose input is next, if it has any.
    next_input: usize,
    accept_retry: Option<Instant>,
    /// Whether it has been logged that clients cannot be accepted, or that there are too many.
    has_warned: bool,
    timer: TimerFd,
    /// When the timer expires, if it runs.
    timer_end: Option<Instant>,
}

impl SocketWorker {
    /// Makes a worker for `port`, which keeps its output from now on.
    ///
    /// # Errors
    /// If the host cannot create a timer.
    pub(super) fn new(
        port: Arc<Mutex<Serial>>,
        listener: ListeningSocket,
    ) -> io::Result<SocketWorker> {
        let (attention, log) = {
            let mut port = lock(&port);
            port.connect();
            (port.attention(), port.log())
        };
        Ok(SocketWorker {
            port,
            attention,
            log,
            listener,
            history: History::default(),
            clients: Default::default(),
            next_input: 0,
            accept_retry: None,
            has_warned: false,
            timer: TimerFd::new()?,
            timer_end: None,
        })
    }

    fn handle(&mut self, token: u32, ready: EventSet, operations: &mut EventOps<'_>) {
        match token {
            ATTENTION => {
                // It fails only if the event was not signalled.
                let _ = self.attention.read();
            }
            LISTENER => self.accept(operations),
            TIMER => self.expire(operations),
            token => {
                let place = (token - FIRST_CLIENT) as usize;
                if let Some(Some(client)) = self.clients.get_mut(place) {
                    client.is_ready(ready);
                }
            }
        }
    }

    /// Accepts clients for as long as there is a place, and turns others away.
    fn accept(&mut self, operations: &mut EventOps<'_>) {
        loop {
            match self.listener.accept() {
                Ok(stream) => self.admit(stream, operations),
                Err(error)
                    if error.kind() == io::ErrorKind::Interrupted
                        || error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.warn_once(&format_args!("cannot accept a client for now: {error}"));
                    self.accept_retry = Some(Instant::now() + ACCEPT_RETRY);
                    return;
                }
            }
        }
    }

    fn admit(&mut self, stream: UnixStream, operations: &mut EventOps<'_>) {
        let free = self.clients.iter().position(Option::is_none);
        // Input of a client that has left could otherwise wait for the guest, and keep its place, for ever.
        let place = free.or_else(|| {
            let has_left = |slot: &Option<Client>| slot.as_ref().is_some_and(Client::has_left);
            self.clients.iter().position(has_left)
        });
        match place {
            Some(place) => {
                self.remove(place, operations);
                self.clients[place] = Some(Client::new(stream, &self.history, self.log.clone()));
                self.has_warned = false;
            }
            None => self.warn_once(&format_args!(
                "a client is turned away: there are {MAX_CLIENTS}"
            )),
        }
    }

    /// Logs a failure once until a client is accepted: a host that is out of a resource, or programs that
    /// connect again and again, could fill the log.
    fn warn_once(&mut self, message: &dyn std::fmt::Display) {
        if !std::mem::replace(&mut self.has_warned, true) {
            self.log.warn_of_host(format_args!(
                "socket '{}': {message}",
                self.listener.path().display()
            ));
        }
    }

    /// Handles the expiry of the timer, which is not read, as its events are edge-triggered.
    fn expire(&mut self, operations: &mut EventOps<'_>) {
        self.timer_end = None;
        let now = Instant::now();
        for client in self.clients.iter_mut().flatten() {
            client.expire(&self.history, now);
        }
        if self.accept_retry.is_some_and(|time| time <= now) {
            self.accept_retry = None;
            self.accept(operations);
        }
    }

    /// Sends the history, and what the guest has written if there is room for it. What the guest writes
    /// meanwhile wakes the worker again.
    fn move_output(&mut self) {
        self.send();
        if self.take_output() {
            self.send();
        }
    }

    fn send(&mut self) {
        for client in self.clients.iter_mut().flatten() {
            client.send(&self.history);
        }
    }

    /// Takes what the guest has written, unless that would overwrite output that a client has not had and the
    /// guest waits for. Returns whether there is anything new.
    fn take_output(&mut self) -> bool {
        let history = &self.history;
        let is_in_the_way = |client: &&mut Client| {
            let kept_from = client.kept_from();
            kept_from.is_some_and(|position| history.room_before(position) < OUTPUT_CAPACITY)
        };
        let mut port = lock(&self.port);
        if !port.has_output() {
            return false;
        }
        let now = Instant::now();
        let mut has_room = true;
        for client in self.clients.iter_mut().flatten().filter(is_in_the_way) {
            client.hold_up(now);
            has_room = false;
        }
        if has_room {
            let output = port.take_output();
            drop(port);
            self.history.append(&output);
        }
        has_room
    }

    /// Moves input to the guest until the guest has no room or no client has any input.
    fn move_input(&mut self) {
        let port = self.port.clone();
        // A guest without room asks for more by emptying its FIFO.
        while let Ok(Some(1..)) = lock(&port).read_input(|bytes| Ok(self.read_input(bytes))) {}
    }

    /// Reads from the next client that has input, and returns how many bytes.
    fn read_input(&mut self, bytes: &mut [u8]) -> usize {
        for _ in 0..MAX_CLIENTS {
            let place = self.next_input;
            self.next_input = (place + 1) % MAX_CLIENTS;
            if let Some(client) = &mut self.clients[place]
                && client.may_read()
            {
                let count = client.read(bytes);
                if count > 0 {
                    return count;
                }
            }
        }
        0
    }

    fn work(&mut self, operations: &mut EventOps<'_>) {
        // Input first: a client that turns out to be gone then does not hold up output.
        self.move_input();
        self.move_output();
        for place in 0..MAX_CLIENTS {
            let Some(client) = &mut self.clients[place] else {
                continue;
            };
            if client.is_gone() {
                self.remove(place, operations);
            } else if let Err(error) = watch(client, place, operations) {
                self.log
                    .warn_of_host(format_args!("cannot watch a client of the socket: {error}"));
                self.remove(place, operations);
                // The guest may have waited for it.
                let _ = self.attention.write(1);
            }
        }
        self.set_timer();
    }

    fn remove(&mut self, place: usize, operations: &mut EventOps<'_>) {
        if let Some(client) = self.clients[place].take()
            && !client.watched.is_empty()
        {
            // It fails only if the client is not watched.
            let _ = operations.remove(Events::new(&client, EventSet::empty()));
        }
    }

    /// Sets the timer to expire at the first deadline at the latest.
    fn set_timer(&mut self) {
        let deadlines = self.clients.iter().flatten().filter_map(Client::deadline);
        let Some(deadline) = deadlines.chain(self.accept_retry).min() else {
            return;
        };
        if self.timer_end.is_none_or(|end| deadline < end) {
            // A time of zero would stop it.
            let wait = deadline.saturating_duration_since(Instant::now());
            match self.timer.reset(wait.max(Duration::from_millis(1)), None) {
                Ok(()) => self.timer_end = Some(deadline),
                Err(error) => self
                    .log
                    .warn_of_host(format_args!("the host's timer fails: {error}")),
            }
        }
    }

    /// Sends the guest's last output to clients that take it.
    fn finish(&mut self) {
        lock(&self.port).release_output();
        let end = Instant::now() + LAST_OUTPUT_TIME;
        let mut last_progress = Instant::now();
        let mut unsent_before = u64::MAX;
        loop {
            for client in self.clients.iter_mut().flatten() {
                client.retry(&self.history);
            }
            let has_taken = self.take_output();
            let history = &self.history;
            let unsent = |client: &Client| client.unsent(history);
            let left: u64 = self.clients.iter().flatten().map(unsent).sum();
            let now = Instant::now();
            if has_taken || left < unsent_before {
                last_progress = now;
            }
            unsent_before = left;
            if has_taken {
                continue;
            }
            if left == 0 {
                return;
            }
            if now > end || now > last_progress + LAST_OUTPUT_PATIENCE {
                let left = left + lock(&self.port).take_output().len() as u64;
                self.log.warn_of_host(format_args!(
                    "clients of the socket miss the last {left} bytes of output"
                ));
                return;
            }
            let clients = self.clients.iter().flatten();
            let slow = clients.filter(|client| client.unsent(history) > 0);
            let mut events: Vec<_> = slow
                .map(|client| PollFd::new(client.as_fd(), PollFlags::POLLOUT))
                .collect();
            // Clients are tried again whatever the result.
            let _ = poll(&mut events, PollTimeout::from(LAST_OUTPUT_RETRY_MS));
        }
    }
}

/// Has the event loop watch the client for the events that it needs.
fn watch(
    client: &mut Client,
    place: usize,
    operations: &mut EventOps<'_>,
) -> event_manager::Result<()> {
    let interest = client.interest();
    if interest != client.watched {
        let events = Events::with_data(client, FIRST_CLIENT + place as u32, interest);
        if client.watched.is_empty() {
            operations.add(events)?;
        } else {
            operations.modify(events)?;
        }
        client.watched = interest;
    }
    Ok(())
}

impl MutEventSubscriber for SocketWorker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        let each_event = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let watched = operations
            .add(Events::with_data(&*self.attention, ATTENTION, EventSet::IN))
            .and_then(|()| operations.add(Events::with_data(&self.listener, LISTENER, each_event)))
            .and_then(|()| operations.add(Events::with_data(&self.timer, TIMER, each_event)));
        if let Err(error) = watched {
            self.log
                .warn_of_host(format_args!("cannot watch its socket: {error}"));
        }
        self.accept(operations);
        self.work(operations);
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        self.handle(events.data(), events.event_set(), operations);
        self.work(operations);
    }
}

impl Drop for SocketWorker {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests;
