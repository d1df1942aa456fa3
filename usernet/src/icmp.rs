//! Messages of ICMP: echoes, and reports that something cannot be reached.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use socket2::{Domain, Protocol, Socket, Type};

use crate::wire::{
    ETHERNET_SIZE, ICMP_SIZE, PROTOCOL_UDP, Route, UDP_SIZE, Udp, icmp_frame, number16, put16,
};

const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Where an echo has its identifier.
const IDENTIFIER_OFFSET: usize = 4;

/// Most bytes of a packet that a report about it has: all headers, without options that nobody uses.
const MAX_QUOTED_SIZE: usize = 128;

/// Returns the identifier of `message` if it is a request for an echo of an address like `address`.
pub(crate) fn echo_identifier(address: IpAddr, message: &[u8]) -> Option<u16> {
    let request = match address {
        IpAddr::V4(_) => ECHO_REQUEST_V4,
        IpAddr::V6(_) => ECHO_REQUEST_V6,
    };
    (message.len() >= ICMP_SIZE && message[..2] == [request, 0])
        .then(|| number16(message, IDENTIFIER_OFFSET))
        .flatten()
}

/// Answers a request for an echo in the name of its destination.
pub(crate) fn echo_reply(route: &Route, request: &mut [u8]) -> Vec<u8> {
    if let Some(kind) = request.first_mut() {
        *kind = match route.destination {
            IpAddr::V4(_) => ECHO_REPLY_V4,
            IpAddr::V6(_) => ECHO_REPLY_V6,
        };
    }
    icmp_frame(route, request, None)
}

/// Why a packet of the guest was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreachable {
    /// The host has no way to the address, or nobody has it.
    Address,
    /// Nobody listens on the port.
    Port,
    /// The network's rules forbid it.
    Forbidden,
    /// Its source is an address of the link, but not its destination.
    Scope,
    /// The sender gives the way.
    SourceRoute,
    /// The way takes packets of at most this many bytes.
    TooLarge(u32),
    /// The protocol that is named at this offset of the packet is not known.
    Protocol(u32),
}

impl Unreachable {
    /// Returns the first bytes of the message to `address`: kind, code, an empty checksum, and what the kind
    /// has besides (RFC 792, RFC 1191, RFC 4443).
    fn start(self, address: IpAddr) -> [u8; ICMP_SIZE] {
        let (kind, code, value) = match (address, self) {
            (IpAddr::V4(_), Unreachable::Address | Unreachable::Scope) => (3, 1, 0),
            (IpAddr::V4(_), Unreachable::Port) => (3, 3, 0),
            (IpAddr::V4(_), Unreachable::Forbidden) => (3, 13, 0),
            (IpAddr::V4(_), Unreachable::SourceRoute) => (3, 5, 0),
            (IpAddr::V4(_), Unreachable::Protocol(_)) => (3, 2, 0),
            (IpAddr::V4(_), Unreachable::TooLarge(mtu)) => (3, 4, mtu.min(u16::MAX.into())),
            (IpAddr::V6(_), Unreachable::Address) => (1, 0, 0),
            (IpAddr::V6(_), Unreachable::Port) => (1, 4, 0),
            (IpAddr::V6(_), Unreachable::Forbidden) => (1, 1, 0),
            (IpAddr::V6(_), Unreachable::Scope) => (1, 2, 0),
            (IpAddr::V6(_), Unreachable::SourceRoute) => (1, 7, 0),
            (IpAddr::V6(_), Unreachable::Protocol(offset)) => (4, 1, offset),
            (IpAddr::V6(_), Unreachable::TooLarge(mtu)) => (2, 0, mtu),
        };
        let [a, b, c, d] = value.to_be_bytes();
        [kind, code, 0, 0, a, b, c, d]
    }
}

/// Reports to the guest that a packet, of which `packet` has the start, could not be delivered. `route` is that
/// of an answer.
pub(crate) fn unreachable(route: &Route, packet: &[u8], reason: Unreachable) -> Vec<u8> {
    let mut message = reason.start(route.destination).to_vec();
    // By the headers of the packet the guest finds the socket that is concerned.
    message.extend(packet.iter().take(MAX_QUOTED_SIZE));
    icmp_frame(route, &message, None)
}

/// Reports to the guest that a datagram, of which there is only the header, could not be delivered. `route` is that of an
/// answer.
pub(crate) fn undelivered(route: &Route, datagram: &Udp, reason: Unreachable) -> Vec<u8> {
    let sent = Route {
        source: route.destination,
        destination: route.source,
        ..*route
    };
    let mut headers = Vec::new();
    let size = UDP_SIZE + datagram.payload_size;
    sent.write(&mut headers, PROTOCOL_UDP, size, None);
    datagram.write(&mut headers);
    unreachable(route, &headers[ETHERNET_SIZE..], reason)
}

/// Echoes between an identifier of the guest and one other address.
pub(crate) struct EchoFlow {
    route: Route,
    identifier: u16,
    socket: Socket,
    pub(crate) last_use: Instant,
}

impl EchoFlow {
    /// # Errors
    /// If the host does not let this user send echoes, or has no route to `remote`.
    pub(crate) fn new(
        route: Route,
        identifier: u16,
        remote: IpAddr,
        now: Instant,
    ) -> io::Result<EchoFlow> {
        let (domain, protocol) = match remote {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(protocol))?;
        socket.connect(&SocketAddr::new(remote, 0).into())?;
        Ok(EchoFlow {
            route,
            identifier,
            socket,
            last_use: now,
        })
    }

    /// Sends a request on.
    ///
    /// # Errors
    /// If the host cannot send it; it is lost then, as on any network.
    pub(crate) fn take(&mut self, request: &[u8], now: Instant) -> io::Result<()> {
        self.last_use = now;
        self.socket.send(request).map(drop)
    }

    /// Returns the frame of the next answer, if there is one.
    pub(crate) fn produce(&mut self, scratch: &mut Vec<u8>) -> Option<Vec<u8>> {
        scratch.resize(scratch.len().max(1 << 16), 0);
        let size = (&self.socket).read(scratch).ok()?;
        let answer = &mut scratch[..size];
        // The host has an identifier of its own.
        put16(answer, IDENTIFIER_OFFSET, self.identifier);
        Some(icmp_frame(&self.route, answer, None))
    }
}

impl AsFd for EchoFlow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
