//! What passes, as Wireshark understands it: no checksum is wrong, and nothing is malformed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::process::Command;
use std::thread;

use smoltcp::socket::dhcpv4;
use smoltcp::wire::IpAddress;

use super::guest::{Bytes, Guest, MAC, MTU, next_frame, udp_socket};
use super::{GATEWAY, pattern, to_host};
use crate::UserNetwork;
use crate::wire::{Route, Udp, icmp_frame};

const GATEWAY_V6: IpAddress = IpAddress::v6(0xfd62, 0x616e, 0x0a00, 0x0200, 0, 0, 0, 2);

/// The start of a capture: its format and version, the largest frame, and Ethernet.
const PCAP_HEADER: [u32; 6] = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 1 << 18, 1];

/// What Wireshark complains about.
const FAULTS: &str = "_ws.malformed or ip.checksum.status == 0 or tcp.checksum.status == 0 or \
                      udp.checksum.status == 0 or icmp.checksum.status == 0 or \
                      icmpv6.checksum.status == 0 or _ws.expert.severity == error";

pub(super) fn header() -> Vec<u8> {
    PCAP_HEADER.map(u32::to_le_bytes).as_flattened().to_vec()
}

/// Has tshark read a capture. Returns the frames of `filter`, one a line.
fn tshark(capture: &[u8], filter: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, capture).unwrap();
    let output = Command::new("tshark")
        .args(["-n", "-r"])
        .arg(file.path())
        .args([
            "-o",
            "ip.check_checksum:TRUE",
            "-o",
            "tcp.check_checksum:TRUE",
        ])
        .args(["-o", "udp.check_checksum:TRUE", "-Y", filter])
        .output();
    let output = output.expect("there is tshark");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
pub(super) fn check(capture: &[u8], expected: &[&str]) {
    assert_eq!(tshark(capture, FAULTS), "");
    for filter in expected {
        assert_ne!(tshark(capture, filter), "", "nothing is {filter}");
    }
}

/// Exchanges bytes by TCP and datagrams by UDP with a server of the host.
fn exchange(guest: &mut Guest, loopback: IpAddr, gateway: IpAddress) {
    let listener = TcpListener::bind((loopback, 0)).unwrap();
    let server = UdpSocket::bind((loopback, 0)).unwrap();
    let ports = (
        listener.local_addr().unwrap().port(),
        server.local_addr().unwrap().port(),
    );
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        std::io::copy(&mut &stream, &mut &stream)
    });
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok((size, peer)) = server.recv_from(&mut bytes) {
            server.send_to(&bytes[..size], peer).unwrap();
        }
    });
    let handle = guest.connect(gateway, ports.0, 40000);
    let bytes = pattern(300_001);
    assert!(guest.exchange(handle, &bytes) == bytes);
    guest.tcp(handle).close();
    let refused = guest.connect(gateway, 1, 40001);
    assert!(!guest.is_connected(refused));
    let handle = guest.add(udp_socket(5000));
    for size in [0, 1, 1001] {
        let socket = guest.udp(handle);
        socket
            .send_slice(&pattern(size), (gateway, ports.1))
            .unwrap();
        guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
        guest.udp(handle).recv().unwrap();
    }
}

/// Appends a frame to a capture.
fn record(capture: &mut Vec<u8>, frame: &[u8]) {
    let size = (frame.len() as u32).to_le_bytes();
    capture.extend([0; 8]);
    capture.extend([size, size].as_flattened());
    capture.extend(frame);
}

#[test]
fn datagrams_that_are_larger_than_the_mtu_come_in_parts() {
    for (is_v4, leave_checksums) in [(true, false), (true, true), (false, false), (false, true)] {
        let (loopback, guest, gateway): (IpAddr, IpAddr, IpAddr) = match is_v4 {
            true => (
                Ipv4Addr::LOCALHOST.into(),
                [10, 0, 2, 15].into(),
                [10, 0, 2, 2].into(),
            ),
            false => (
                Ipv6Addr::LOCALHOST.into(),
                [0xfd62, 0x616e, 0x0a00, 0x0200, 0, 0, 0, 0x15].into(),
                [0xfd62, 0x616e, 0x0a00, 0x0200, 0, 0, 0, 2].into(),
            ),
        };
        let route = Route {
            source_mac: MAC,
            destination_mac: [0x52, 0x55, 10, 0, 2, 2],
            source: guest,
            destination: gateway,
        };
        for mtu in [1500, MTU] {
            let server = UdpSocket::bind((loopback, 0)).unwrap();
            let port = server.local_addr().unwrap().port();
            let mut network = UserNetwork::open(&to_host(), MAC, mtu).unwrap();
            network.leave_checksums(leave_checksums);
            network.send(&mut Bytes(Udp::frame(&route, 5000, port, b"go on")));
            network.flush();
            let (_, peer) = server.recv_from(&mut [0; 16]).unwrap();
            let mut capture = header();
            // Those that fit have another between them that does not.
            let sizes = [1000, 3000, 1472, 1473, 65_507];
            for size in sizes {
                server.send_to(&pattern(size), peer).unwrap();
            }
            // Behind the last frame, the host is asked for more only the next time.
            for _ in 0..2 {
                while let Some(frame) = next_frame(&mut network) {
                    assert!(frame.len() <= 14 + usize::from(mtu), "{}", frame.len());
                    record(&mut capture, &frame);
                }
            }
            check(&capture, &[]);
            let whole = tshark(&capture, "udp.srcport != 5000 and not icmpv6");
            let lengths: Vec<_> = sizes.map(|size| format!("Len={size}")).to_vec();
            let found: Vec<_> = whole
                .split_whitespace()
                .filter(|word| word.starts_with("Len="))
                .collect();
            assert_eq!(found, lengths, "{is_v4} {leave_checksums} {mtu}: {whole}");
        }
    }
}

#[test]
fn tcp_and_udp_have_right_checksums() {
    for leave_checksums in [false, true] {
        let network = UserNetwork::open(&to_host(), MAC, MTU).unwrap();
        let mut guest = Guest::bare(network);
        guest.cable.capture = Some(header());
        let dhcp = guest.add(dhcpv4::Socket::new());
        guest.wait(|guest| {
            let socket = guest.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp);
            matches!(socket.poll(), Some(dhcpv4::Event::Configured(_))).then_some(())
        });
        guest.configure();
        guest.cable.network.leave_checksums(leave_checksums);
        exchange(&mut guest, Ipv4Addr::LOCALHOST.into(), GATEWAY);
        let capture = guest.cable.capture.take().unwrap();
        check(
            &capture,
            &[
                "dhcp.option.dhcp == 5",
                "arp",
                "tcp.len > 30000",
                "udp.length == 1009",
            ],
        );

        let network = UserNetwork::open(&to_host(), MAC, MTU).unwrap();
        let mut guest = Guest::with_v6(network);
        guest.cable.capture = Some(header());
        guest.cable.network.leave_checksums(leave_checksums);
        exchange(&mut guest, Ipv6Addr::LOCALHOST.into(), GATEWAY_V6);
        let capture = guest.cable.capture.take().unwrap();
        check(
            &capture,
            &["icmpv6.type == 136", "ipv6 and tcp.len > 30000"],
        );
    }
}

#[test]
fn what_the_network_says_itself_is_well_formed() {
    let options = crate::UserNetworkOptions {
        domain: Some("example.org".parse().unwrap()),
        ..to_host()
    };
    let mut network = UserNetwork::open(&options, MAC, MTU).unwrap();
    let route = |source: &str, destination: &str| Route {
        source_mac: MAC,
        destination_mac: [0xff; 6],
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    };
    let guest = "fd62:616e:a00:200::15";
    let client = [0, 1, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 1];
    let wish = [0, 3, 0, 12, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0];
    let solicit = [&[1, 1, 2, 3], &client[..], &wish].concat();
    let solicitation = [
        &[133, 0, 0, 0, 0, 0, 0, 0][..],
        // The sender's Ethernet address.
        &[1, 1, 2, 0, 0, 0, 0, 1],
    ]
    .concat();
    let neighbor = [
        &[135, 0, 0, 0, 0, 0, 0, 0],
        &[0xfe, 0x80][..],
        &[0; 13],
        &[2],
    ]
    .concat();
    let frames = [
        icmp_frame(&route("fe80::9", "ff02::2"), &solicitation, Some(255)),
        icmp_frame(&route("fe80::9", "fe80::2"), &neighbor, Some(255)),
        icmp_frame(&route("::", "ff02::1:ff00:2"), &neighbor, Some(255)),
        Udp::frame(&route("fe80::9", "ff02::1:2"), 546, 547, &solicit),
        // What cannot be reached is reported.
        Udp::frame(&route(guest, "fd62:616e:a00:200::77"), 5000, 9, b"hello"),
        Udp::frame(&route("10.0.2.15", "127.0.0.1"), 5000, 9, b"hello"),
        icmp_frame(
            &route("10.0.2.15", "10.0.2.2"),
            &[8, 0, 0, 0, 0, 1, 0, 1],
            None,
        ),
        icmp_frame(&route(guest, "fe80::2"), &[128, 0, 0, 0, 0, 1, 0, 1], None),
    ];
    let mut capture = header();
    for frame in frames {
        network.send(&mut Bytes(frame));
        while let Some(frame) = next_frame(&mut network) {
            let size = (frame.len() as u32).to_le_bytes();
            capture.extend([0; 8]);
            capture.extend([size, size].as_flattened());
            capture.extend(frame);
        }
    }
    check(
        &capture,
        &[
            "icmpv6.type == 134 and icmpv6.opt.rdnss and icmpv6.opt.dnssl",
            "icmpv6.type == 136 and ipv6.dst == fe80::9",
            "icmpv6.type == 136 and ipv6.dst == ff02::1",
            "dhcpv6.msgtype == 2 and dhcpv6.iaaddr.ip == fd62:616e:a00:200::15",
            "icmpv6.type == 1",
            "icmp.type == 3",
            "icmp.type == 0",
            "icmpv6.type == 129",
        ],
    );
}
