//! The load of the network behind a card: connections of TCP and datagrams to a peer beyond the gateway. The card's
//! addresses are given, and the peer's first router is asked for its Ethernet address by ARP.

use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use runtime::time::{self, Duration};
use runtime::virtio::Transport;
use runtime::virtio::net::Header;

use self::connection::Connection;
use self::link::Link;
use self::packet::{Addresses, Segment};
use crate::histogram::Histogram;
use crate::outcome::Outcome;
use crate::settings::{InternetSettings, Limit, Settings, TcpMode};

mod connection;
mod link;
mod packet;

/// The ports that connections come from, in turn.
const FIRST_PORT: u16 = 2048;
const PORT_COUNT: u16 = 60_000;
/// When something is sent again.
const RETRANSMISSION_TIME: Duration = Duration::from_millis(200);
/// How long the peer may take to see the end of a stream.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Loads the network with connections of TCP.
///
/// # Errors
///
/// If the device cannot do this load or stops working, or the peer does not keep up a connection.
pub fn run_tcp(
    device: &dyn Transport,
    settings: &Settings,
    internet: &InternetSettings,
    mode: TcpMode,
) -> Result<Outcome, String> {
    let load = Load::open(device, settings, internet)?;
    crate::say_ready();
    match mode {
        TcpMode::Send => load.send(),
        TcpMode::Receive => load.receive(),
        TcpMode::Connect => load.connect(settings.depth),
        TcpMode::RoundTrip => load.round_trip(),
    }
}

/// Loads the network with datagrams to the peer.
///
/// # Errors
///
/// If the device cannot do this load or stops working.
pub fn run_udp(
    device: &dyn Transport,
    settings: &Settings,
    internet: &InternetSettings,
    packet_size: u32,
) -> Result<Outcome, String> {
    let load = Load::open(device, settings, internet)?;
    crate::say_ready();
    load.send_datagrams(packet_size)
}

/// A load under way.
struct Load<'a> {
    link: Link<'a>,
    addresses: Addresses,
    peer_port: u16,
    limit: Limit,
    /// The connection at each index has a port such that [`place`] finds it.
    connections: Vec<Connection>,
    latency: Histogram,
    operations: u64,
    bytes: u64,
}

impl<'a> Load<'a> {
    fn open(
        device: &'a dyn Transport,
        settings: &Settings,
        internet: &InternetSettings,
    ) -> Result<Self, String> {
        let mut link = Link::open(device, settings.completion)?;
        let gateway_mac = link.resolve(internet.address, internet.gateway)?;
        Ok(Self {
            addresses: Addresses {
                mac: link.mac,
                gateway_mac,
                guest: internet.address,
                peer: *internet.peer.ip(),
            },
            link,
            peer_port: internet.peer.port(),
            limit: settings.limit,
            connections: Vec::new(),
            latency: Histogram::new(),
            operations: 0,
            bytes: 0,
        })
    }

    fn outcome(self, name: &'static str, ticks: u64) -> Outcome {
        Outcome {
            name,
            operations: self.operations,
            bytes: self.bytes,
            ticks,
            latency: self.latency,
            errors: 0,
            first_error: None,
            doorbells: self.link.doorbells(),
        }
    }

    /// Returns until when a load that begins at `start` goes on, and how much it does at most.
    fn end(&self, start: u64) -> (u64, u64) {
        match self.limit {
            Limit::Seconds(seconds) => (start + seconds * time::ticks_per_second(), u64::MAX),
            Limit::Operations(count) => (u64::MAX, count),
        }
    }

    /// Sends what the connections have, waits until `end` at most, and takes what has come. Returns the time.
    fn step(&mut self, now: u64, end: u64) -> Result<u64, String> {
        let mut until = end;
        for connection in &mut self.connections {
            connection.send(&mut self.link, &self.addresses, now)?;
            if connection.waits() {
                until = end.min(now + ticks(RETRANSMISSION_TIME));
            }
        }
        self.link.publish();
        let now = self.link.wait(until)?;
        self.link.reclaim()?;
        let connections = &mut self.connections;
        self.link.receive(|frame| {
            if let Some(segment) = Segment::read(frame, &self.addresses)
                && segment.source == self.peer_port
                && let Some(index) = place(segment.destination, connections.len())
                && connections[index].port() == segment.destination
            {
                connections[index].take(&segment, now)?;
            }
            Ok(())
        })?;
        for connection in connections {
            connection.send_again_after(ticks(RETRANSMISSION_TIME), now)?;
        }
        Ok(now)
    }

    /// Opens one connection, and returns the time when it is open.
    fn open_one(&mut self) -> Result<u64, String> {
        let mut now = time::ticks();
        self.connections = vec![Connection::new(FIRST_PORT, self.peer_port, now)];
        while !self.connections[0].is_open() {
            now = self.step(now, u64::MAX)?;
        }
        Ok(now)
    }

    /// Ends the stream to the peer, and waits until the peer has seen that, for a limited time: passt of 2023
    /// sometimes forgets the connection before it acknowledges its end.
    fn finish_one(&mut self, mut now: u64) -> Result<(), String> {
        self.connections[0].finish();
        let end = now + ticks(CLOSE_LIMIT);
        while now < end && !self.connections[0].is_finished() {
            now = self.step(now, end)?;
        }
        Ok(())
    }

    fn send(mut self) -> Result<Outcome, String> {
        let start = self.open_one()?;
        let (end, count) = self.end(start);
        self.connections[0].send_up_to(count);
        let mut now = start;
        while now < end && self.connections[0].acknowledged() < count {
            now = self.step(now, end)?;
        }
        self.bytes = self.connections[0].acknowledged();
        self.operations = self.bytes;
        self.finish_one(now)?;
        Ok(self.outcome("tcp send", now - start))
    }

    fn receive(mut self) -> Result<Outcome, String> {
        let mut now = self.open_one()?;
        while self.connections[0].received() == 0 {
            now = self.step(now, u64::MAX)?;
        }
        let (start, first) = (now, self.connections[0].received());
        let (end, count) = self.end(start);
        while now < end && self.connections[0].received() < count {
            if self.connections[0].peer_has_finished() {
                return Err("the peer has sent less than was to be received".into());
            }
            now = self.step(now, end)?;
        }
        // The first bytes began to come before the time was taken.
        self.bytes = self.connections[0].received() - first;
        self.operations = self.bytes;
        Ok(self.outcome("tcp receive", now - start))
    }

    fn round_trip(mut self) -> Result<Outcome, String> {
        let start = self.open_one()?;
        let (end, count) = self.end(start);
        let mut now = start;
        while now < end && self.operations < count {
            let sent = now;
            self.operations += 1;
            self.connections[0].send_up_to(self.operations);
            while self.connections[0].received() < self.operations {
                if self.connections[0].peer_has_finished() {
                    return Err("the peer has ended the connection".into());
                }
                now = self.step(now, u64::MAX)?;
            }
            self.latency.record(now - sent);
        }
        self.bytes = self.operations;
        self.finish_one(now)?;
        Ok(self.outcome("tcp round trip", now - start))
    }

    /// Opens connections, `depth` at a time, and ends each when the peer has ended it.
    fn connect(mut self, depth: u16) -> Result<Outcome, String> {
        let mut now = time::ticks();
        let start = now;
        let (end, mut to_open) = self.end(start);
        let mut under_way = 0;
        for index in 0..depth {
            if to_open > 0 {
                to_open -= 1;
                under_way += 1;
                let port = FIRST_PORT + index;
                self.connections
                    .push(Connection::new(port, self.peer_port, start));
            }
        }
        let rounds = PORT_COUNT / depth;
        let mut opened = vec![(start, 0); self.connections.len()];
        while under_way > 0 {
            now = self.step(now, if now < end { end } else { u64::MAX })?;
            if now >= end {
                to_open = 0;
            }
            for (index, connection) in self.connections.iter_mut().enumerate() {
                if connection.peer_has_finished() {
                    connection.finish();
                }
                let (since, round) = &mut opened[index];
                if !connection.is_over() || *round == rounds {
                    continue;
                }
                self.latency.record(now - *since);
                self.operations += 1;
                if to_open > 0 {
                    to_open -= 1;
                    *since = now;
                    *round = (*round + 1) % rounds;
                    let port = FIRST_PORT + *round * depth + index as u16;
                    *connection = Connection::new(port, self.peer_port, now);
                } else {
                    under_way -= 1;
                    *round = rounds;
                }
            }
        }
        Ok(self.outcome("tcp connect", now - start))
    }

    /// Sends datagrams in frames of `packet_size` bytes.
    fn send_datagrams(mut self, packet_size: u32) -> Result<Outcome, String> {
        let (addresses, port) = (self.addresses, self.peer_port);
        let size = packet_size as usize;
        let start = time::ticks();
        let (end, count) = self.end(start);
        let mut now = start;
        let mut sent = 0;
        while now < end && sent < count {
            while sent < count
                && self.link.send(|frame| {
                    packet::write_datagram(&mut frame[..size], &addresses, FIRST_PORT, port);
                    (Header::default(), size)
                })?
            {
                sent += 1;
            }
            self.link.publish();
            now = self.link.wait(end)?;
            self.link.reclaim()?;
            self.link.receive(|_| Ok(()))?;
        }
        while self.link.is_sending() {
            now = self.link.wait(u64::MAX)?;
            self.link.reclaim()?;
        }
        self.operations = sent;
        self.bytes = sent * u64::from(packet_size);
        Ok(self.outcome("udp send", now - start))
    }
}

/// Returns the index of the connection that has `port`, if there are `count` and it is one of theirs.
fn place(port: u16, count: usize) -> Option<usize> {
    usize::from(port.checked_sub(FIRST_PORT)?).checked_rem(count)
}

fn ticks(time: Duration) -> u64 {
    time.as_millis() as u64 * time::ticks_per_second() / 1000
}
