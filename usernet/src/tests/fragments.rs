//! Packets in parts, and with options.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use super::guest::{Bytes, MAC, MTU, at, next_frame};
use super::{pattern, to_host};
use crate::UserNetwork;
use crate::wire::{ETHERNET_SIZE, IPV4_SIZE, IPV6_SIZE, Mac, Route, Udp, put16};

const NETWORK_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];
const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x616e, 0x0a00, 0x0200, 0, 0, 0, 0x15);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x616e, 0x0a00, 0x0200, 0, 0, 0, 2);

fn route(is_v4: bool) -> Route {
    let (source, destination): (IpAddr, IpAddr) = match is_v4 {
        true => (
            Ipv4Addr::new(10, 0, 2, 15).into(),
            Ipv4Addr::new(10, 0, 2, 2).into(),
        ),
        false => (GUEST_V6.into(), GATEWAY_V6.into()),
    };
    Route {
        source_mac: MAC,
        destination_mac: NETWORK_MAC,
        source,
        destination,
    }
}

/// Cuts the packet in `frame` into parts of at most `size` bytes.
fn parts(frame: &[u8], is_v4: bool, size: usize) -> Vec<Vec<u8>> {
    let headers_size = ETHERNET_SIZE + if is_v4 { IPV4_SIZE } else { IPV6_SIZE };
    let payload = &frame[headers_size..];
    let count = payload.len().div_ceil(size);
    (0..count)
        .map(|index| {
            let part = &payload[index * size..payload.len().min((index + 1) * size)];
            let more = index + 1 < count;
            let offset = index * size / 8;
            let mut headers = frame[..headers_size].to_vec();
            if is_v4 {
                put16(
                    &mut headers,
                    ETHERNET_SIZE + 2,
                    (IPV4_SIZE + part.len()) as u16,
                );
                put16(&mut headers, ETHERNET_SIZE + 4, 99);
                let more = if more { 0x2000 } else { 0 };
                put16(&mut headers, ETHERNET_SIZE + 6, offset as u16 | more);
            } else {
                put16(&mut headers, ETHERNET_SIZE + 4, (8 + part.len()) as u16);
                headers[ETHERNET_SIZE + 6] = 44;
                headers.extend([17, 0]);
                headers.extend(((offset << 3) as u16 | u16::from(more)).to_be_bytes());
                headers.extend([0, 0, 0, 99]);
            }
            [&headers[..], part].concat()
        })
        .collect()
}

/// Returns a socket of the host that the gateway's address leads to.
fn server(is_v4: bool) -> UdpSocket {
    let address: IpAddr = match is_v4 {
        true => Ipv4Addr::LOCALHOST.into(),
        false => Ipv6Addr::LOCALHOST.into(),
    };
    let server = UdpSocket::bind((address, 0)).unwrap();
    server.set_nonblocking(true).unwrap();
    server
}

#[test]
fn datagrams_in_parts_are_put_together() {
    for is_v4 in [true, false] {
        let server = server(is_v4);
        let port = server.local_addr().unwrap().port();
        let mut network = UserNetwork::open(&to_host(), MAC, MTU).unwrap();
        // The largest datagram that there is does not fit into one packet of the usual MTU.
        for payload_size in [3000, 65_507] {
            let payload = pattern(payload_size);
            let frame = Udp::frame(&route(is_v4), 5000, port, &payload);
            let mut parts = parts(&frame, is_v4, 1480);
            parts.reverse();
            for part in parts {
                network.send(&mut Bytes(part));
            }
            let mut bytes = vec![0; 1 << 16];
            let (size, _) = server.recv_from(&mut bytes).unwrap();
            assert!(bytes[..size] == payload, "{size} of {payload_size} bytes");
        }
    }
}

#[test]
fn options_and_extension_headers_are_passed_over() {
    for is_v4 in [true, false] {
        let server = server(is_v4);
        let port = server.local_addr().unwrap().port();
        let mut network = UserNetwork::open(&to_host(), MAC, MTU).unwrap();
        let mut frame = Udp::frame(&route(is_v4), 5000, port, b"hello");
        if is_v4 {
            // Record the route, and a "no operation".
            frame[ETHERNET_SIZE] = 0x47;
            frame.splice(34..34, [7, 7, 4, 0, 0, 0, 0, 1]);
            put16(&mut frame, ETHERNET_SIZE + 2, 20 + 8 + 8 + 5);
        } else {
            // Hop-by-hop options, options for the destination, and a fragment that is the whole packet.
            let extensions = [
                [60, 0, 1, 4, 0, 0, 0, 0],
                [44, 0, 1, 4, 0, 0, 0, 0],
                [17, 0, 0, 0, 0, 0, 0, 1],
            ];
            frame[ETHERNET_SIZE + 6] = 0;
            frame.splice(54..54, extensions.concat());
            put16(&mut frame, ETHERNET_SIZE + 4, 24 + 8 + 5);
        }
        network.send(&mut Bytes(frame));
        network.flush();
        let mut bytes = [0; 64];
        let (size, _) = server.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..size], b"hello");
    }
}

#[test]
fn what_is_not_understood_is_reported() {
    let mut network = UserNetwork::open(&to_host(), MAC, MTU).unwrap();
    let mut report = |frame: Vec<u8>, is_v4| {
        network.send(&mut Bytes(frame));
        let frames = std::iter::from_fn(|| next_frame(&mut network));
        let offset = ETHERNET_SIZE + if is_v4 { IPV4_SIZE } else { IPV6_SIZE };
        // Apart from advertisements of the router.
        let kinds = frames.map(|frame| at(&frame, offset));
        kinds.filter(|kind| *kind != 134 << 8).collect::<Vec<_>>()
    };
    let datagram = |is_v4| Udp::frame(&route(is_v4), 5000, 9, b"hello");
    // SCTP.
    let mut frame = datagram(true);
    frame[ETHERNET_SIZE + 9] = 132;
    assert_eq!(report(frame, true), [3 << 8 | 2]);
    let mut frame = datagram(false);
    frame[ETHERNET_SIZE + 6] = 132;
    assert_eq!(report(frame, false), [4 << 8 | 1]);
    // Ways that the sender gives.
    let mut frame = datagram(true);
    frame[ETHERNET_SIZE] = 0x47;
    frame.splice(34..34, [131, 7, 4, 192, 0, 2, 1, 0]);
    put16(&mut frame, ETHERNET_SIZE + 2, 20 + 8 + 8 + 5);
    assert_eq!(report(frame, true), [3 << 8 | 5]);
    let mut frame = datagram(false);
    frame[ETHERNET_SIZE + 6] = 43;
    frame.splice(54..54, [17, 0, 0, 1, 0, 0, 0, 0]);
    put16(&mut frame, ETHERNET_SIZE + 4, 8 + 8 + 5);
    assert_eq!(report(frame, false), [1 << 8 | 7]);
    // An address of the link as the source of a packet that leaves it.
    let mut outward = route(false);
    outward.source = IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 9]);
    outward.destination = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]);
    assert_eq!(
        report(Udp::frame(&outward, 5000, 9, b""), false),
        [1 << 8 | 2]
    );
}
