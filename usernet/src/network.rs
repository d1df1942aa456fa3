//! The network as a whole: what it consists of, and which of its parts have something for the guest.

mod configuration;
mod from_guest;
mod ports;
mod time;
mod to_guest;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant, UNIX_EPOCH};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use crate::addresses::Addresses;
use crate::batch::Batch;
use crate::error::OpenError;
use crate::icmp::EchoFlow;
use crate::options::{Forward, Protocol, UserNetworkOptions};
use crate::output::{Link, Scratch};
use crate::policy::Policy;
use crate::reassembly::Reassembly;
use crate::resolver::{RESOLV_CONF, Resolver};
use crate::rule::Rule;
use crate::table::{Ends, Table};
use crate::tcp::{Budget, TcpFlow};
use crate::udp::UdpFlow;
use crate::wire::{Mac, split};

pub use ports::ForwardedPort;
use ports::Listener;

/// Most connections, flows of UDP and flows of echoes of a guest. Each has a descriptor; a host that gives
/// few of these lowers the limits.
const MAX_TCP_FLOWS: usize = 4096;
const MAX_UDP_FLOWS: usize = 1024;
const MAX_ECHO_FLOWS: usize = 64;
/// Most answers of the network itself that wait for the guest; further ones are lost.
const MAX_REPLIES: usize = 64;

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

/// Something that the guest wanted to reach, and may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The protocol; `None` for a ping.
    pub protocol: Option<Protocol>,
    /// The address that the guest has used; the port of a ping is zero.
    pub destination: SocketAddr,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Some(protocol) => write!(f, "{protocol} port {}", self.destination),
            None => write!(f, "{} by ping", self.destination.ip()),
        }
    }
}

/// What is called for each [`Refusal`].
type Observer = Box<dyn FnMut(&Refusal) + Send>;
/// What is called, with the most connections that there can be, for each one that is put off.
type DelayObserver = Box<dyn FnMut(usize) + Send>;

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
    /// The address of IPv6 that the guest has used last.
    guest_v6: Option<Ipv6Addr>,
    /// When the guest was last told of the network without asking, or first when it asked.
    advertised: Option<Instant>,
    resolver: Resolver,
    policy: Policy,
    observer: Option<Observer>,
    delay_observer: Option<DelayObserver>,
    reassembly: Reassembly,
    epoll: Epoll,
    timer: TimerFd,
    /// How often the timer expires, if it does.
    tick: Option<Duration>,
    tcp: Table<TcpFlow>,
    /// No connection gives way to another before this time.
    tcp_is_full_until: Option<Instant>,
    udp: Table<UdpFlow>,
    echoes: Table<EchoFlow>,
    listeners: Vec<Listener>,
    budget: Budget,
    batch: Batch,
    ready: VecDeque<Source>,
    replies: VecDeque<Vec<u8>>,
    /// Frames with the parts of one packet, which go before all others.
    parts: VecDeque<Vec<u8>>,
    /// By what the parts of the next such packet are known.
    identification: u32,
    scratch: Scratch,
    frames_since_poll: u32,
    /// Whether the last call for a frame has returned one.
    is_receiving: bool,
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
            guest_v6: None,
            advertised: None,
            policy: Policy::new(&options.allow, &options.deny),
            observer: None,
            delay_observer: None,
            reassembly: Reassembly::default(),
            resolver: Resolver::new(&options.dns, resolver),
            epoll,
            timer,
            tick: None,
            tcp: Table::new(MAX_TCP_FLOWS.min(share.saturating_mul(4))),
            tcp_is_full_until: None,
            udp: Table::new(MAX_UDP_FLOWS.min(share)),
            echoes: Table::new(MAX_ECHO_FLOWS),
            listeners: Vec::new(),
            budget: Budget::new(),
            batch: Batch::default(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            parts: VecDeque::new(),
            identification: random(),
            scratch: Scratch::default(),
            frames_since_poll: 0,
            is_receiving: false,
            warned_of_echoes: false,
        };
        let count = options.forwards.iter().map(Forward::port_count).sum();
        if count > Forward::MAX_PORTS {
            return Err(OpenError::TooManyForwards { count });
        }
        let count = options.allow.len() + options.deny.len();
        if count > Rule::MAX_COUNT {
            return Err(OpenError::TooManyRules { count });
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

    /// Has `observer` called whenever the guest is kept from reaching something.
    pub fn observe_refusals(&mut self, observer: impl FnMut(&Refusal) + Send + 'static) {
        self.observer = Some(Box::new(observer));
    }

    /// Has `observer` called whenever an attempt of the guest to open a connection gets no answer because the guest
    /// has too many, with their number.
    pub fn observe_delays(&mut self, observer: impl FnMut(usize) + Send + 'static) {
        self.delay_observer = Some(Box::new(observer));
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
        self.reassembly.clear();
        self.guest_v6 = None;
        self.advertised = None;
        self.batch.clear();
        self.replies.clear();
        self.parts.clear();
        self.ready.clear();
        for listener in &mut self.listeners {
            listener.is_queued = false;
        }
        for index in 0..self.listeners.len() {
            self.queue(Source::Listener(index));
        }
    }

    /// Sends what was kept back of the guest's frames, to go together with more. It is for the end of a run of
    /// [`UserNetwork::send`]; [`UserNetwork::receive`] does so too.
    pub fn flush(&mut self) {
        self.batch.send();
    }

    /// Whether there may be frames for the guest without another event of the descriptor.
    pub fn has_frames(&self) -> bool {
        !self.parts.is_empty() || !self.replies.is_empty() || !self.ready.is_empty()
    }

    fn insert_tcp(&mut self, ends: Ends, flow: TcpFlow) {
        let source = Source::Tcp(self.tcp.next_index());
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLPRI
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP;
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

    /// Has a packet that is larger than `packet_size` bytes, and is whole in `frame`, go in parts. Nothing else for the guest
    /// is made before they have gone, so there is one such packet at a time.
    fn reply_in_parts(&mut self, frame: &[u8], packet_size: usize) {
        self.identification = self.identification.wrapping_add(1);
        self.parts
            .extend(split(frame, packet_size, self.identification));
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
}

impl AsRawFd for UserNetwork {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

/// Returns a number that the guest cannot guess. Without random numbers of the host, it is the time.
fn random() -> u32 {
    let mut bytes = [0; 4];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u32::from_ne_bytes(bytes),
        Err(_) => UNIX_EPOCH.elapsed().map_or(0, |time| time.subsec_nanos()),
    }
}
