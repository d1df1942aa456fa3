//! The network between a service and its guest, who are alone on it: Ethernet, ARP, IPv4 and TCP.
//!
//! smoltcp implements them. This module keeps from it all that a guest has no reason to send, and
//! bounds the memory that a guest can make it use.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, IpListenEndpoint};

use crate::connection::Connection;
use crate::metadata::Metadata;
use crate::service::MetadataService;

/// The service's Ethernet address.
const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
/// The port of HTTP.
const PORT: u16 = 80;

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 30;
/// Bytes of a connection that wait to be read: what the guest may send at once.
const RECEIVE_BUFFER_SIZE: usize = 4 << 10;
/// Bytes of a connection that wait to be sent or acknowledged.
const SEND_BUFFER_SIZE: usize = 8 << 10;
/// How long a connection may take for a request and its response, and how long it may be idle.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Most frames that wait for the guest.
const MAX_WAITING_FRAMES: usize = 64;
/// Largest IP packet that the service sends, in bytes.
const MAX_MTU: u16 = 1500;
/// Finest resolution of timers, so that none can keep the monitor busy.
const TIMER_RESOLUTION: Duration = Duration::from_millis(10);

/// Largest frame of a guest that is parsed, in bytes: what it may send at once on a connection,
/// with the longest headers. A frame that its driver left to be segmented is not larger.
pub const MAX_GUEST_FRAME_SIZE: usize = ETHERNET_HEADER_SIZE + 60 + 60 + RECEIVE_BUFFER_SIZE;

const ETHERNET_HEADER_SIZE: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const PROTOCOL_TCP: u8 = 6;

/// Offsets of fields in a frame.
mod offset {
    pub const ETHERTYPE: usize = 12;
    /// Of the flags and offset of a fragment (RFC 791, section 3.1).
    pub const IPV4_FRAGMENT: usize = 14 + 6;
    pub const IPV4_PROTOCOL: usize = 14 + 9;
    pub const IPV4_DESTINATION: usize = 14 + 16;
    /// Of the protocol address that is asked for (RFC 826).
    pub const ARP_TARGET: usize = 14 + 24;
}

/// How many bytes at the start of a frame are enough to see whether it is for the service.
pub const CLAIM_SIZE: usize = offset::ARP_TARGET + 4;

/// The running service for one guest.
pub struct MetadataNetwork {
    metadata: Metadata,
    address: Ipv4Addr,
    mtu: u16,
    interface: Interface,
    sockets: SocketSet<'static>,
    places: Vec<Place>,
    to_guest: VecDeque<Vec<u8>>,
    /// The stack's time counts from here.
    start: Instant,
}

/// A slot for one connection.
struct Place {
    socket: SocketHandle,
    connection: Connection,
    /// When the connection times out; `None` while there is none.
    deadline: Option<Instant>,
}

impl MetadataNetwork {
    /// Makes a network over which the guest reaches `service` by packets of up to `mtu` bytes.
    ///
    /// # Errors
    /// If the host provides no random numbers.
    pub fn new(service: &MetadataService, mtu: u16, now: Instant) -> io::Result<MetadataNetwork> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)?;
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        config.random_seed = u64::from_le_bytes(seed);
        let mtu = mtu.min(MAX_MTU);
        let address = service.address.get();
        let mut to_guest = VecDeque::new();
        let mut device = Frames {
            received: None,
            to_guest: &mut to_guest,
            metadata: &service.metadata,
            mtu,
        };
        let mut interface = Interface::new(config, &mut device, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // The guest is on this network, whatever its address.
            let pushed = addresses.push(IpCidr::new(address.into(), 0));
            debug_assert!(pushed.is_ok());
        });
        let mut sockets = SocketSet::new(Vec::new());
        let places = (0..MAX_CONNECTIONS)
            .map(|_| {
                let mut socket = Socket::new(
                    SocketBuffer::new(vec![0; RECEIVE_BUFFER_SIZE]),
                    SocketBuffer::new(vec![0; SEND_BUFFER_SIZE]),
                );
                // There is no network in between, so waiting gains nothing.
                socket.set_nagle_enabled(false);
                socket.set_ack_delay(None);
                listen(&mut socket, address);
                Place {
                    socket: sockets.add(socket),
                    connection: Connection::default(),
                    deadline: None,
                }
            })
            .collect();
        Ok(MetadataNetwork {
            metadata: service.metadata.clone(),
            address,
            mtu,
            interface,
            sockets,
            places,
            to_guest,
            start: now,
        })
    }

    /// Returns whether a frame is for the service: IPv4 to its address, or ARP about it. The first
    /// [`CLAIM_SIZE`] bytes of the frame suffice.
    pub fn claims(&self, frame: &[u8]) -> bool {
        let field = |offset: usize| frame.get(offset..offset + 4) == Some(&self.address.octets());
        match frame.get(offset::ETHERTYPE..ETHERNET_HEADER_SIZE) {
            Some(ethertype) if ethertype == ETHERTYPE_IPV4 => field(offset::IPV4_DESTINATION),
            Some(ethertype) if ethertype == ETHERTYPE_ARP => field(offset::ARP_TARGET),
            Some(_) => false,
            None => {
                self.metadata.metrics().rx_bad_eth.add(1);
                false
            }
        }
    }

    /// Drops a frame for the service that is larger than [`MAX_GUEST_FRAME_SIZE`], and counts it.
    pub fn reject(&self) {
        self.metadata.metrics().rx_accepted.add(1);
        self.metadata.metrics().rx_accepted_err.add(1);
    }

    /// Takes a frame for the service, and may change its contents. [`MetadataNetwork::poll`]
    /// processes it further.
    pub fn accept(&mut self, frame: &mut [u8], now: Instant) {
        let metadata = self.metadata.clone();
        let metrics = metadata.metrics();
        metrics.rx_accepted.add(1);
        if frame.get(offset::ETHERTYPE..ETHERNET_HEADER_SIZE) == Some(&ETHERTYPE_IPV4) {
            let protocol = frame.get(offset::IPV4_PROTOCOL);
            // Another fragment follows, or this is not the first.
            let is_fragment = frame
                .get(offset::IPV4_FRAGMENT..)
                .and_then(|rest| rest.first_chunk())
                .is_some_and(|&bytes| u16::from_be_bytes(bytes) & 0x3fff != 0);
            if protocol != Some(&PROTOCOL_TCP) || is_fragment {
                metrics.rx_accepted_unusual.add(1);
                return;
            }
        }
        // If the guest reaches this address through a gateway, the frame is addressed to the
        // gateway.
        if let Some(destination) = frame.first_chunk_mut() {
            *destination = MAC;
        }
        let time = self.time(now);
        let mut device = Frames {
            received: Some(frame),
            to_guest: &mut self.to_guest,
            metadata: &self.metadata,
            mtu: self.mtu,
        };
        match self
            .interface
            .poll_ingress_single(time, &mut device, &mut self.sockets)
        {
            PollIngressSingleResult::None => metrics.rx_accepted_err.add(1),
            _ => metrics.rx_count.add(1),
        }
    }

    /// Answers requests and handles expired timers, as far as there is room for frames.
    pub fn poll(&mut self, now: Instant) {
        let time = self.time(now);
        loop {
            let mut progress = false;
            for place in &mut self.places {
                let socket = self.sockets.get_mut(place.socket);
                progress |= place.serve(socket, &self.metadata, now);
            }
            let mut device = Frames {
                received: None,
                to_guest: &mut self.to_guest,
                metadata: &self.metadata,
                mtu: self.mtu,
            };
            while self
                .interface
                .poll_egress(time, &mut device, &mut self.sockets)
                == PollResult::SocketStateChanged
            {
                progress = true;
            }
            if !progress {
                break;
            }
        }
        for place in &mut self.places {
            let socket = self.sockets.get_mut(place.socket);
            place.recycle(socket, self.address, &self.metadata);
        }
    }

    /// Returns the time from `now` until [`MetadataNetwork::poll`] has something to do; `None` if
    /// that is only when a frame is accepted or taken.
    pub fn wait_time(&mut self, now: Instant) -> Option<Duration> {
        let deadlines = self.places.iter().filter_map(|place| place.deadline);
        let deadline = deadlines
            .min()
            .map(|deadline| deadline.saturating_duration_since(now));
        let time = self.time(now);
        let stack = if self.to_guest.len() < MAX_WAITING_FRAMES {
            self.interface.poll_delay(time, &self.sockets)
        } else {
            None
        };
        let stack = stack.map(Duration::from);
        let wait = match (deadline, stack) {
            (Some(deadline), Some(stack)) => deadline.min(stack),
            (deadline, stack) => deadline.or(stack)?,
        };
        Some(wait.max(TIMER_RESOLUTION))
    }

    /// Returns the frame that the guest receives next.
    pub fn next_frame(&self) -> Option<&[u8]> {
        self.to_guest.front().map(Vec::as_slice)
    }

    /// Removes that frame, which the guest has received if `delivered`, and otherwise cannot
    /// receive.
    pub fn take_frame(&mut self, delivered: bool) {
        let Some(frame) = self.to_guest.pop_front() else {
            return;
        };
        let metrics = self.metadata.metrics();
        if delivered {
            metrics.tx_frames.add(1);
            metrics.tx_bytes.add(frame.len() as u64);
        } else {
            metrics.tx_errors.add(1);
        }
    }

    fn time(&self, now: Instant) -> StackInstant {
        let micros = now.saturating_duration_since(self.start).as_micros();
        StackInstant::from_micros(micros as i64)
    }
}

impl Drop for MetadataNetwork {
    fn drop(&mut self) {
        let open = self.places.iter().filter(|place| place.deadline.is_some());
        let count = open.count() as u64;
        self.metadata.metrics().connections_destroyed.add(count);
    }
}

impl Place {
    /// Moves bytes between the socket and the connection, and answers. Returns whether it did
    /// anything.
    fn serve(&mut self, socket: &mut Socket<'_>, metadata: &Metadata, now: Instant) -> bool {
        match socket.state() {
            // A connection that was just beginning is gone; the socket has forgotten it.
            State::Listen => {
                if self.deadline.is_some() {
                    socket.abort();
                }
                return false;
            }
            State::Closed | State::TimeWait => return false,
            _ => {}
        }
        let deadline = *self.deadline.get_or_insert_with(|| {
            metadata.metrics().connections_created.add(1);
            now + TIME_LIMIT
        });
        if now >= deadline {
            socket.abort();
            return true;
        }
        let mut progress = false;
        loop {
            let response = self.connection.response();
            if !response.is_empty() {
                let count = socket.send_slice(response).unwrap_or(0);
                self.connection.take(count);
                progress |= count > 0;
                if !self.connection.response().is_empty() {
                    break;
                }
            }
            if self.connection.is_finished() {
                socket.close();
            }
            let received = socket.recv(|bytes| {
                let count = self.connection.receive(bytes);
                (count, count)
            });
            progress |= received.is_ok_and(|count| count > 0);
            if self.connection.answer(metadata, now) {
                self.deadline = Some(now + TIME_LIMIT);
                progress = true;
            } else if received.is_err() || received == Ok(0) {
                break;
            }
        }
        // The guest sends no more, and all its requests are answered.
        if socket.state() == State::CloseWait
            && !socket.can_recv()
            && self.connection.response().is_empty()
        {
            socket.close();
            progress = true;
        }
        progress
    }

    /// Makes the socket listen again once its connection has ended. The guest has received
    /// everything by then, so there is no need to wait.
    fn recycle(&mut self, socket: &mut Socket<'_>, address: Ipv4Addr, metadata: &Metadata) {
        if matches!(socket.state(), State::Closed | State::TimeWait) {
            if self.deadline.take().is_some() {
                metadata.metrics().connections_destroyed.add(1);
            }
            self.connection = Connection::default();
            listen(socket, address);
        }
    }
}

fn listen(socket: &mut Socket<'_>, address: Ipv4Addr) {
    let endpoint = IpListenEndpoint {
        addr: Some(address.into()),
        port: PORT,
    };
    let listening = socket.listen(endpoint);
    debug_assert!(listening.is_ok(), "the socket was closed");
}

/// The stack's link to the guest.
struct Frames<'a> {
    /// The frame that the stack receives next.
    received: Option<&'a [u8]>,
    to_guest: &'a mut VecDeque<Vec<u8>>,
    metadata: &'a Metadata,
    mtu: u16,
}

impl Device for Frames<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Send<'a>
    where
        Self: 'a;

    fn receive(&mut self, time: StackInstant) -> Option<(Received<'_>, Send<'_>)> {
        // Without room for an answer, let the guest send it again.
        let frame = self.received.take()?;
        Some((Received(frame), self.transmit(time)?))
    }

    fn transmit(&mut self, _time: StackInstant) -> Option<Send<'_>> {
        (self.to_guest.len() < MAX_WAITING_FRAMES).then_some(Send {
            to_guest: self.to_guest,
            metadata: self.metadata,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_HEADER_SIZE + usize::from(self.mtu);
        // A guest that leaves checksums to its device does not send correct ones, and nothing on
        // the way can change a byte.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, process: F) -> R {
        process(self.0)
    }
}

struct Send<'a> {
    to_guest: &'a mut VecDeque<Vec<u8>>,
    metadata: &'a Metadata,
}

impl TxToken for Send<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, size: usize, fill: F) -> R {
        let mut frame = vec![0; size];
        let result = fill(&mut frame);
        self.to_guest.push_back(frame);
        self.metadata.metrics().tx_count.add(1);
        result
    }
}
