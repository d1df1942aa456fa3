//! Frames that no sensible guest sends.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::guest::{Bytes, MAC, MTU, at, next_frame};
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
    let route = route(destination);
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
fn a_flood_of_connections_is_refused_at_some_point() {
    let (_listener, port) = listen();
    let mut network = network();
    let gateway = Ipv4Addr::new(10, 0, 2, 2);
    let (mut resets, mut answers) = (0, 0);
    for number in 0..6000u16 {
        let syn = Tcp {
            source: 1000 + number,
            destination: port,
            sequence: 7,
            flags: tcp_flag::SYN,
            window: 1000,
            ..Tcp::default()
        };
        send(&mut network, segment(gateway, &syn, &[]));
        for frame in drain(&mut network) {
            match frame[47] & tcp_flag::RST {
                0 => answers += 1,
                _ => resets += 1,
            }
        }
    }
    assert!(resets > 1000, "{resets} and {answers}");
    // The guest is still served.
    let reset = Tcp {
        source: 1000,
        destination: port,
        sequence: 8,
        flags: tcp_flag::RST,
        ..Tcp::default()
    };
    send(&mut network, segment(gateway, &reset, &[]));
    network.reset();
    assert!(network.receive(&mut Bytes(vec![0; 1 << 17])).is_none());
}

#[test]
fn a_flood_of_datagrams_replaces_the_oldest() {
    let mut network = network();
    for number in 0..5000u16 {
        let route = route(Ipv4Addr::new(10, 0, 2, 2));
        send(&mut network, Udp::frame(&route, 1000 + number, 9, b"flood"));
        drain(&mut network);
    }
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

/// A frame that makes sense, for others to be made of.
fn sensible() -> impl Strategy<Value = Vec<u8>> {
    // Nobody outside is reached: the namespace of the test is not its own.
    let destination = prop_oneof![
        Just(Ipv4Addr::new(10, 0, 2, 2)),
        Just(Ipv4Addr::new(10, 0, 2, 3)),
        Just(Ipv4Addr::new(127, 0, 0, 1)),
        Just(Ipv4Addr::new(10, 0, 2, 255)),
    ];
    let payload = prop::collection::vec(any::<u8>(), 0..300);
    let ports = prop_oneof![Just((68, 67)), (1u16..4, 1u16..4)];
    let numbers = (0u32..4, 0u32..4, any::<u8>(), any::<u16>());
    (destination, payload, ports, numbers, 0..4).prop_map(
        |(
            destination,
            payload,
            (source, port),
            (sequence, acknowledgment, flags, window),
            kind,
        )| {
            match kind {
                0 => Udp::frame(&route(destination), source, port, &payload),
                1 => {
                    let message = [&[8, 0, 0, 0, 0, 1, 0, 1], &payload[..]].concat();
                    icmp_frame(&route(destination), &message, None)
                }
                2 => {
                    let mut frame = vec![0xff; 6];
                    frame.extend(MAC);
                    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
                    frame.extend(MAC);
                    frame.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0]);
                    frame.extend(destination.octets());
                    frame
                }
                _ => {
                    let header = Tcp {
                        source,
                        destination: port,
                        sequence,
                        acknowledgment,
                        flags,
                        window,
                        mss: Some(window),
                        window_scale: Some(flags),
                        header_size: 0,
                    };
                    segment(destination, &header, &payload)
                }
            }
        },
    )
}

proptest! {
    #[test]
    fn any_frames_are_taken_or_dropped(
        frames in prop::collection::vec(
            (
                sensible(),
                prop::collection::vec((0usize..80, any::<u8>()), 0..4),
                prop::option::of(0usize..100),
            ),
            1..40,
        ),
        restrict in any::<bool>(),
    ) {
        let options = UserNetworkOptions { restrict, ..UserNetworkOptions::default() };
        let mut network = UserNetwork::open(&options, MAC, MTU).unwrap();
        for (mut frame, changes, cut) in frames {
            for (offset, value) in changes {
                // The destination stays within the network.
                if !(30..34).contains(&offset) && offset < frame.len() {
                    frame[offset] = value;
                }
            }
            if let Some(size) = cut {
                frame.truncate(size);
            }
            send(&mut network, frame);
            for frame in drain(&mut network) {
                prop_assert!(frame.len() >= 42);
            }
        }
    }

    #[test]
    fn any_bytes_are_taken_or_dropped(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut network = UserNetwork::open(&UserNetworkOptions::default(), MAC, MTU).unwrap();
        send(&mut network, bytes);
        drain(&mut network);
    }
}
