//! Ports of the host that lead to the guest.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use socket2::{Domain, Socket, Type};

use super::{Source, UserNetwork, random};
use crate::frame::{FrameBuffer, WrittenFrame};
use crate::options::Protocol;
use crate::output::Output;
use crate::table::Ends;
use crate::tcp::TcpFlow;
use crate::udp::{Received, UdpFlow};
use crate::wire::Route;

/// Most connections to a forwarded port that are accepted at once.
const MAX_ACCEPTED: usize = 16;
/// Connections to a forwarded port that wait to be accepted.
const BACKLOG: i32 = 128;

impl fmt::Display for ForwardedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ForwardedPort {
            protocol,
            host,
            guest_port,
            ..
        } = self;
        write!(
            f,
            "{protocol} port {host} leads to port {guest_port} of the guest"
        )
    }
}

/// The socket of a forwarded port.
enum ListenerSocket {
    Tcp(TcpListener),
    Udp(Arc<UdpSocket>),
}

/// A port of the host that leads to one of the guest.
pub(super) struct Listener {
    socket: ListenerSocket,
    guest_port: u16,
    /// Whether the host has chosen the port.
    is_chosen: bool,
    pub(super) is_queued: bool,
}

/// A port of the host that leads to one of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardedPort {
    /// Its protocol.
    pub protocol: Protocol,
    /// The address and port of the host.
    pub host: SocketAddr,
    /// The port of the guest.
    pub guest_port: u16,
    /// Whether the host has chosen its port, as port 0 asks for.
    pub is_chosen: bool,
}

impl UserNetwork {
    pub(super) fn listen(
        &mut self,
        protocol: Protocol,
        address: SocketAddr,
        guest_port: u16,
    ) -> io::Result<()> {
        let domain = Domain::for_address(address);
        let kind = match protocol {
            Protocol::Tcp => Type::STREAM,
            Protocol::Udp => Type::DGRAM,
        };
        let socket = Socket::new(domain, kind.nonblocking().cloexec(), None)?;
        if protocol == Protocol::Tcp {
            // Connections of a machine that ran before do not keep the port.
            socket.set_reuse_address(true)?;
        }
        socket.bind(&address.into())?;
        let socket = match protocol {
            Protocol::Tcp => {
                socket.listen(BACKLOG)?;
                ListenerSocket::Tcp(socket.into())
            }
            Protocol::Udp => ListenerSocket::Udp(Arc::new(socket.into())),
        };
        let fd = match &socket {
            ListenerSocket::Tcp(socket) => socket.as_fd(),
            ListenerSocket::Udp(socket) => socket.as_fd(),
        };
        let source = Source::Listener(self.listeners.len());
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll.add(fd, EpollEvent::new(flags, source.token()))?;
        self.listeners.push(Listener {
            socket,
            guest_port,
            is_chosen: address.port() == 0,
            is_queued: false,
        });
        Ok(())
    }

    /// Returns the ports of the host that lead to the guest.
    ///
    /// # Errors
    /// If the host does not say what they are.
    pub fn forwarded_ports(&self) -> io::Result<Vec<ForwardedPort>> {
        let ports = self.listeners.iter().map(|listener| {
            let (protocol, host) = match &listener.socket {
                ListenerSocket::Tcp(socket) => (Protocol::Tcp, socket.local_addr()?),
                ListenerSocket::Udp(socket) => (Protocol::Udp, socket.local_addr()?),
            };
            Ok(ForwardedPort {
                protocol,
                host,
                guest_port: listener.guest_port,
                is_chosen: listener.is_chosen,
            })
        });
        ports.collect()
    }

    pub(super) fn produce_listener(
        &mut self,
        index: usize,
        buffer: &mut dyn FrameBuffer,
        now: Instant,
    ) -> Option<WrittenFrame> {
        let listener = self.listeners.get_mut(index)?;
        listener.is_queued = false;
        let guest_port = listener.guest_port;
        match &listener.socket {
            ListenerSocket::Tcp(_) => {
                self.accept(index, guest_port, now);
                None
            }
            ListenerSocket::Udp(socket) => {
                let socket = socket.clone();
                let bytes = &mut self.scratch.payload;
                bytes.resize(bytes.len().max(1 << 16), 0);
                let (size, peer) = socket.recv_from(bytes).ok()?;
                self.queue(Source::Listener(index));
                let flow = self.udp_of_peer(&socket, guest_port, peer, now)?;
                let mut output = Output {
                    link: &self.link,
                    buffer,
                    scratch: &mut self.scratch,
                };
                let packet_size = output.max_packet_size();
                match self.udp.get(flow)?.deliver(&mut output, size, now) {
                    Received::Frame(frame) => Some(frame),
                    Received::Large(frame, _) => {
                        self.reply_in_parts(&frame, packet_size);
                        None
                    }
                    _ => None,
                }
            }
        }
    }

    /// Returns the flow of datagrams that `peer` sends to a forwarded port.
    fn udp_of_peer(
        &mut self,
        socket: &Arc<UdpSocket>,
        guest_port: u16,
        peer: SocketAddr,
        now: Instant,
    ) -> Option<usize> {
        let (guest, address) = self.ends_for(peer.ip());
        let guest = SocketAddr::new(guest, guest_port);
        // Different peers are told apart by their ports, if they have the same address for the guest.
        for port in ports_from(peer.port()) {
            let ends = Ends {
                guest,
                remote: SocketAddr::new(address, port),
            };
            match self.udp.find(&ends) {
                Some(index) => {
                    if self.udp.get(index)?.forwarded_peer() == Some(peer) {
                        return Some(index);
                    }
                }
                None => {
                    let route = self.route_to_guest(guest.ip(), address);
                    let ports = [port, guest_port];
                    let flow = UdpFlow::incoming(route, ports, socket.clone(), peer, now);
                    self.make_room_for_udp();
                    let index = self.udp.insert(ends, flow);
                    self.keep_time(false);
                    return Some(index);
                }
            }
        }
        None
    }

    /// Accepts connections to a forwarded port.
    fn accept(&mut self, index: usize, guest_port: u16, now: Instant) {
        for _ in 0..MAX_ACCEPTED {
            let Some(Listener {
                socket: ListenerSocket::Tcp(listener),
                ..
            }) = self.listeners.get(index)
            else {
                return;
            };
            match listener.accept() {
                Ok((socket, peer)) => self.take_connection(socket, peer, guest_port, now),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::ConnectionAborted | ErrorKind::Interrupted => {}
                    _ => {
                        // There are no descriptors left; it is tried again at the next tick.
                        self.keep_time(false);
                        return;
                    }
                },
            }
        }
        self.queue(Source::Listener(index));
    }

    fn take_connection(
        &mut self,
        socket: TcpStream,
        peer: SocketAddr,
        guest_port: u16,
        now: Instant,
    ) {
        if self.tcp.is_full() || socket.set_nonblocking(true).is_err() {
            return;
        }
        let (guest, address) = self.ends_for(peer.ip());
        let guest = SocketAddr::new(guest, guest_port);
        let free = ports_from(peer.port()).find(|&port| {
            let remote = SocketAddr::new(address, port);
            self.tcp.find(&Ends { guest, remote }).is_none()
        });
        let Some(port) = free else {
            return;
        };
        let route = self.route_to_guest(guest.ip(), address);
        let flow = TcpFlow::incoming(route, socket, [port, guest_port], random(), now);
        let remote = SocketAddr::new(address, port);
        self.insert_tcp(Ends { guest, remote }, flow);
        self.keep_time(true);
    }

    /// Returns the guest's address for connections of `peer`, and the address under which the guest sees it.
    /// The guest is reached by IPv6 if the peer has used that, and the guest does.
    fn ends_for(&self, peer: IpAddr) -> (IpAddr, IpAddr) {
        let peer = peer.to_canonical();
        let guest = match self.guest_v6.filter(|_| peer.is_ipv6()) {
            Some(address) => address.into(),
            None => self.addresses.subnet.guest().into(),
        };
        (guest, self.addresses.seen_by_guest(peer, guest))
    }

    fn route_to_guest(&self, guest: IpAddr, source: IpAddr) -> Route {
        Route {
            source_mac: self.link.mac,
            destination_mac: self.guest_mac,
            source,
            destination: guest,
        }
    }
}

/// Returns ports to try: `first`, and then others that differ from it.
fn ports_from(first: u16) -> impl Iterator<Item = u16> {
    (0..64).map(move |number| match first.wrapping_add(number * 257) {
        0 => 1,
        port => port,
    })
}
