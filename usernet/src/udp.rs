//! UDP between a port of the guest and one other port.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::batch::Batch;
use crate::frame::{GuestFrame, WrittenFrame};
use crate::icmp::Unreachable;
use crate::output::{Output, Payload};
use crate::sys;
use crate::wire::{PROTOCOL_UDP, Route, UDP_SIZE, Udp};

/// How long a flow lives without datagrams (RFC 4787, section 4.3).
const IDLE_TIME: Duration = Duration::from_secs(180);
/// How long a query to a name server waits for its answer.
const QUERY_TIME: Duration = Duration::from_secs(15);

/// How long a name server may take before it is considered silent. Resolvers ask again after 2 seconds at least.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// Most datagrams and reports that are passed over at once.
const MAX_REPORTS: usize = 16;

/// What [`UdpFlow::produce`] has done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A datagram is written, and there may be more.
    Frame(WrittenFrame),
    /// The same, and the datagram, whose payload of this size is at the start of the scratch memory, is an answer
    /// that matters.
    Answer(WrittenFrame, usize),
    /// A datagram that does not fit into one packet: the frame that it would be in, and whether it is such an answer, whose
    /// payload of this size is at the start of the scratch memory.
    Large(Vec<u8>, Option<usize>),
    /// A datagram of the guest with this header was not delivered.
    Undelivered(Udp, Unreachable),
    /// There is nothing now.
    Nothing,
}

/// Where the datagrams of a flow go.
enum Socket {
    /// A socket that is connected to the other end.
    Own(Arc<UdpSocket>),
    /// The socket of a forwarded port, and the other end.
    Forwarded(Arc<UdpSocket>, SocketAddr),
}

/// One flow.
pub(crate) struct UdpFlow {
    route: Route,
    /// The ports of datagrams to the guest.
    source: u16,
    destination: u16,
    socket: Socket,
    /// The name server to which queries go, as long as it has not answered.
    unanswered: Option<IpAddr>,
    /// The name server to which all queries go, if it is one.
    server: Option<IpAddr>,
    /// Whether what the name server answers matters to the network.
    is_inspected: bool,
    last_use: Instant,
}

impl UdpFlow {
    /// Makes a flow that the guest begins, to `remote`; with `is_query`, that is a name server.
    ///
    /// # Errors
    /// If the host has no route to it, or no more sockets.
    pub(crate) fn outgoing(
        route: Route,
        ports: [u16; 2],
        remote: SocketAddr,
        is_query: bool,
        now: Instant,
    ) -> io::Result<UdpFlow> {
        let any: IpAddr = match remote {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.set_nonblocking(true)?;
        socket.connect(remote)?;
        let mut flow = UdpFlow::new(route, ports, Socket::Own(socket.into()), now);
        flow.server = is_query.then(|| remote.ip());
        Ok(flow)
    }

    /// Makes a flow that `remote` has begun by a datagram to a forwarded port.
    pub(crate) fn incoming(
        route: Route,
        ports: [u16; 2],
        socket: Arc<UdpSocket>,
        remote: SocketAddr,
        now: Instant,
    ) -> UdpFlow {
        UdpFlow::new(route, ports, Socket::Forwarded(socket, remote), now)
    }

    fn new(route: Route, [source, destination]: [u16; 2], socket: Socket, now: Instant) -> UdpFlow {
        UdpFlow {
            route,
            source,
            destination,
            socket,
            unanswered: None,
            server: None,
            is_inspected: false,
            last_use: now,
        }
    }

    /// Has [`UdpFlow::produce`] report answers of the name server.
    pub(crate) fn inspect(&mut self) {
        self.is_inspected = self.server.is_some();
    }

    /// The socket of a flow that has one of its own.
    pub(crate) fn socket(&self) -> Option<&UdpSocket> {
        match &self.socket {
            Socket::Own(socket) => Some(socket.as_ref()),
            Socket::Forwarded(..) => None,
        }
    }

    pub(crate) fn last_use(&self) -> Instant {
        self.last_use
    }

    pub(crate) fn is_idle(&self, now: Instant) -> bool {
        let limit = if self.server.is_some() {
            QUERY_TIME
        } else {
            IDLE_TIME
        };
        now.duration_since(self.last_use) >= limit
    }

    /// The other end, if the flow is that of a forwarded port.
    pub(crate) fn forwarded_peer(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Own(_) => None,
            Socket::Forwarded(_, remote) => Some(*remote),
        }
    }

    /// Returns the name server that has had time to answer the last query, and has not, if there is one.
    pub(crate) fn silent_server(&self, now: Instant) -> Option<IpAddr> {
        // Two queries may follow each other at once, for addresses of both versions.
        let had_time = now.duration_since(self.last_use) >= ANSWER_TIME;
        self.unanswered.filter(|_| had_time)
    }

    /// Sends a datagram of the guest, whose payload of `size` bytes is at `offset` in `frame`, on, or adds it to
    /// `batch`. One that the host cannot send now is lost, as on any network.
    pub(crate) fn take(
        &mut self,
        frame: &mut dyn GuestFrame,
        (offset, size): (usize, usize),
        batch: &mut Batch,
        scratch: &mut Vec<u8>,
        now: Instant,
    ) {
        self.last_use = now;
        match &self.socket {
            Socket::Own(socket) => {
                if Batch::SIZES.contains(&size) {
                    batch.add(socket, frame, (offset, size));
                } else {
                    batch.send();
                    let mut send = || frame.send_at(offset, size, socket.as_fd());
                    if send().is_err_and(|error| may_be_of_another(&error)) {
                        let _ = send();
                    }
                }
                if self.server.is_some() {
                    self.unanswered = self.server;
                }
            }
            Socket::Forwarded(socket, remote) => {
                scratch.resize(scratch.len().max(size), 0);
                frame.read_at(offset, &mut scratch[..size]);
                let _ = socket.send_to(&scratch[..size], remote);
            }
        }
    }

    /// Writes the next datagram for the guest, if the flow has a socket of its own.
    pub(crate) fn produce(&mut self, output: &mut Output<'_>, now: Instant) -> Received {
        let Socket::Own(socket) = &self.socket else {
            return Received::Nothing;
        };
        let headers_size = self.route.headers_size() + UDP_SIZE;
        let room = output.room(headers_size);
        for _ in 0..MAX_REPORTS {
            let bytes = &mut output.scratch.payload;
            bytes.resize(bytes.len().max(1 << 16), 0);
            let (received, in_buffer) = if output.link.leaves_checksums && !self.is_inspected {
                let (socket, rest) = (socket.as_fd(), &mut bytes[room..]);
                let flags = libc::MSG_DONTWAIT;
                let received = output
                    .buffer
                    .receive_at(headers_size, room, rest, socket, flags);
                (received, true)
            } else {
                (socket.recv(bytes), false)
            };
            match received {
                Ok(size) if size > room => {
                    if in_buffer {
                        // Its end is in its place already.
                        output.buffer.read_back(headers_size, &mut bytes[..room]);
                    }
                    self.unanswered = None;
                    self.last_use = now;
                    let answer = self.is_inspected.then_some(size);
                    return Received::Large(self.whole(output, size), answer);
                }
                Ok(size) => {
                    self.unanswered = None;
                    self.last_use = now;
                    let payload = match in_buffer {
                        true => Payload::InBuffer(size),
                        false => Payload::InScratch(size),
                    };
                    let frame = self.finish(output, payload);
                    return match self.is_inspected {
                        true => Received::Answer(frame, size),
                        false => Received::Frame(frame),
                    };
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Received::Nothing,
                Err(error) => {
                    // Other reports do not say anything for sure.
                    if let Some(reason) = report(&error, socket) {
                        let datagram = Udp {
                            source: self.destination,
                            destination: self.source,
                            payload_size: 0,
                        };
                        return Received::Undelivered(datagram, reason);
                    }
                }
            }
        }
        Received::Nothing
    }

    /// Writes a datagram that has come on a forwarded port, and is at the start of the scratch memory.
    pub(crate) fn deliver(
        &mut self,
        output: &mut Output<'_>,
        size: usize,
        now: Instant,
    ) -> Received {
        self.last_use = now;
        let headers_size = self.route.headers_size() + UDP_SIZE;
        match size <= output.room(headers_size) {
            true => Received::Frame(self.finish(output, Payload::InScratch(size))),
            false => Received::Large(self.whole(output, size), None),
        }
    }

    fn finish(&self, output: &mut Output<'_>, payload: Payload) -> WrittenFrame {
        let (Payload::InBuffer(size) | Payload::InScratch(size)) = payload;
        self.write_headers(output, size);
        output.finish(&self.route, PROTOCOL_UDP, Udp::CHECKSUM_OFFSET, payload)
    }

    fn whole(&self, output: &mut Output<'_>, size: usize) -> Vec<u8> {
        self.write_headers(output, size);
        output.whole(&self.route, PROTOCOL_UDP, Udp::CHECKSUM_OFFSET, size)
    }

    fn write_headers(&self, output: &mut Output<'_>, size: usize) {
        let headers = &mut output.scratch.headers;
        self.route
            .write(headers, PROTOCOL_UDP, UDP_SIZE + size, None);
        Udp {
            source: self.source,
            destination: self.destination,
            payload_size: size,
        }
        .write(headers);
    }

    pub(crate) fn route(&self) -> &Route {
        &self.route
    }
}

/// Whether a datagram that was not sent because of `error` may be sent by another attempt, as the error can be the
/// fate of an earlier one.
pub(crate) fn may_be_of_another(error: &io::Error) -> bool {
    error.kind() != ErrorKind::WouldBlock
}

/// Returns what the guest is told if a datagram to the other end of `socket` has met with `error`.
fn report(error: &io::Error, socket: &UdpSocket) -> Option<Unreachable> {
    if error.kind() == ErrorKind::ConnectionRefused {
        return Some(Unreachable::Port);
    }
    // The host has learnt that the way takes smaller packets only. From now on it sends fragments.
    let is_too_large = error.raw_os_error() == Some(libc::EMSGSIZE);
    let mtu = sys::path_mtu(socket).filter(|_| is_too_large);
    mtu.map(Unreachable::TooLarge)
}
