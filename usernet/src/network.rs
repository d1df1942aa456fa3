//! The network: what becomes of each frame of the guest, and where the next frame to the guest comes from.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use socket2::{Domain, Socket, Type};

use crate::addresses::{Addresses, Target};
use crate::dhcp::{self, Lease};
use crate::error::OpenError;
use crate::frame::{FrameBuffer, GuestFrame, WrittenFrame};
use crate::icmp::{EchoFlow, Unreachable, echo_identifier, echo_reply, unreachable};
use crate::options::{Forward, Protocol, UserNetworkOptions};
use crate::output::{Link, Output, Scratch};
use crate::resolver::{RESOLV_CONF, Resolver};
use crate::table::{Ends, Table};
use crate::tcp::{self, Budget, Fate, Produced, TcpFlow};
use crate::udp::{Received, UdpFlow};
use crate::wire::{
    self, ArpRequest, BROADCAST, ETHERNET_SIZE, ETHERTYPE_ARP, ETHERTYPE_IPV4, Ethernet, Ip,
    MAX_HEADERS_SIZE, Mac, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, Route, Tcp, UDP_SIZE, Udp,
};

/// Most connections, flows of UDP and flows of echoes of a guest. Each has a descriptor; a host that gives
/// few of these lowers the limits.
const MAX_TCP_FLOWS: usize = 4096;
const MAX_UDP_FLOWS: usize = 1024;
const MAX_ECHO_FLOWS: usize = 64;
/// Most answers of the network itself that wait for the guest; further ones are lost.
const MAX_REPLIES: usize = 64;
/// Most bytes of an echo, so that a flood of large ones does not fill memory.
const MAX_ECHO_SIZE: usize = 9000;
/// Most connections to a forwarded port that are accepted at once.
const MAX_ACCEPTED: usize = 16;
/// Connections to a forwarded port that wait to be accepted.
const BACKLOG: i32 = 128;
/// After this many frames without a pause, the host is asked for events all the same.
const FRAMES_PER_POLL: u32 = 32;
/// Most events that the host reports at once.
const EVENTS_PER_POLL: usize = 64;

/// How long a flow of echoes lives without requests (RFC 5508, section 3.2).
const ECHO_IDLE_TIME: Duration = Duration::from_secs(60);
/// How often flows are looked after while one waits for the guest, and while none does.
const FAST_TICK: Duration = Duration::from_millis(250);
const SLOW_TICK: Duration = Duration::from_secs(5);

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

/// Something that may have frames for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Tcp(usize),
    Udp(usize),
    Echo(usize),
    Listener(usize),
    Timer,
}

impl Source {
    /// Returns the number by which the host names the source.
    fn token(self) -> u64 {
        let (kind, index) = match self {
            Source::Timer => (0, 0),
            Source::Tcp(index) => (1, index),
            Source::Udp(index) => (2, index),
            Source::Echo(index) => (3, index),
            Source::Listener(index) => (4, index),
        };
        (index as u64) << 3 | kind
    }

    fn of_token(token: u64) -> Source {
        let index = (token >> 3) as usize;
        match token & 7 {
            1 => Source::Tcp(index),
            2 => Source::Udp(index),
            3 => Source::Echo(index),
            4 => Source::Listener(index),
            _ => Source::Timer,
        }
    }
}

/// The socket of a forwarded port.
enum ListenerSocket {
    Tcp(TcpListener),
    Udp(Arc<UdpSocket>),
}

/// A port of the host that leads to one of the guest.
struct Listener {
    socket: ListenerSocket,
    guest_port: u16,
    /// Whether the host has chosen the port.
    is_chosen: bool,
    is_queued: bool,
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

/// A running network for one guest.
///
/// Its owner passes it the guest's frames by [`UserNetwork::send`]. When [`UserNetwork::has_frames`], or its
/// descriptor becomes readable, it may have frames for the guest, until [`UserNetwork::receive`] has no more.
/// It does its work in these calls, none of which waits.
pub struct UserNetwork {
    addresses: Addresses,
    domain: Option<String>,
    hostname: Option<String>,
    link: Link,
    /// The guest's Ethernet address: where frames of no flow go.
    guest_mac: Mac,
    resolver: Resolver,
    epoll: Epoll,
    timer: TimerFd,
    /// How often the timer expires, if it does.
    tick: Option<Duration>,
    tcp: Table<TcpFlow>,
    udp: Table<UdpFlow>,
    echoes: Table<EchoFlow>,
    listeners: Vec<Listener>,
    budget: Budget,
    ready: VecDeque<Source>,
    replies: VecDeque<Vec<u8>>,
    scratch: Scratch,
    frames_since_poll: u32,
    warned_of_echoes: bool,
}

impl UserNetwork {
    /// Opens a network whose guest has the Ethernet address `guest_mac`, for IP packets of up to `mtu` bytes.
    ///
    /// # Errors
    /// If a port cannot be forwarded, or the host lacks something.
    pub fn open(
        options: &UserNetworkOptions,
        guest_mac: [u8; 6],
        mtu: u16,
    ) -> Result<UserNetwork, OpenError> {
        Self::open_with_resolver(options, guest_mac, mtu, Path::new(RESOLV_CONF))
    }

    pub(crate) fn open_with_resolver(
        options: &UserNetworkOptions,
        guest_mac: [u8; 6],
        mtu: u16,
        resolver: &Path,
    ) -> Result<UserNetwork, OpenError> {
        let addresses = Addresses::new(options);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io::Error::from)?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(io::Error::from)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, Source::Timer.token());
        epoll.add(&timer, event).map_err(io::Error::from)?;
        // Half of the descriptors that the process may have are left to others.
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let share = usize::try_from(descriptors / 8).unwrap_or(usize::MAX);
        let mut network = UserNetwork {
            addresses,
            domain: options.domain.as_ref().map(|name| name.as_str().to_owned()),
            hostname: options
                .hostname
                .as_ref()
                .map(|name| name.as_str().to_owned()),
            link: Link {
                mac: addresses.mac(),
                mtu,
                leaves_checksums: false,
            },
            guest_mac,
            resolver: Resolver::new(&options.dns, resolver),
            epoll,
            timer,
            tick: None,
            tcp: Table::new(MAX_TCP_FLOWS.min(share.saturating_mul(4))),
            udp: Table::new(MAX_UDP_FLOWS.min(share)),
            echoes: Table::new(MAX_ECHO_FLOWS),
            listeners: Vec::new(),
            budget: Budget::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            scratch: Scratch::default(),
            frames_since_poll: 0,
            warned_of_echoes: false,
        };
        let count = options.forwards.iter().map(Forward::port_count).sum();
        if count > Forward::MAX_PORTS {
            return Err(OpenError::TooManyForwards { count });
        }
        for forward in &options.forwards {
            for (address, guest_port) in forward.ports() {
                let protocol = forward.protocol();
                network
                    .listen(protocol, address, guest_port)
                    .map_err(|source| OpenError::Forward {
                        protocol,
                        address,
                        source,
                    })?;
            }
        }
        Ok(network)
    }

    fn listen(
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

    /// Sets whether checksums of frames to the guest may be left to its driver.
    pub fn leave_checksums(&mut self, leave: bool) {
        self.link.leaves_checksums = leave;
    }

    /// Forgets the guest: its connections are reset, and nothing waits for it any more. Ports stay open.
    pub fn reset(&mut self) {
        for index in self.tcp.indices() {
            self.close_tcp(index);
        }
        for index in self.udp.indices() {
            self.udp.remove(index);
        }
        for index in self.echoes.indices() {
            self.echoes.remove(index);
        }
        self.replies.clear();
        self.ready.clear();
        for listener in &mut self.listeners {
            listener.is_queued = false;
        }
        for index in 0..self.listeners.len() {
            self.queue(Source::Listener(index));
        }
    }

    /// Whether there may be frames for the guest without another event of the descriptor.
    pub fn has_frames(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

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
            ETHERTYPE_IPV4 => {
                let size = frame.size() - ETHERNET_SIZE;
                if let Some(ip) = Ip::read(payload, size).filter(|ip| ip.source.is_ipv4()) {
                    self.take_ip(&ethernet, &ip, payload, frame);
                }
            }
            _ => {}
        }
    }

    fn take_arp(&mut self, bytes: &[u8]) {
        let Some(request) = ArpRequest::read(bytes) else {
            return;
        };
        if self.addresses.is_own(request.target.into()) && request.sender_mac[0] & 1 == 0 {
            self.reply(request.reply(self.link.mac));
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
        if ip.protocol == PROTOCOL_UDP
            && let Some(udp) = Udp::read(transport, ip.payload_size)
            && udp.destination == dhcp::SERVER_PORT
            && udp.source == dhcp::CLIENT_PORT
        {
            self.take_dhcp(frame, offset + UDP_SIZE, udp.payload_size);
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
        let route = Route {
            source_mac: self.link.mac,
            destination_mac: ethernet.source,
            source: ip.destination,
            destination: ip.source,
        };
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
                if let Some(datagram) = Udp::read(transport, ip.payload_size) {
                    self.take_udp(&route, &datagram, offset + UDP_SIZE, frame);
                }
            }
            PROTOCOL_ICMP => self.take_icmp(&route, offset, ip.payload_size, frame),
            _ => {}
        }
    }

    fn take_dhcp(&mut self, frame: &mut dyn GuestFrame, offset: usize, size: usize) {
        let mut message = vec![0; size.min(dhcp::MAX_MESSAGE_SIZE)];
        frame.read_at(offset, &mut message);
        let subnet = self.addresses.subnet;
        let lease = Lease {
            address: subnet.guest(),
            mask: subnet.mask(),
            broadcast: subnet.broadcast(),
            gateway: subnet.gateway(),
            dns: self
                .addresses
                .is_own(subnet.dns().into())
                .then(|| subnet.dns()),
            mtu: self.link.mtu,
            domain: match &self.domain {
                Some(domain) => Some(domain),
                None => self.resolver.domain(),
            },
            hostname: self.hostname.as_deref(),
        };
        let Some(answer) = dhcp::answer(&message, &lease) else {
            return;
        };
        let route = Route {
            source_mac: self.link.mac,
            destination_mac: answer.mac.unwrap_or(BROADCAST),
            source: subnet.gateway().into(),
            destination: answer.destination.into(),
        };
        let ports = (dhcp::SERVER_PORT, dhcp::CLIENT_PORT);
        self.reply(Udp::frame(&route, ports.0, ports.1, &answer.message));
    }

    fn take_icmp(&mut self, route: &Route, offset: usize, size: usize, frame: &mut dyn GuestFrame) {
        if size > MAX_ECHO_SIZE {
            return;
        }
        let mut message = vec![0; size];
        frame.read_at(offset, &mut message);
        let Some(identifier) = echo_identifier(route.destination, &message) else {
            return;
        };
        if self.addresses.is_own(route.source) {
            self.reply(echo_reply(route, &mut message));
            return;
        }
        let now = Instant::now();
        let ends = Ends {
            guest: SocketAddr::new(route.destination, identifier),
            remote: SocketAddr::new(route.source, 0),
        };
        let index = match self.echoes.find(&ends) {
            Some(index) => index,
            None => match self.open_echo(route, ends, now) {
                Some(index) => index,
                None => return,
            },
        };
        if let Some(flow) = self.echoes.get(index) {
            flow.take(&message, now);
        }
        self.keep_time(false);
    }

    fn open_echo(&mut self, route: &Route, ends: Ends, now: Instant) -> Option<usize> {
        let Target::Remote(remote) = self.addresses.target(ends.remote) else {
            return None;
        };
        let flow = match EchoFlow::new(*route, ends.guest.port(), remote.ip(), now) {
            Ok(flow) => flow,
            Err(error) => {
                if error.kind() == ErrorKind::PermissionDenied && !self.warned_of_echoes {
                    self.warned_of_echoes = true;
                    tracing::warn!(
                        "the guest cannot ping other hosts, as this user may not; as root 'sysctl \
                         net.ipv4.ping_group_range=\"0 2147483647\"' allows it"
                    );
                }
                return None;
            }
        };
        if self.echoes.is_full() {
            let oldest = self.echoes.iter().min_by_key(|(_, flow)| flow.last_use);
            let oldest = oldest.map(|(index, _)| index);
            oldest.and_then(|index| self.echoes.remove(index));
        }
        let source = Source::Echo(self.echoes.next_index());
        self.watch(flow.as_fd(), source, EpollFlags::EPOLLIN).ok()?;
        Some(self.echoes.insert(ends, flow))
    }

    fn take_udp(
        &mut self,
        route: &Route,
        datagram: &Udp,
        offset: usize,
        frame: &mut dyn GuestFrame,
    ) {
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
            None => match self.open_udp(route, ends, now) {
                Some(index) => index,
                None => {
                    self.reply(unreachable(route, datagram, Unreachable::Forbidden));
                    return;
                }
            },
        };
        let place = (offset, datagram.payload_size);
        if let Some(flow) = self.udp.get(index) {
            flow.take(frame, place, &mut self.scratch.payload, now);
        }
        self.keep_time(false);
    }

    fn open_udp(&mut self, route: &Route, ends: Ends, now: Instant) -> Option<usize> {
        let (remote, is_query) = self.remote(ends.remote)?;
        let ports = [ends.remote.port(), ends.guest.port()];
        let flow = UdpFlow::outgoing(*route, ports, remote, is_query, now).ok()?;
        self.make_room_for_udp();
        let source = Source::Udp(self.udp.next_index());
        self.watch(flow.socket()?.as_fd(), source, EpollFlags::EPOLLIN)
            .ok()?;
        Some(self.udp.insert(ends, flow))
    }

    /// Returns the address that a packet of the guest to `destination` goes to, and whether that is a name
    /// server; or `None` if the guest may not reach it.
    fn remote(&mut self, destination: SocketAddr) -> Option<(SocketAddr, bool)> {
        match self.addresses.target(destination) {
            Target::Remote(remote) => Some((remote, false)),
            Target::NameServer => {
                let server = self.resolver.server();
                Some((SocketAddr::new(server, destination.port()), true))
            }
            Target::Refused => None,
        }
    }

    /// Ends the flow that has not been used for the longest time, if there is no room for another.
    fn make_room_for_udp(&mut self) {
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
        if opens
            && !segment.has(wire::tcp_flag::RST)
            && self.open_tcp(route, ends, segment, now).is_some()
        {
            self.keep_time(false);
            return;
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

    /// Opens a connection of the guest; `None` if it cannot be, which the guest is told by a reset.
    fn open_tcp(&mut self, route: &Route, ends: Ends, syn: &Tcp, now: Instant) -> Option<()> {
        if self.tcp.is_full() {
            return None;
        }
        let (remote, _) = self.remote(ends.remote)?;
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(remote), kind, None).ok()?;
        match socket.connect(&remote.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(_) => return None,
        }
        let flow = TcpFlow::outgoing(*route, TcpStream::from(socket), syn, random(), now);
        self.insert_tcp(ends, flow);
        Some(())
    }

    fn insert_tcp(&mut self, ends: Ends, flow: TcpFlow) {
        let source = Source::Tcp(self.tcp.next_index());
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP;
        match self.watch(flow.as_fd(), source, flags) {
            Ok(()) => {
                self.tcp.insert(ends, flow);
                self.queue(source);
            }
            Err(_) => flow.close(&mut self.budget),
        }
    }

    fn watch(&self, socket: BorrowedFd<'_>, source: Source, flags: EpollFlags) -> io::Result<()> {
        let event = EpollEvent::new(flags | EpollFlags::EPOLLET, source.token());
        Ok(self.epoll.add(socket, event)?)
    }

    fn close_tcp(&mut self, index: usize) {
        if let Some(flow) = self.tcp.remove(index) {
            flow.close(&mut self.budget);
        }
    }

    /// Adds a frame for the guest, unless it does not take those that it already has.
    fn reply(&mut self, frame: Vec<u8>) {
        if self.replies.len() < MAX_REPLIES {
            self.replies.push_back(frame);
        }
    }

    fn queue(&mut self, source: Source) {
        let is_new = match source {
            Source::Tcp(index) => self.tcp.queue(index),
            Source::Udp(index) => self.udp.queue(index),
            Source::Echo(index) => self.echoes.queue(index),
            Source::Listener(index) => match self.listeners.get_mut(index) {
                Some(listener) => !std::mem::replace(&mut listener.is_queued, true),
                None => false,
            },
            Source::Timer => false,
        };
        if is_new {
            self.ready.push_back(source);
        }
    }

    /// Writes the next frame for the guest to `buffer`, if there is one.
    pub fn receive(&mut self, buffer: &mut dyn FrameBuffer) -> Option<WrittenFrame> {
        let mut has_polled = false;
        loop {
            if let Some(reply) = self.replies.pop_front() {
                let mut output = Output {
                    link: &self.link,
                    buffer,
                    scratch: &mut self.scratch,
                };
                return Some(output.put(&reply));
            }
            if self.ready.is_empty() || self.frames_since_poll >= FRAMES_PER_POLL {
                if std::mem::replace(&mut has_polled, true) && self.ready.is_empty() {
                    return None;
                }
                self.poll();
            }
            let Some(source) = self.ready.pop_front() else {
                if self.replies.is_empty() {
                    return None;
                }
                continue;
            };
            if let Some(frame) = self.produce(source, buffer) {
                self.frames_since_poll += 1;
                return Some(frame);
            }
        }
    }

    /// Takes the host's events.
    fn poll(&mut self) {
        self.frames_since_poll = 0;
        let mut events = [EpollEvent::empty(); EVENTS_PER_POLL];
        // An interruption is of no consequence: the descriptor stays readable.
        let count = self
            .epoll
            .wait(&mut events, EpollTimeout::ZERO)
            .unwrap_or(0);
        for event in &events[..count] {
            let source = Source::of_token(event.data());
            match source {
                Source::Timer => self.take_tick(),
                Source::Tcp(index) => {
                    let flags = event.events();
                    let ended = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
                    let is_writable = flags.intersects(EpollFlags::EPOLLOUT | ended);
                    let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | ended;
                    let is_readable = flags.intersects(readable);
                    if let Some(flow) = self.tcp.get(index) {
                        flow.socket_event(is_writable, is_readable, &mut self.budget);
                        if flow.has_work() {
                            self.queue(source);
                        }
                    }
                }
                Source::Udp(_) | Source::Echo(_) | Source::Listener(_) => self.queue(source),
            }
        }
    }

    fn produce(&mut self, source: Source, buffer: &mut dyn FrameBuffer) -> Option<WrittenFrame> {
        let now = Instant::now();
        match source {
            Source::Tcp(index) => self.produce_tcp(index, buffer, now),
            Source::Udp(index) => self.produce_udp(index, buffer, now),
            Source::Echo(index) => {
                self.echoes.unqueue(index);
                let flow = self.echoes.get(index)?;
                let frame = flow.produce(&mut self.scratch.payload)?;
                self.queue(source);
                let mut output = Output {
                    link: &self.link,
                    buffer,
                    scratch: &mut self.scratch,
                };
                Some(output.put(&frame))
            }
            Source::Listener(index) => self.produce_listener(index, buffer, now),
            Source::Timer => None,
        }
    }

    fn produce_tcp(
        &mut self,
        index: usize,
        buffer: &mut dyn FrameBuffer,
        now: Instant,
    ) -> Option<WrittenFrame> {
        self.tcp.unqueue(index);
        let mut output = Output {
            link: &self.link,
            buffer,
            scratch: &mut self.scratch,
        };
        let flow = self.tcp.get(index)?;
        let produced = flow.produce(&mut output, now);
        let is_waiting = flow.is_waiting();
        let has_work = flow.has_work();
        match produced {
            Produced::Frame(frame) => {
                if has_work {
                    self.queue(Source::Tcp(index));
                }
                self.keep_time(is_waiting);
                Some(frame)
            }
            Produced::Last(frame) => {
                self.close_tcp(index);
                Some(frame)
            }
            Produced::Over => {
                self.close_tcp(index);
                None
            }
            Produced::Nothing => {
                self.keep_time(is_waiting);
                None
            }
        }
    }

    fn produce_udp(
        &mut self,
        index: usize,
        buffer: &mut dyn FrameBuffer,
        now: Instant,
    ) -> Option<WrittenFrame> {
        self.udp.unqueue(index);
        let mut output = Output {
            link: &self.link,
            buffer,
            scratch: &mut self.scratch,
        };
        let flow = self.udp.get(index)?;
        match flow.produce(&mut output, now) {
            Received::Frame(frame) => {
                self.queue(Source::Udp(index));
                Some(frame)
            }
            Received::Refused(datagram) => {
                let frame = unreachable(flow.route(), &datagram, Unreachable::Port);
                self.reply(frame);
                self.queue(Source::Udp(index));
                None
            }
            Received::Nothing => None,
        }
    }

    fn produce_listener(
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
                self.udp.get(flow)?.deliver(&mut output, size, now)
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
        let guest = SocketAddr::new(self.addresses.subnet.guest().into(), guest_port);
        let address = self.addresses.seen_by_guest(peer.ip());
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
                    let route = self.route_to_guest(address);
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
        let guest = SocketAddr::new(self.addresses.subnet.guest().into(), guest_port);
        let address = self.addresses.seen_by_guest(peer.ip());
        let free = ports_from(peer.port()).find(|&port| {
            let remote = SocketAddr::new(address, port);
            self.tcp.find(&Ends { guest, remote }).is_none()
        });
        let Some(port) = free else {
            return;
        };
        let route = self.route_to_guest(address);
        let flow = TcpFlow::incoming(route, socket, [port, guest_port], random(), now);
        let remote = SocketAddr::new(address, port);
        self.insert_tcp(Ends { guest, remote }, flow);
        self.keep_time(true);
    }

    fn route_to_guest(&self, source: IpAddr) -> Route {
        Route {
            source_mac: self.link.mac,
            destination_mac: self.guest_mac,
            source,
            destination: self.addresses.subnet.guest().into(),
        }
    }

    /// Has the timer expire often enough for flows, of which one `is_waiting` for the guest.
    fn keep_time(&mut self, is_waiting: bool) {
        let wanted = if is_waiting { FAST_TICK } else { SLOW_TICK };
        if self.tick.is_none_or(|tick| tick > wanted) {
            self.set_tick(Some(wanted));
        }
    }

    fn set_tick(&mut self, tick: Option<Duration>) {
        let done = match tick {
            Some(tick) => {
                let expiration = Expiration::Interval(TimeSpec::from_duration(tick));
                self.timer.set(expiration, TimerSetTimeFlags::empty())
            }
            None => self.timer.unset(),
        };
        // It does not fail for valid times; if it did, the next flow would set it again.
        self.tick = tick.filter(|_| done.is_ok());
    }

    /// Looks after all flows.
    fn take_tick(&mut self) {
        // Reading the timer makes it wait for its next expiry.
        let mut expiries = [0; 8];
        let _ = nix::unistd::read(&self.timer, &mut expiries);
        let now = Instant::now();
        let mut is_waiting = false;
        for index in self.tcp.indices() {
            let Some(flow) = self.tcp.get(index) else {
                continue;
            };
            let fate = flow.tick(now);
            is_waiting |= flow.is_waiting();
            if fate == Fate::Over {
                self.close_tcp(index);
            } else if flow.has_work() {
                self.queue(Source::Tcp(index));
            }
        }
        for index in self.udp.indices() {
            let Some(flow) = self.udp.get(index) else {
                continue;
            };
            if flow.is_idle(now) {
                let server = flow.silent_server(now);
                self.udp.remove(index);
                if let Some(server) = server {
                    self.resolver.give_up(server);
                }
            }
        }
        for index in self.echoes.indices() {
            let is_idle = |flow: &mut EchoFlow| now.duration_since(flow.last_use) >= ECHO_IDLE_TIME;
            if self.echoes.get(index).is_some_and(is_idle) {
                self.echoes.remove(index);
            }
        }
        for index in 0..self.listeners.len() {
            self.queue(Source::Listener(index));
        }
        let is_empty = self.tcp.is_empty() && self.udp.is_empty() && self.echoes.is_empty();
        self.set_tick(match (is_empty, is_waiting) {
            (true, _) => None,
            (false, true) => Some(FAST_TICK),
            (false, false) => Some(SLOW_TICK),
        });
    }
}

impl AsRawFd for UserNetwork {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

/// Returns ports to try: `first`, and then others that differ from it.
fn ports_from(first: u16) -> impl Iterator<Item = u16> {
    (0..64).map(move |number| match first.wrapping_add(number * 257) {
        0 => 1,
        port => port,
    })
}

/// Returns a number that the guest cannot guess. Without random numbers of the host, it is the time.
fn random() -> u32 {
    let mut bytes = [0; 4];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u32::from_ne_bytes(bytes),
        Err(_) => UNIX_EPOCH.elapsed().map_or(0, |time| time.subsec_nanos()),
    }
}
