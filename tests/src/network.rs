//! The host's end of a guest's network.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::mem::size_of;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, id};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockType, SockaddrLike, bind, setsockopt, socket,
};
use nix::sys::time::TimeVal;

/// Number of interfaces that this process has named.
static NAMED: AtomicU32 = AtomicU32::new(0);

/// Returns a name that no other interface has.
pub fn tap_name() -> String {
    format!("bt{}n{}", id(), NAMED.fetch_add(1, Ordering::Relaxed))
}

/// Returns whether the host has an interface of that name.
pub fn interface_exists(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

/// A tap interface that exists before and after a machine, with an address of the host in a
/// separate network. Dropping this deletes it.
pub struct HostTap {
    /// Name of the interface.
    pub name: String,
    /// The host's address.
    pub host: Ipv4Addr,
    /// An address for the guest.
    pub guest: Ipv4Addr,
}

impl HostTap {
    /// Length of the network's prefix in bits.
    pub const PREFIX: u8 = 30;

    /// Creates the interface and brings it up.
    ///
    /// # Panics
    ///
    /// If it cannot be created.
    pub fn new() -> Self {
        let name = tap_name();
        let [host, guest] = addresses();
        ip(&["tuntap", "add", "dev", &name, "mode", "tap"]);
        let tap = Self { name, host, guest };
        let address = format!("{}/{}", tap.host, Self::PREFIX);
        ip(&["address", "add", &address, "dev", &tap.name]);
        ip(&["link", "set", &tap.name, "up"]);
        tap
    }

    /// Returns the interface's MTU in bytes.
    ///
    /// # Panics
    ///
    /// If the interface no longer exists.
    pub fn mtu(&self) -> u32 {
        let path = Path::new("/sys/class/net").join(&self.name).join("mtu");
        let text = std::fs::read_to_string(path).expect("the interface exists");
        text.trim().parse().expect("it is a number")
    }
}

impl Default for HostTap {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        ip(&["link", "delete", &self.name]);
    }
}

/// Returns an address of the host and one of a guest, in a subnet that no other test has.
fn addresses() -> [Ipv4Addr; 2] {
    // A subnet of four addresses among those reserved for tests of devices (RFC 2544).
    let number = id()
        .wrapping_mul(8)
        .wrapping_add(NAMED.load(Ordering::Relaxed));
    let subnet = Ipv4Addr::new(198, 18, 0, 0).to_bits() + number % (1 << 14) * 4;
    [1, 2].map(|place| Ipv4Addr::from_bits(subnet + place))
}

/// A bridge with an address of the host and two taps, between which a guest can move. Dropping this deletes all of them.
pub struct HostBridge {
    name: String,
    /// Names of the taps.
    pub taps: [String; 2],
    /// The host's address.
    pub host: Ipv4Addr,
    /// An address for the guest.
    pub guest: Ipv4Addr,
}

impl HostBridge {
    /// Creates the bridge and its taps, and brings them up.
    ///
    /// # Panics
    ///
    /// If they cannot be created.
    pub fn new() -> Self {
        let [host, guest] = addresses();
        let bridge = Self {
            name: tap_name(),
            taps: [tap_name(), tap_name()],
            host,
            guest,
        };
        let name = &bridge.name;
        ip(&["link", "add", name, "type", "bridge"]);
        let address = format!("{host}/{}", HostTap::PREFIX);
        ip(&["address", "add", &address, "dev", name]);
        for tap in &bridge.taps {
            ip(&["tuntap", "add", "dev", tap, "mode", "tap"]);
            ip(&["link", "set", tap, "master", name]);
            ip(&["link", "set", tap, "up"]);
        }
        ip(&["link", "set", name, "up"]);
        bridge
    }

    /// Returns its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for HostBridge {
    fn drop(&mut self) {
        for interface in self.taps.iter().chain([&self.name]) {
            ip(&["link", "delete", interface]);
        }
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status();
    let succeeded = matches!(&status, Ok(status) if status.success());
    if !succeeded && !std::thread::panicking() {
        panic!("'ip {}' failed: {status:?}", arguments.join(" "));
    }
}

/// Whole Ethernet frames on an interface.
pub struct PacketSocket {
    socket: File,
}

impl PacketSocket {
    /// Opens a socket on the interface `name`.
    ///
    /// # Panics
    ///
    /// If there is no such interface, or it cannot be opened.
    pub fn open(name: &str) -> Self {
        Self {
            socket: packet_socket(name, libc::ETH_P_ALL as u16),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    ///
    /// Those of the socket: the interface can vanish.
    pub fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        (&self.socket).write_all(frame)
    }

    /// Waits for a frame for which `wanted` holds, and skips all others.
    ///
    /// # Panics
    ///
    /// If the socket does not accept a time-out.
    pub fn receive(&self, limit: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let left = TimeVal::new(
                left.as_secs() as i64,
                i64::from(left.subsec_micros().max(1)),
            );
            setsockopt(&self.socket, ReceiveTimeout, &left).expect("sockets have time-outs");
            let frame = match (&self.socket).read(&mut buffer) {
                Ok(size) => &buffer[..size],
                Err(_) => return None,
            };
            if wanted(frame) {
                return Some(frame.to_vec());
            }
        }
    }
}

/// Opens a socket for whole Ethernet frames of an EtherType on the interface `name`.
///
/// # Panics
///
/// If there is no such interface, or it cannot be opened.
pub(crate) fn packet_socket(name: &str, ether_type: u16) -> File {
    // Without a protocol nothing arrives before the socket is bound.
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .expect("root may open packet sockets");
    let index = if_nametoindex(name).expect("the interface exists");
    let address = link_address(index, ether_type);
    bind(socket.as_raw_fd(), &address).expect("the interface can be bound to");
    socket.into()
}

fn link_address(interface_index: u32, ether_type: u16) -> LinkAddr {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ether_type.to_be(),
        sll_ifindex: interface_index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the pointer is to a complete address of its family, of the size given.
    unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(size)) }
        .expect("the family is that of packets")
}

/// Accepts a guest's connection, whose reads and writes time out.
///
/// # Panics
///
/// If none comes for two minutes.
pub fn accept(listener: &TcpListener) -> TcpStream {
    const LIMIT: Duration = Duration::from_secs(120);
    let deadline = Instant::now() + LIMIT;
    listener.set_nonblocking(true).expect("sockets can be");
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).expect("sockets can be");
                stream
                    .set_read_timeout(Some(LIMIT))
                    .expect("sockets can be");
                stream
                    .set_write_timeout(Some(LIMIT))
                    .expect("sockets can be");
                return stream;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "the guest does not connect");
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("cannot accept: {error}"),
        }
    }
}
