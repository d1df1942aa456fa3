//! Frames that no sensible guest sends.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bolero::TypeGenerator;

use super::guest::{Bytes, MAC, MTU, at, next_frame};
use super::namespace::{enter_namespace, in_namespace, ip};
use super::{listen, to_host};
use crate::wire::{Mac, PROTOCOL_TCP, Route, Tcp, Udp, fold, icmp_frame, put16, sum, tcp_flag};
use crate::{UserNetwork, UserNetworkOptions};

const NETWORK_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];

/// The way of a guest's packet to `destination`.
fn route(destination: Ipv4Addr) -> Route {
    Route {
        source_mac: MAC,
        destination_mac: NETWORK_MAC,
        source: Ipv4Addr::new(10, 0, 2, 15).into(),
        destination: destination.into(),
    }
}

fn segment(destination: Ipv4Addr, header: &Tcp, payload: &[u8]) -> Vec<u8> {
    segment_on(&route(destination), header, payload)
}

fn segment_on(route: &Route, header: &Tcp, payload: &[u8]) -> Vec<u8> {
    let size = header.written_size() + payload.len();
    let mut frame = Vec::new();
    route.write(&mut frame, PROTOCOL_TCP, size, None);
    let start = frame.len();
    header.write(&mut frame);
    frame.extend(payload);
    let total = route.pseudo_sum(PROTOCOL_TCP, size) + sum(&frame[start..]);
    put16(&mut frame, start + Tcp::CHECKSUM_OFFSET, !fold(total));
    frame
}

fn send(network: &mut UserNetwork, frame: Vec<u8>) {
    network.send(&mut Bytes(frame));
}

fn drain(network: &mut UserNetwork) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| next_frame(network))
        .take(10_000)
        .collect()
}

fn network() -> UserNetwork {
    UserNetwork::open(&to_host(), MAC, MTU).unwrap()
}

#[test]
fn a_flood_of_connections_is_slowed_and_the_guest_is_served_again() {
    let (listener, port) = listen();
    // Connections that nobody accepts would hold up others.
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let mut network = network();
    let delays = Arc::<AtomicUsize>::default();
    let counter = delays.clone();
    network.observe_delays(move |limit| {
        assert!((100..=4096).contains(&limit), "{limit}");
        counter.fetch_add(1, Ordering::Relaxed);
    });
    let gateway = Ipv4Addr::new(10, 0, 2, 2);
    let syn = |source| Tcp {
        source,
        destination: port,
        sequence: 7,
        flags: tcp_flag::SYN,
        window: 1000,
        ..Tcp::default()
    };
    // Answers are sent again on a slow host.
    let (mut open, mut resets) = (BTreeSet::new(), 0);
    for number in 0..6000 {
        send(&mut network, segment(gateway, &syn(1000 + number), &[]));
        for frame in drain(&mut network) {
            match frame[47] & tcp_flag::RST {
                0 => drop(open.insert(at(&frame, 36))),
                _ => resets += 1,
            }
        }
    }
    // Too many are not refused: the guest tries again later.
    assert!((100..=4096).contains(&open.len()), "{}", open.len());
    assert_eq!(resets, 0);
    assert!(delays.load(Ordering::Relaxed) >= 6000 - 4096);
    let reset = Tcp {
        flags: tcp_flag::RST,
        sequence: 8,
        ..syn(*open.first().unwrap())
    };
    send(&mut network, segment(gateway, &reset, &[]));
    send(&mut network, segment(gateway, &syn(60_000), &[]));
    // Among the answers that are sent again.
    let frames = std::iter::repeat_with(|| next_frame(&mut network)).take(1_000_000);
    let answer = frames.flatten().find(|frame| at(frame, 36) == 60_000);
    assert_eq!(answer.unwrap()[47] & tcp_flag::RST, 0);
    network.reset();
    assert!(network.receive(&mut Bytes(vec![0; 1 << 17])).is_none());
}

/// Counts the sockets of this thread's namespace by the kernel's list of a protocol.
fn sockets(protocol: &str) -> usize {
    let list = std::fs::read_to_string(format!("/proc/thread-self/net/{protocol}"));
    list.unwrap().lines().count() - 1
}

/// Nobody answers, and so nothing but time makes room.
#[test]
fn a_flood_of_connections_to_nobody_takes_no_more_than_its_share() {
    in_namespace(|| {
        let words = "link add nobody type veth peer name other|link set other up|link set nobody up|\
                     address add 198.51.100.1/24 dev nobody|neigh add 198.51.100.7 lladdr 02:00:00:00:00:07 dev nobody";
        for line in words.split('|') {
            ip(&line.split(' ').collect::<Vec<_>>());
        }
        let mut network = UserNetwork::open(&UserNetworkOptions::default(), MAC, MTU).unwrap();
        let delays = Arc::<AtomicUsize>::default();
        let counter = delays.clone();
        network.observe_delays(move |limit| {
            assert!(limit <= 4096);
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let mut number = 0;
        let mut attempt = move |network: &mut UserNetwork| {
            number += 1;
            let syn = Tcp {
                source: 1000 + (number % 50_000) as u16,
                destination: 1 + (number / 50_000) as u16,
                sequence: 7,
                flags: tcp_flag::SYN,
                window: 1000,
                ..Tcp::default()
            };
            let nobody = Ipv4Addr::new(198, 51, 100, 7);
            send(network, segment(nobody, &syn, &[]));
            assert!(next_frame(network).is_none());
        };
        let count = 100_000;
        for _ in 0..count {
            attempt(&mut network);
        }
        let opened = sockets("tcp");
        assert!((100..=4096).contains(&opened), "{opened}");
        let refused = delays.load(Ordering::Relaxed);
        assert!(refused >= count - 2 * 4096, "{refused}");
        // Other programs of the host have ports and descriptors left.
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        std::thread::sleep(crate::tcp::OPENING_TIME);
        let refused = delays.load(Ordering::Relaxed);
        attempt(&mut network);
        assert_eq!(delays.load(Ordering::Relaxed), refused);
        // The test has a listener and both ends of a connection.
        assert!(sockets("tcp") <= opened + 3);
    });
}

#[test]
fn a_flood_of_datagrams_replaces_the_oldest() {
    in_namespace(|| {
        let mut network = network();
        for number in 0..50_000u16 {
            let route = route(Ipv4Addr::new(10, 0, 2, 2));
            send(&mut network, Udp::frame(&route, 1000 + number, 9, b"flood"));
            drain(&mut network);
        }
        let open = sockets("udp");
        assert!((64..=1024).contains(&open), "{open}");
    });
}

#[test]
fn answers_that_nobody_takes_do_not_pile_up() {
    let mut network = network();
    let gateway = Ipv4Addr::new(10, 0, 2, 2);
    for _ in 0..10_000 {
        let ping = [8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4];
        send(&mut network, icmp_frame(&route(gateway), &ping, None));
    }
    assert!(drain(&mut network).len() < 100);
}

#[test]
fn what_is_out_of_the_window_does_not_end_a_connection() {
    let (listener, port) = listen();
    let mut network = network();
    let gateway = Ipv4Addr::new(10, 0, 2, 2);
    let mut header = Tcp {
        source: 1000,
        destination: port,
        sequence: 100,
        flags: tcp_flag::SYN,
        window: 1000,
        mss: Some(1),
        ..Tcp::default()
    };
    send(&mut network, segment(gateway, &header, &[]));
    let answer = loop {
        if let Some(frame) = next_frame(&mut network) {
            break frame;
        }
    };
    let isn = u32::from(at(&answer, 38)) << 16 | u32::from(at(&answer, 40));
    header.mss = None;
    header.sequence = 101;
    header.acknowledgment = isn.wrapping_add(1);
    header.flags = tcp_flag::ACK;
    send(&mut network, segment(gateway, &header, &[]));
    let (stream, _) = listener.accept().unwrap();
    for (sequence, flags, payload) in [
        (100, tcp_flag::RST, &b""[..]),
        (1 << 30, tcp_flag::RST, b""),
        (1 << 30, tcp_flag::ACK, b"later"),
        (50, tcp_flag::ACK | tcp_flag::FIN, b"before"),
        (102, tcp_flag::ACK, b"bc"),
    ] {
        header.sequence = sequence;
        header.flags = flags;
        send(&mut network, segment(gateway, &header, payload));
    }
    header.sequence = 101;
    header.flags = tcp_flag::ACK;
    send(&mut network, segment(gateway, &header, b"abc"));
    drain(&mut network);
    let mut bytes = [0; 16];
    let size = std::io::Read::read(&mut &stream, &mut bytes).unwrap();
    assert_eq!(&bytes[..size], b"abc");
    // An acknowledgment of what was never sent.
    header.sequence = 104;
    header.acknowledgment = isn.wrapping_add(5000);
    send(&mut network, segment(gateway, &header, &[]));
    drain(&mut network);
    stream.set_nonblocking(true).unwrap();
    let error = std::io::Read::read(&mut &stream, &mut bytes).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

/// What a guest sends, as it should be.
#[derive(Debug, TypeGenerator)]
enum Packet {
    Datagram(Ends, Vec<u8>),
    Segment {
        ends: Ends,
        sequence: u8,
        acknowledgment: u8,
        flags: u8,
        window: u16,
        payload: Vec<u8>,
    },
    Echo(Ends, Vec<u8>),
    Fragment {
        ends: Ends,
        offset: u16,
        protocol: u8,
        payload: Vec<u8>,
    },
    Arp(u8),
    Neighbor(Ends, Vec<u8>),
    Dhcp(Vec<u8>),
    Dhcpv6(Vec<u8>),
    Other(Vec<u8>),
}

#[derive(Debug, Clone, Copy, TypeGenerator)]
struct Ends {
    is_v6: bool,
    target: u8,
    ports: [u8; 2],
}

impl Ends {
    fn route(self) -> Route {
        let v4 = [
            Ipv4Addr::new(10, 0, 2, 2),
            Ipv4Addr::new(10, 0, 2, 3),
            Ipv4Addr::LOCALHOST,
            Ipv4Addr::new(10, 0, 2, 255),
        ];
        let v6 = [
            "fd62:616e:a00:200::2",
            "fd62:616e:a00:200::3",
            "fe80::2",
            "ff02::1",
        ];
        let index = usize::from(self.target) % 4;
        if !self.is_v6 {
            return route(v4[index]);
        }
        Route {
            source: "fd62:616e:a00:200::15".parse().unwrap(),
            destination: v6[index].parse().unwrap(),
            ..route(v4[0])
        }
    }

    fn ports(self) -> [u16; 2] {
        self.ports.map(|port| u16::from(port % 4))
    }
}

impl Packet {
    fn frame(&self) -> Vec<u8> {
        match self {
            Packet::Datagram(ends, payload) => {
                let [source, destination] = ends.ports();
                Udp::frame(&ends.route(), source, destination, payload)
            }
            Packet::Segment {
                ends,
                sequence,
                acknowledgment,
                flags,
                window,
                payload,
            } => {
                let [source, destination] = ends.ports();
                let header = Tcp {
                    source,
                    destination,
                    sequence: u32::from(sequence % 4),
                    acknowledgment: u32::from(acknowledgment % 4),
                    flags: *flags,
                    window: *window,
                    mss: Some(*window),
                    window_scale: Some(*flags),
                    header_size: 0,
                };
                segment_on(&ends.route(), &header, payload)
            }
            Packet::Echo(ends, payload) => {
                let kind = if ends.is_v6 { 128 } else { 8 };
                let message = [&[kind, 0, 0, 0, 0, 1, 0, 1], &payload[..]].concat();
                icmp_frame(&ends.route(), &message, None)
            }
            Packet::Fragment {
                ends,
                offset,
                protocol,
                payload,
            } => {
                let mut frame = Vec::new();
                let is_v6 = ends.is_v6;
                let size = payload.len() + if is_v6 { 8 } else { 0 };
                let next = if is_v6 { 44 } else { *protocol };
                ends.route().write(&mut frame, next, size, None);
                if is_v6 {
                    frame.extend([*protocol, 0]);
                    frame.extend(offset.to_be_bytes());
                    frame.extend([0; 4]);
                } else {
                    put16(&mut frame, 20, *offset);
                }
                frame.extend(payload);
                frame
            }
            Packet::Arp(target) => {
                let mut frame = vec![0xff; 6];
                frame.extend(MAC);
                frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
                frame.extend(MAC);
                frame.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, target % 4]);
                frame
            }
            Packet::Neighbor(ends, rest) => {
                let kind = 133 + ends.ports[0] % 4;
                let ends = Ends {
                    is_v6: true,
                    ..*ends
                };
                icmp_frame(
                    &ends.route(),
                    &[&[kind, 0, 0, 0], &rest[..]].concat(),
                    Some(255),
                )
            }
            Packet::Dhcp(rest) => {
                let mut message = vec![1, 1, 6];
                message.resize(236, 0);
                message.extend([99, 130, 83, 99]);
                message.extend(rest);
                Udp::frame(&route(Ipv4Addr::BROADCAST), 68, 67, &message)
            }
            Packet::Dhcpv6(message) => {
                let all = Route {
                    source: "fe80::9".parse().unwrap(),
                    destination: "ff02::1:2".parse().unwrap(),
                    ..route(Ipv4Addr::BROADCAST)
                };
                Udp::frame(&all, 546, 547, message)
            }
            Packet::Other(bytes) => bytes.clone(),
        }
    }
}

/// Bytes of a packet that are something else, and where it ends too early.
type Damage = (Vec<(u8, u8)>, Option<u8>);

#[test]
fn any_packets_are_taken_or_dropped() {
    // Nobody outside is reached.
    if !enter_namespace() {
        return;
    }
    bolero::check!()
        .with_type::<(bool, Vec<(Packet, Damage)>)>()
        .for_each(|(restrict, packets)| {
            let options = UserNetworkOptions {
                restrict: *restrict,
                ..to_host()
            };
            let mut network = UserNetwork::open(&options, MAC, MTU).unwrap();
            for (packet, (changes, cut)) in packets {
                let mut frame = packet.frame();
                for &(offset, value) in changes {
                    if let Some(byte) = frame.get_mut(usize::from(offset)) {
                        *byte = value;
                    }
                }
                frame.truncate(cut.map_or(frame.len(), usize::from));
                send(&mut network, frame);
                for frame in drain(&mut network) {
                    assert!(frame.len() >= 42);
                }
            }
        });
}
