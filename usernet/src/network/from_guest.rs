//! What becomes of each frame of the guest.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use socket2::{Domain, SockRef, Socket, Type};

use super::{Refusal, Source, UserNetwork, random};
use crate::addresses::Target;
use crate::frame::GuestFrame;
use crate::icmp::{EchoFlow, Unreachable, echo_identifier, echo_reply, unreachable};
use crate::ndp::{self, Message};
use crate::options::Protocol;
use crate::table::Ends;
use crate::tcp::{self, Fate, TcpFlow};
use crate::udp::UdpFlow;
use crate::wire::{
    self, ETHERNET_SIZE, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Fragment, Ip,
    MAX_HEADERS_SIZE, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, Route, Tcp,
    UDP_SIZE, Udp,
};
use crate::{dhcp, dhcpv6};

/// Most bytes of an echo, so that a flood of large ones does not fill memory.
const MAX_ECHO_SIZE: usize = 9000;

impl UserNetwork {
    /// Takes a frame of the guest. One that cannot be passed on is dropped, as on any network.
    pub fn send(&mut self, frame: &mut dyn GuestFrame) {
        let mut headers = [0; MAX_HEADERS_SIZE];
        let size = frame.read_at(0, &mut headers);
        let headers = &headers[..size];
        let Some(ethernet) = Ethernet::read(headers) else {
            return;
        };
        let is_group = ethernet.destination[0] & 1 != 0;
        let is_station = ethernet.source[0] & 1 == 0;
        if !is_station || !is_group && ethernet.destination != self.link.mac {
            return;
        }
        let payload = &headers[ETHERNET_SIZE..];
        match ethernet.ethertype {
            ETHERTYPE_ARP => self.take_arp(payload),
            ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => {
                let is_v4 = ethernet.ethertype == ETHERTYPE_IPV4;
                let size = frame.size() - ETHERNET_SIZE;
                if let Some(ip) = Ip::read(payload, size)
                    && ip.source.is_ipv4() == is_v4
                {
                    self.take_ip(&ethernet, &ip, payload, frame);
                }
            }
            _ => {}
        }
    }

    fn take_ip(
        &mut self,
        ethernet: &Ethernet,
        ip: &Ip,
        headers: &[u8],
        frame: &mut dyn GuestFrame,
    ) {
        let Some(transport) = headers.get(ip.header_size..) else {
            return;
        };
        let offset = ETHERNET_SIZE + ip.header_size;
        let route = Route {
            source_mac: self.link.mac,
            destination_mac: ethernet.source,
            source: ip.destination,
            destination: ip.source,
        };
        let is_local =
            ip.fragment.is_none() && self.take_local(&route, ip, transport, offset, frame);
        if ip.source.is_ipv6() {
            self.hear_v6(ip.source);
        }
        if is_local {
            return;
        }
        let is_usable = |address: IpAddr| match address {
            IpAddr::V4(address) => !address.is_multicast() && !address.is_broadcast(),
            IpAddr::V6(address) => !address.is_multicast(),
        };
        if !self.addresses.is_of_guest(ip.source) || !is_usable(ip.destination) {
            return;
        }
        self.guest_mac = ethernet.source;
        if let Some(reason) = self.objection(ip) {
            self.reply(unreachable(&route, headers, reason));
            return;
        }
        if let Some(fragment) = ip.fragment {
            self.take_fragment(ethernet, ip, fragment, frame);
            return;
        }
        match ip.protocol {
            PROTOCOL_TCP => {
                if let Some(segment) = Tcp::read(transport)
                    && let Some(size) = ip.payload_size.checked_sub(segment.header_size)
                {
                    let place = (offset + segment.header_size, size);
                    self.take_tcp(&route, &segment, place, frame);
                }
            }
            PROTOCOL_UDP => {
                if let Some(datagram) = Udp::read(transport, ip.payload_size)
                    && let Err(reason) = self.take_udp(&route, &datagram, offset + UDP_SIZE, frame)
                {
                    self.reply(unreachable(&route, headers, reason));
                }
            }
            PROTOCOL_ICMP | PROTOCOL_ICMPV6 => {
                if let Err(reason) = self.take_icmp(&route, offset, ip.payload_size, frame) {
                    self.reply(unreachable(&route, headers, reason));
                }
            }
            _ => {
                let reason = Unreachable::Protocol(ip.protocol_offset as u32);
                self.reply(unreachable(&route, headers, reason));
            }
        }
    }

    /// Takes a packet with which the guest configures itself. `false` if it is none.
    fn take_local(
        &mut self,
        route: &Route,
        ip: &Ip,
        transport: &[u8],
        offset: usize,
        frame: &mut dyn GuestFrame,
    ) -> bool {
        match (ip.protocol, ip.source.is_ipv4()) {
            (PROTOCOL_UDP, is_v4) => {
                let Some(udp) = Udp::read(transport, ip.payload_size) else {
                    return false;
                };
                let place = (offset + UDP_SIZE, udp.payload_size);
                match (is_v4, udp.source, udp.destination) {
                    (true, dhcp::CLIENT_PORT, dhcp::SERVER_PORT) => {
                        self.take_dhcp(frame, place.0, place.1);
                        true
                    }
                    (false, _, dhcpv6::SERVER_PORT)
                        if ip.destination == dhcpv6::ALL_SERVERS
                            && self.addresses.is_of_guest(ip.source) =>
                    {
                        self.take_dhcpv6(route, frame, place.0, place.1);
                        true
                    }
                    _ => false,
                }
            }
            (PROTOCOL_ICMPV6, false) if ip.hop_limit == ndp::HOP_LIMIT => {
                let is_of_guest =
                    ip.source.is_unspecified() || self.addresses.is_of_guest(ip.source);
                let message = Message::read(transport).filter(|_| is_of_guest);
                message.is_some_and(|message| {
                    self.take_ndp(message, route);
                    true
                })
            }
            _ => false,
        }
    }

    /// Returns what is wrong with the addresses of a packet.
    fn objection(&self, ip: &Ip) -> Option<Unreachable> {
        if ip.fragment.is_some_and(|fragment| fragment.offset > 0) {
            // Only the first part is reported.
            return None;
        }
        let is_of_link = matches!(ip.source, IpAddr::V6(source) if source.is_unicast_link_local());
        if ip.has_source_route {
            Some(Unreachable::SourceRoute)
        } else if is_of_link && !self.addresses.is_own(ip.destination) {
            Some(Unreachable::Scope)
        } else {
            None
        }
    }

    fn take_fragment(
        &mut self,
        ethernet: &Ethernet,
        ip: &Ip,
        fragment: Fragment,
        frame: &mut dyn GuestFrame,
    ) {
        let mut bytes = vec![0; ip.payload_size];
        frame.read_at(ETHERNET_SIZE + ip.header_size, &mut bytes);
        let Some(payload) = self.reassembly.take(ip, fragment, &bytes, Instant::now()) else {
            return;
        };
        let mut whole = Vec::with_capacity(MAX_HEADERS_SIZE + payload.len());
        Route {
            source_mac: ethernet.source,
            destination_mac: ethernet.destination,
            source: ip.source,
            destination: ip.destination,
        }
        .write(&mut whole, ip.protocol, payload.len(), Some(ip.hop_limit));
        whole.extend(payload);
        let headers = whole[ETHERNET_SIZE..].to_vec();
        // What is a part of another packet again is not a packet.
        if let Some(ip) = Ip::read(&headers, headers.len())
            && ip.fragment.is_none()
        {
            self.take_ip(ethernet, &ip, &headers, &mut WholeFrame(whole));
        }
    }

    fn take_icmp(
        &mut self,
        route: &Route,
        offset: usize,
        size: usize,
        frame: &mut dyn GuestFrame,
    ) -> Result<(), Unreachable> {
        if size > MAX_ECHO_SIZE {
            return Ok(());
        }
        let mut message = vec![0; size];
        frame.read_at(offset, &mut message);
        let Some(identifier) = echo_identifier(route.destination, &message) else {
            return Ok(());
        };
        if self.addresses.is_own(route.source) {
            self.reply(echo_reply(route, &mut message));
            return Ok(());
        }
        let now = Instant::now();
        let ends = Ends {
            guest: SocketAddr::new(route.destination, identifier),
            remote: SocketAddr::new(route.source, 0),
        };
        let index = match self.echoes.find(&ends) {
            Some(index) => index,
            None => self.open_echo(route, ends, now)?,
        };
        let sent = self.echoes.get(index).map(|flow| flow.take(&message, now));
        self.keep_time(false);
        match sent {
            Some(Err(error)) => no_way(&error).map_or(Ok(()), Err),
            _ => Ok(()),
        }
    }

    fn open_echo(&mut self, route: &Route, ends: Ends, now: Instant) -> Result<usize, Unreachable> {
        let (remote, _) = self.remote(None, ends.remote, now)?;
        let flow = match EchoFlow::new(*route, ends.guest.port(), remote.ip(), now) {
            Ok(flow) => flow,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                if !std::mem::replace(&mut self.warned_of_echoes, true) {
                    tracing::warn!(
                        "the guest cannot ping other hosts, as this user may not; as root 'sysctl \
                         net.ipv4.ping_group_range=\"0 2147483647\"' allows it"
                    );
                }
                return Err(Unreachable::Forbidden);
            }
            Err(_) => return Err(Unreachable::Address),
        };
        if self.echoes.is_full() {
            let oldest = self.echoes.iter().min_by_key(|(_, flow)| flow.last_use);
            let oldest = oldest.map(|(index, _)| index);
            oldest.and_then(|index| self.echoes.remove(index));
        }
        let source = Source::Echo(self.echoes.next_index());
        match self.watch(flow.as_fd(), source, EpollFlags::EPOLLIN) {
            Ok(()) => Ok(self.echoes.insert(ends, flow)),
            Err(_) => Err(Unreachable::Address),
        }
    }

    fn take_udp(
        &mut self,
        route: &Route,
        datagram: &Udp,
        offset: usize,
        frame: &mut dyn GuestFrame,
    ) -> Result<(), Unreachable> {
        let now = Instant::now();
        let ends = Ends {
            guest: SocketAddr::new(route.destination, datagram.source),
            remote: SocketAddr::new(route.source, datagram.destination),
        };
        let mut found = self.udp.find(&ends);
        if let Some(index) = found
            && let Some(server) = self.udp.get(index).and_then(|flow| flow.silent_server(now))
        {
            // The guest asks again, and gets another server's answer.
            self.resolver.give_up(server);
            self.udp.remove(index);
            found = None;
        }
        let index = match found {
            Some(index) => index,
            None => self.open_udp(route, ends, now)?,
        };
        let place = (offset, datagram.payload_size);
        if let Some(flow) = self.udp.get(index) {
            flow.take(
                frame,
                place,
                &mut self.batch,
                &mut self.scratch.payload,
                now,
            );
        }
        self.keep_time(false);
        Ok(())
    }

    fn open_udp(&mut self, route: &Route, ends: Ends, now: Instant) -> Result<usize, Unreachable> {
        let (remote, is_query) = self.remote(Some(Protocol::Udp), ends.remote, now)?;
        let ports = [ends.remote.port(), ends.guest.port()];
        let mut flow = UdpFlow::outgoing(*route, ports, remote, is_query, now)
            .map_err(|_| Unreachable::Address)?;
        if self.policy.needs_answers() {
            flow.inspect();
        }
        self.make_room_for_udp();
        let source = Source::Udp(self.udp.next_index());
        let socket = flow.socket().ok_or(Unreachable::Address)?;
        match self.watch(socket.as_fd(), source, EpollFlags::EPOLLIN) {
            Ok(()) => Ok(self.udp.insert(ends, flow)),
            Err(_) => Err(Unreachable::Address),
        }
    }

    /// Returns the address that a packet of the guest to `destination` goes to, and whether that is a name
    /// server; or why the guest does not reach it. Without a protocol, it has no port.
    fn remote(
        &mut self,
        protocol: Option<Protocol>,
        destination: SocketAddr,
        now: Instant,
    ) -> Result<(SocketAddr, bool), Unreachable> {
        let port = protocol.map(|_| destination.port());
        match self.addresses.target(destination) {
            Target::Remote(remote) if self.policy.permits(destination.ip(), port, now) => {
                Ok((remote, false))
            }
            Target::NameServer => {
                let server = self.resolver.server();
                Ok((SocketAddr::new(server, destination.port()), true))
            }
            Target::Nobody => Err(Unreachable::Address),
            Target::Remote(_) | Target::Forbidden => {
                if let Some(observer) = &mut self.observer {
                    observer(&Refusal {
                        protocol,
                        destination,
                    });
                }
                Err(Unreachable::Forbidden)
            }
        }
    }

    /// Ends the flow that has not been used for the longest time, if there is no room for another.
    pub(super) fn make_room_for_udp(&mut self) {
        if self.udp.is_full() {
            let oldest = self.udp.iter().min_by_key(|(_, flow)| flow.last_use());
            let oldest = oldest.map(|(index, _)| index);
            oldest.and_then(|index| self.udp.remove(index));
        }
    }

    fn take_tcp(
        &mut self,
        route: &Route,
        segment: &Tcp,
        place: (usize, usize),
        frame: &mut dyn GuestFrame,
    ) {
        let now = Instant::now();
        let ends = Ends {
            guest: SocketAddr::new(route.destination, segment.source),
            remote: SocketAddr::new(route.source, segment.destination),
        };
        if let Some(index) = self.tcp.find(&ends)
            && let Some(flow) = self.tcp.get(index)
        {
            let fate = flow.take(segment, frame, place, &mut self.budget, now);
            let has_work = flow.has_work();
            match fate {
                Fate::Lives if has_work => self.queue(Source::Tcp(index)),
                Fate::Lives => {}
                Fate::Over | Fate::Reopened => self.close_tcp(index),
            }
            if fate != Fate::Reopened {
                return;
            }
        }
        let opens =
            segment.flags & (wire::tcp_flag::SYN | wire::tcp_flag::ACK) == wire::tcp_flag::SYN;
        if opens && !segment.has(wire::tcp_flag::RST) {
            match self.open_tcp(route, ends, segment, now) {
                Opening::Begun => return self.keep_time(false),
                Opening::Later => return,
                Opening::Refused => {}
            }
        }
        if let Some(answer) = tcp::reset(segment, place.1) {
            let mut headers = Vec::new();
            route.write(&mut headers, PROTOCOL_TCP, answer.written_size(), None);
            let start = headers.len();
            answer.write(&mut headers);
            let total = route.pseudo_sum(PROTOCOL_TCP, headers.len() - start)
                + wire::sum(&headers[start..]);
            wire::put16(
                &mut headers,
                start + Tcp::CHECKSUM_OFFSET,
                !wire::fold(total),
            );
            self.reply(headers);
        }
    }

    fn open_tcp(&mut self, route: &Route, ends: Ends, syn: &Tcp, now: Instant) -> Opening {
        let Ok((remote, is_query)) = self.remote(Some(Protocol::Tcp), ends.remote, now) else {
            return Opening::Refused;
        };
        if !self.make_room_for_tcp(now) {
            if let Some(observer) = &mut self.delay_observer {
                observer(self.tcp.limit());
            }
            return Opening::Later;
        }
        let Ok(socket) = begin_to_connect(remote) else {
            return Opening::Refused;
        };
        let mut flow = TcpFlow::outgoing(*route, socket, syn, random(), now);
        if is_query && self.policy.needs_answers() {
            flow.inspect();
        }
        self.insert_tcp(ends, flow);
        Opening::Begun
    }

    /// Ends the connection that has waited to be opened for the longest time, if there is no room for another
    /// and it has had time enough. Returns whether there is room.
    fn make_room_for_tcp(&mut self, now: Instant) -> bool {
        if !self.tcp.is_full() {
            return true;
        }
        // A guest that floods the network does not have all connections looked at for each of its attempts.
        if self.tcp_is_full_until.is_some_and(|end| now < end) {
            return false;
        }
        let waiting = self.tcp.iter();
        let waiting = waiting.filter_map(|(index, flow)| Some((flow.gives_way_at()?, index)));
        match waiting.min() {
            Some((time, index)) if time <= now => {
                self.close_tcp(index);
                true
            }
            first => {
                // Those that are opened later give way later.
                let latest = now + tcp::OPENING_TIME;
                self.tcp_is_full_until = Some(first.map_or(latest, |(time, _)| time));
                false
            }
        }
    }
}

/// What has become of an attempt to open a connection.
enum Opening {
    Begun,
    /// The guest is told that it cannot be.
    Refused,
    /// There are too many. The guest is told nothing, so that it tries again after some time.
    Later,
}

fn begin_to_connect(remote: SocketAddr) -> io::Result<TcpStream> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(remote), kind, None)?;
    match socket.connect(&remote.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    Ok(socket.into())
}

/// A packet that was put together from its parts.
struct WholeFrame(Vec<u8>);

impl GuestFrame for WholeFrame {
    fn size(&self) -> usize {
        self.0.len()
    }

    fn read_at(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let rest = self.0.get(offset..).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        count
    }

    fn send_at(&mut self, offset: usize, size: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let rest = self.0.get(offset..).unwrap_or_default();
        let bytes = &rest[..size.min(rest.len())];
        SockRef::from(&socket).send_with_flags(bytes, libc::MSG_NOSIGNAL)
    }
}

/// Returns what the guest is told if an attempt to send has failed with `error`; nothing if another attempt may
/// succeed.
fn no_way(error: &io::Error) -> Option<Unreachable> {
    matches!(
        error.kind(),
        ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable | ErrorKind::AddrNotAvailable
    )
    .then_some(Unreachable::Address)
}
