//! Messages of ICMP: echoes, and reports that something cannot be reached.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use socket2::{Domain, Protocol, Socket, Type};

use crate::wire::{ETHERNET_SIZE, ICMP_SIZE, Route, Udp, icmp_frame, number16, put16};

const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Where an echo has its identifier.
const IDENTIFIER_OFFSET: usize = 4;

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

/// Why a datagram was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreachable {
    /// Nobody listens on the port.
    Port,
    /// The network's rules forbid it.
    Forbidden,
}

/// Reports to the guest that a UDP datagram could not be delivered. `route` is that of an answer.
pub(crate) fn unreachable(route: &Route, datagram: &Udp, reason: Unreachable) -> Vec<u8> {
    let (kind, code) = match (route.destination, reason) {
        (IpAddr::V4(_), Unreachable::Port) => (3, 3),
        (IpAddr::V4(_), Unreachable::Forbidden) => (3, 13),
        (IpAddr::V6(_), Unreachable::Port) => (1, 4),
        (IpAddr::V6(_), Unreachable::Forbidden) => (1, 1),
    };
    // The headers of the datagram follow, by which the guest finds the socket that is concerned.
    let sent = Route {
        source: route.destination,
        destination: route.source,
        ..*route
    };
    let mut headers = Vec::new();
    let size = crate::wire::UDP_SIZE + datagram.payload_size;
    sent.write(&mut headers, crate::wire::PROTOCOL_UDP, size, None);
    datagram.write(&mut headers);
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend(&headers[ETHERNET_SIZE..]);
    icmp_frame(route, &message, None)
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
    pub(crate) fn take(&mut self, request: &[u8], now: Instant) {
        self.last_use = now;
        // A request that the host cannot send is lost, as on any network.
        let _ = self.socket.send(request);
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
