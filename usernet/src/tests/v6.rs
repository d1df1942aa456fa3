//! IPv6: how the guest finds the network, and what it reaches by it.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, IpAddress};

use super::guest::{Guest, MAC, MTU, tcp_socket, udp_socket};
use super::namespace::{in_namespace, ip};
use super::{pattern, to_host};
use crate::{UserNetwork, UserNetworkOptions};

const GATEWAY: IpAddress = IpAddress::v6(0xfd62, 0x616e, 0x0a00, 0x0200, 0, 0, 0, 2);
const DNS: IpAddress = IpAddress::v6(0xfd62, 0x616e, 0x0a00, 0x0200, 0, 0, 0, 3);

fn guest(options: &UserNetworkOptions) -> Guest {
    Guest::with_v6(UserNetwork::open(options, MAC, MTU).unwrap())
}

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn the_guest_makes_itself_an_address() {
    let guest = guest(&UserNetworkOptions::default());
    let address = guest.interface.ip_addrs()[1].to_string();
    // By the Ethernet address, as smoltcp does it.
    assert_eq!(address, "fd62:616e:a00:200:0:ff:fe00:1/64");
}

#[test]
fn bytes_come_back_whole_from_an_echo() {
    for leave_checksums in [false, true] {
        let (listener, port) = listen();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            std::io::copy(&mut &stream, &mut &stream)
        });
        let mut guest = guest(&to_host());
        guest.cable.network.leave_checksums(leave_checksums);
        let handle = guest.connect(GATEWAY, port, 40000);
        let bytes = pattern(4 << 20);
        assert!(guest.exchange(handle, &bytes) == bytes, "bytes are wrong");
        assert!(guest.cable.largest > 30_000, "{}", guest.cable.largest);
    }
}

#[test]
fn datagrams_go_out_and_come_back() {
    let server = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok((size, peer)) = server.recv_from(&mut bytes) {
            server.send_to(&bytes[..size], peer).unwrap();
        }
    });
    let mut guest = guest(&to_host());
    let handle = guest.add(udp_socket(5000));
    for size in [0, 1, 60_001] {
        let bytes = pattern(size);
        let socket = guest.udp(handle);
        socket.send_slice(&bytes, (GATEWAY, port)).unwrap();
        guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
        let (answer, metadata) = guest.udp(handle).recv().unwrap();
        assert!(answer == bytes);
        assert_eq!(metadata.endpoint.addr, GATEWAY);
    }
}

#[test]
fn the_host_itself_is_not_reached() {
    let (_listener, port) = listen();
    let closed = UserNetworkOptions::default();
    let restricted = UserNetworkOptions {
        restrict: true,
        ..to_host()
    };
    for options in [closed, restricted] {
        let mut guest = guest(&options);
        let targets = [
            GATEWAY,
            DNS,
            IpAddress::v6(0, 0, 0, 0, 0, 0xffff, 0x7f00, 1),
            IpAddress::v6(0, 0, 0, 0, 0, 0, 0x7f00, 1),
            IpAddress::v6(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
        ];
        // A restricted network has no router, so that only the network's own addresses are asked.
        let count = if options.restrict { 1 } else { targets.len() };
        for (number, target) in (0..).zip(&targets[..count]) {
            let handle = guest.connect(*target, port, 40000 + number);
            assert!(!guest.is_connected(handle), "{target}");
        }
    }
}

#[test]
fn a_host_without_a_way_refuses_at_once() {
    in_namespace(|| {
        let mut guest = guest(&UserNetworkOptions::default());
        let start = std::time::Instant::now();
        let other = IpAddress::v6(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
        let handle = guest.connect(other, 80, 40000);
        assert!(!guest.is_connected(handle));
        let seconds = start.elapsed().as_secs();
        assert!(seconds < 3, "it took {seconds} s");
    });
}

#[test]
fn a_forwarded_port_of_ipv6_leads_to_the_guests_address() {
    let options = UserNetworkOptions {
        forwards: vec![
            "[::]:0:80".parse().unwrap(),
            "udp:[::1]:0:53".parse().unwrap(),
        ],
        ..UserNetworkOptions::default()
    };
    let mut guest = guest(&options);
    let ports = guest.cable.network.forwarded_ports().unwrap();
    let [tcp_port, udp_port] = [ports[0].host.port(), ports[1].host.port()];
    let handle = guest.add(tcp_socket(1 << 16));
    // It takes a packet of the guest to know its address.
    let probe = guest.connect(GATEWAY, 1, 40000);
    assert!(!guest.is_connected(probe));
    guest.tcp(handle).listen(80).unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect((Ipv6Addr::LOCALHOST, tcp_port)).unwrap();
        stream.write_all(b"GET").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    guest.wait(|guest| guest.tcp(handle).can_recv().then_some(()));
    let endpoint = guest.tcp(handle).remote_endpoint().unwrap();
    assert_eq!(endpoint.addr, GATEWAY);
    guest.tcp(handle).send_slice(b"response").unwrap();
    guest.tcp(handle).close();
    guest.wait(|_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), "response");

    let handle = guest.add(udp_socket(53));
    let client = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    let server = SocketAddr::from((Ipv6Addr::LOCALHOST, udp_port));
    client.send_to(b"query", server).unwrap();
    guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
    let (query, metadata) = guest.udp(handle).recv().unwrap();
    assert_eq!((query, metadata.endpoint.addr), (&b"query"[..], GATEWAY));
    let socket = guest.udp(handle);
    socket.send_slice(b"answer", metadata.endpoint).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut bytes = [0; 64];
    let (size, from) = guest.wait(|_| client.recv_from(&mut bytes).ok());
    assert_eq!((&bytes[..size], from), (&b"answer"[..], server));
}

#[test]
fn names_are_asked_for_and_others_are_pinged() {
    in_namespace(|| {
        ip(&["address", "add", "2001:db8::7/128", "dev", "lo", "nodad"]);
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
        let names = UdpSocket::bind("127.0.0.53:53").unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "nameserver 127.0.0.53\n").unwrap();
        let options = UserNetworkOptions::default();
        let network = UserNetwork::open_with_resolver(&options, MAC, MTU, file.path()).unwrap();
        let mut guest = Guest::with_v6(network);
        let handle = guest.add(udp_socket(5000));
        guest.udp(handle).send_slice(b"AAAA?", (DNS, 53)).unwrap();
        names.set_nonblocking(true).unwrap();
        let mut query = [0; 64];
        let (size, peer) = guest.wait(|_| names.recv_from(&mut query).ok());
        names.send_to(&query[..size], peer).unwrap();
        guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
        let (answer, metadata) = guest.udp(handle).recv().unwrap();
        assert_eq!((answer, metadata.endpoint.addr), (&b"AAAA?"[..], DNS));

        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(0x1234)).unwrap();
        let handle = guest.add(socket);
        let other = IpAddress::v6(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
        let own: IpAddress = guest.interface.ip_addrs()[1].address();
        for (number, target) in (1..).zip([GATEWAY, DNS, other]) {
            let request = Icmpv6Repr::EchoRequest {
                ident: 0x1234,
                seq_no: number,
                data: b"ping",
            };
            let (IpAddress::Ipv6(source), IpAddress::Ipv6(destination)) = (own, target) else {
                panic!("these are addresses of IPv6");
            };
            let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
            let bytes = socket.send(request.buffer_len(), target).unwrap();
            let mut packet = Icmpv6Packet::new_unchecked(bytes);
            request.emit(&source, &destination, &mut packet, &Default::default());
            guest.wait(|guest| {
                let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
                let (bytes, from) = socket.recv().ok()?;
                let packet = Icmpv6Packet::new_checked(bytes).unwrap();
                let checks = Default::default();
                let reply = Icmpv6Repr::parse(&destination, &source, &packet, &checks).unwrap();
                let expected = Icmpv6Repr::EchoReply {
                    ident: 0x1234,
                    seq_no: number,
                    data: b"ping",
                };
                assert_eq!((reply, from), (expected, target));
                Some(())
            });
        }
    });
}
