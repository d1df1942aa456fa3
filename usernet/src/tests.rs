//! A whole guest over a whole network, with the host's own sockets. No packet leaves the host: what is not on
//! its loopback interface is in a network namespace of the test.

mod batch;
mod capture;
mod fragments;
mod guest;
mod hostile;
mod linux;
mod namespace;
mod path_mtu;
mod policy;
mod v6;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress};

use guest::{ADDRESS, GATEWAY, Guest, MAC, MTU, tcp_socket, udp_socket};
use namespace::in_namespace;

use crate::sys::IS_OLD_HOST;
use crate::{UserNetwork, UserNetworkOptions};

const DNS: IpAddress = IpAddress::v4(10, 0, 2, 3);

/// Options with which the gateway leads to the test.
fn to_host() -> UserNetworkOptions {
    UserNetworkOptions {
        host_loopback: true,
        ..UserNetworkOptions::default()
    }
}

fn forwarding(forward: &str) -> UserNetworkOptions {
    UserNetworkOptions {
        forwards: vec![forward.parse().unwrap()],
        ..UserNetworkOptions::default()
    }
}

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A server that returns what it gets on each of `count` connections.
fn echo_server(count: usize) -> u16 {
    let (listener, port) = listen();
    thread::spawn(move || {
        for stream in listener.incoming().take(count) {
            let stream = stream.unwrap();
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    port
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size)
        .map(|index| (index * 7 + index / 251) as u8)
        .collect()
}

#[test]
fn dhcp_configures_the_guest() {
    let network = UserNetwork::open(&UserNetworkOptions::default(), MAC, MTU).unwrap();
    let mut guest = Guest::bare(network);
    let handle = guest.add(dhcpv4::Socket::new());
    let (address, router, servers) = guest.wait(|guest| {
        let socket = guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle);
        match socket.poll() {
            Some(dhcpv4::Event::Configured(config)) => Some((
                config.address,
                config.router,
                config.dns_servers.first().copied(),
            )),
            _ => None,
        }
    });
    assert_eq!(address.to_string(), "10.0.2.15/24");
    assert_eq!(router, Some(Ipv4Addr::new(10, 0, 2, 2)));
    assert_eq!(servers, Some(Ipv4Addr::new(10, 0, 2, 3)));
}

#[test]
fn bytes_come_back_whole_from_an_echo() {
    for (leave_checksums, is_old_host) in [(false, false), (true, false), (true, true)] {
        IS_OLD_HOST.set(is_old_host);
        let port = echo_server(1);
        let mut guest = Guest::new(&to_host());
        guest.cable.network.leave_checksums(leave_checksums);
        let handle = guest.connect(GATEWAY, port, 40000);
        let bytes = pattern(8 << 20);
        assert!(guest.exchange(handle, &bytes) == bytes, "bytes are wrong");
        // Large segments travel whole.
        assert!(guest.cable.largest > 30_000, "{}", guest.cable.largest);
        IS_OLD_HOST.set(false);
    }
}

#[test]
fn lost_frames_are_sent_again() {
    for is_old_host in [false, true] {
        IS_OLD_HOST.set(is_old_host);
        let port = echo_server(1);
        let mut guest = Guest::new(&to_host());
        guest.cable.loss = Some(13);
        guest.cable.guest_loss = Some(17);
        let handle = guest.connect(GATEWAY, port, 40000);
        let bytes = pattern(300_000);
        assert!(guest.exchange(handle, &bytes) == bytes, "bytes are wrong");
        IS_OLD_HOST.set(false);
    }
}

#[test]
fn nobody_at_a_port_is_a_refusal() {
    let (listener, port) = listen();
    drop(listener);
    let mut guest = Guest::new(&to_host());
    let handle = guest.connect(GATEWAY, port, 40000);
    assert!(!guest.is_connected(handle));
}

#[test]
fn the_host_itself_is_not_reached_by_default() {
    let (_listener, port) = listen();
    for options in [
        UserNetworkOptions::default(),
        UserNetworkOptions {
            restrict: true,
            ..to_host()
        },
    ] {
        let mut guest = Guest::new(&options);
        let targets = [
            GATEWAY,
            IpAddress::v4(127, 0, 0, 1),
            IpAddress::v4(0, 0, 0, 1),
        ];
        for (number, target) in (0..).zip(targets) {
            // smoltcp sends nothing to 0.0.0.0 itself.
            let handle = guest.connect(target, port, 40000 + number);
            assert!(!guest.is_connected(handle), "{target}");
        }
    }
}

#[test]
fn each_side_can_end_first() {
    let (listener, port) = listen();
    let mut guest = Guest::new(&to_host());
    for guest_is_first in [true, false] {
        let handle = guest.connect(GATEWAY, port, 40000 + u16::from(guest_is_first));
        assert!(guest.is_connected(handle));
        let (mut stream, _) = listener.accept().unwrap();
        if guest_is_first {
            guest.tcp(handle).send_slice(b"question").unwrap();
            guest.tcp(handle).close();
            let server = thread::spawn(move || {
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                stream.write_all(b"answer").unwrap();
                text
            });
            let answer = guest.wait(|guest| {
                let socket = guest.tcp(handle);
                let mut text = [0; 16];
                let size = socket.recv_slice(&mut text).ok()?;
                (size > 0).then(|| text[..size].to_vec())
            });
            assert_eq!(answer, b"answer");
            assert_eq!(server.join().unwrap(), "question");
        } else {
            stream.write_all(b"answer").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            guest.wait(|guest| (guest.tcp(handle).state() == tcp::State::CloseWait).then_some(()));
            let mut text = [0; 16];
            let size = guest.tcp(handle).recv_slice(&mut text).unwrap();
            assert_eq!(&text[..size], b"answer");
            guest.tcp(handle).send_slice(b"thanks").unwrap();
            guest.tcp(handle).close();
            let server = thread::spawn(move || {
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                text
            });
            guest.wait(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
            assert_eq!(server.join().unwrap(), "thanks");
        }
    }
}

#[test]
fn resets_reach_the_other_side() {
    let (listener, port) = listen();
    let mut guest = Guest::new(&to_host());
    let handle = guest.connect(GATEWAY, port, 40000);
    assert!(guest.is_connected(handle));
    let (stream, _) = listener.accept().unwrap();
    socket2::SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(stream);
    guest.wait(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));

    let handle = guest.connect(GATEWAY, port, 40001);
    assert!(guest.is_connected(handle));
    let (mut stream, _) = listener.accept().unwrap();
    guest.tcp(handle).abort();
    guest.poll();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn urgent_data_is_in_its_place_in_the_stream() {
    let (listener, port) = listen();
    let mut guest = Guest::new(&to_host());
    let handle = guest.connect(GATEWAY, port, 40000);
    assert!(guest.is_connected(handle));
    let (mut stream, _) = listener.accept().unwrap();
    let mut sent = Vec::new();
    for round in 0..5_usize {
        let bytes = pattern(1 + round * 700);
        stream.write_all(&bytes).unwrap();
        socket2::SockRef::from(&stream)
            .send_out_of_band(b"!")
            .unwrap();
        sent.extend(bytes);
        sent.push(b'!');
        guest.poll();
    }
    stream.write_all(b"the end").unwrap();
    sent.extend(b"the end");
    let mut received: Vec<u8> = Vec::new();
    guest.wait(|guest| {
        let mut bytes = [0; 4096];
        while let Ok(size @ 1..) = guest.tcp(handle).recv_slice(&mut bytes) {
            received.extend(&bytes[..size]);
        }
        (received.len() >= sent.len()).then_some(())
    });
    assert!(received == sent);
    // The other way goes on too.
    guest.tcp(handle).send_slice(b"thanks").unwrap();
    guest.poll();
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"thanks");
}

/// The guest acknowledges what is before urgent data and the urgent data together, and so what is removed from the
/// socket's queue at once is what the host's kernel does not read at once.
#[test]
fn urgent_data_may_be_acknowledged_with_what_is_around_it() {
    let (listener, port) = listen();
    for (number, is_old_host) in [(1, false), (2, true), (3, false), (7, false), (50, false)] {
        IS_OLD_HOST.set(is_old_host);
        let mut guest = Guest::new(&to_host());
        let handle = guest.connect(GATEWAY, port, 40000);
        assert!(guest.is_connected(handle));
        let (mut stream, _) = listener.accept().unwrap();
        let mut sent = Vec::new();
        for byte in 0..50 {
            stream.write_all(&[byte, byte]).unwrap();
            socket2::SockRef::from(&stream)
                .send_out_of_band(&[byte])
                .unwrap();
            sent.extend([byte; 3]);
            if (byte + 1) % number == 0 {
                guest.poll();
            }
        }
        stream.shutdown(Shutdown::Write).unwrap();
        let mut received: Vec<u8> = Vec::new();
        guest.wait(|guest| {
            let mut bytes = [0; 4096];
            while let Ok(size @ 1..) = guest.tcp(handle).recv_slice(&mut bytes) {
                received.extend(&bytes[..size]);
            }
            (guest.tcp(handle).state() != tcp::State::Established).then_some(())
        });
        assert_eq!(guest.tcp(handle).state(), tcp::State::CloseWait);
        assert_eq!(received, sent, "polled after {number} bytes");
        IS_OLD_HOST.set(false);
    }
}

#[test]
fn a_connection_may_be_idle_for_two_hours() {
    let port = echo_server(1);
    let mut guest = Guest::new(&to_host());
    let handle = guest.connect(GATEWAY, port, 40000);
    assert!(guest.is_connected(handle));
    let begin = Instant::now();
    assert_eq!(guest.exchange(handle, b"once"), b"once");
    let hours = |count: u64| Duration::from_secs(count * 3600);
    guest.cable.network.look_after_flows(begin + hours(2));
    assert_eq!(guest.exchange(handle, b"again"), b"again");
    guest.cable.network.look_after_flows(begin + hours(3));
    guest.wait(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
}

#[test]
fn connections_of_a_guest_that_is_gone_are_reset() {
    let (listener, port) = listen();
    let mut guest = Guest::new(&to_host());
    let handle = guest.connect(GATEWAY, port, 40000);
    assert!(guest.is_connected(handle));
    let (mut stream, _) = listener.accept().unwrap();
    guest.cable.network.reset();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // A guest that is restored from a snapshot still believes in its connections.
    guest.tcp(handle).send_slice(b"hello?").unwrap();
    guest.wait(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    // What it opens next works.
    let handle = guest.connect(GATEWAY, port, 40001);
    assert!(guest.is_connected(handle));
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let (listener, port) = listen();
    let mut guest = Guest::new(&to_host());
    let handle = guest.connect(GATEWAY, port, 40000);
    assert!(guest.is_connected(handle));
    let (mut stream, _) = listener.accept().unwrap();
    let bytes = pattern(24 << 20);
    let mut sent = 0;
    // As much as everything on the way takes.
    let mut rest_since = Instant::now();
    while rest_since.elapsed() < Duration::from_millis(500) {
        guest.poll();
        let socket = guest.tcp(handle);
        if socket.can_send() {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
            rest_since = Instant::now();
        }
    }
    assert!(sent < bytes.len(), "nothing holds it back");
    let expected = bytes.clone();
    let reader = thread::spawn(move || {
        let mut read = vec![0; expected.len()];
        stream.read_exact(&mut read).unwrap();
        read == expected
    });
    guest.wait(|guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
        }
        (sent == bytes.len() && socket.send_queue() == 0).then_some(())
    });
    assert!(reader.join().unwrap());
}

#[test]
fn many_connections_live_at_once() {
    const COUNT: u16 = 500;
    let port = echo_server(COUNT.into());
    let mut guest = Guest::new(&to_host());
    let handles: Vec<_> = (0..COUNT)
        .map(|number| {
            let handle = guest.add(tcp_socket(4096));
            let context = guest.interface.context();
            let socket = guest.sockets.get_mut::<tcp::Socket<'_>>(handle);
            socket
                .connect(context, (GATEWAY, port), 20000 + number)
                .unwrap();
            handle
        })
        .collect();
    for &handle in &handles {
        assert!(guest.is_connected(handle));
    }
    for (number, &handle) in handles.iter().enumerate() {
        let text = format!("connection {number}");
        assert_eq!(guest.exchange(handle, text.as_bytes()), text.as_bytes());
    }
}

#[test]
fn a_forwarded_port_leads_to_the_guest() {
    let mut guest = Guest::new(&forwarding("0:80"));
    let port = guest.cable.network.forwarded_ports().unwrap()[0];
    assert_ne!(port.host.port(), 0);
    let handle = guest.add(tcp_socket(1 << 16));
    guest.tcp(handle).listen(80).unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(port.host).unwrap();
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
}

#[test]
fn a_port_that_the_guest_does_not_serve_is_reset() {
    let mut guest = Guest::new(&forwarding("0:80"));
    let port = guest.cable.network.forwarded_ports().unwrap()[0];
    let client = thread::spawn(move || TcpStream::connect(port.host).unwrap().read(&mut [0]));
    guest.wait(|_| client.is_finished().then_some(()));
    let error = client.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let (_listener, port) = listen();
    let options = forwarding(&format!("{port}:80"));
    let Err(error) = UserNetwork::open(&options, MAC, MTU) else {
        panic!("the port is taken");
    };
    assert_eq!(
        error.to_string(),
        format!(
            "cannot forward tcp port 127.0.0.1:{port} of the host: another program has it; choose another \
             port, or 0 for any free one"
        )
    );
    let many = forwarding("10000-10999:1-1000");
    let twice = UserNetworkOptions {
        forwards: [many.forwards.clone(), many.forwards].concat(),
        ..UserNetworkOptions::default()
    };
    let Err(error) = UserNetwork::open(&twice, MAC, MTU) else {
        panic!("these are too many");
    };
    assert!(error.to_string().contains("2000 ports"), "{error}");
}

#[test]
fn datagrams_go_out_and_come_back() {
    for leave_checksums in [false, true] {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let echo = thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            for _ in 0..3 {
                let (size, peer) = server.recv_from(&mut bytes).unwrap();
                server.send_to(&bytes[..size], peer).unwrap();
            }
        });
        let mut guest = Guest::new(&to_host());
        guest.cable.network.leave_checksums(leave_checksums);
        let handle = guest.add(udp_socket(5000));
        for size in [0, 1, 60_001] {
            let bytes = pattern(size);
            guest
                .udp(handle)
                .send_slice(&bytes, (GATEWAY, port))
                .unwrap();
            guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
            let (answer, metadata) = guest.udp(handle).recv().unwrap();
            assert!(answer == bytes);
            assert_eq!(
                (metadata.endpoint.addr, metadata.endpoint.port),
                (GATEWAY, port)
            );
        }
        echo.join().unwrap();
    }
}

#[test]
fn datagrams_to_a_forwarded_port_are_answered_by_the_guest() {
    let mut guest = Guest::new(&forwarding("udp:0:53"));
    let port = guest.cable.network.forwarded_ports().unwrap()[0];
    let handle = guest.add(udp_socket(53));
    let clients: Vec<_> = (0..3)
        .map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap())
        .collect();
    for (number, client) in clients.iter().enumerate() {
        let text = format!("query {number}");
        client.send_to(text.as_bytes(), port.host).unwrap();
        guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
        let (query, metadata) = guest.udp(handle).recv().unwrap();
        assert_eq!(query, text.as_bytes());
        guest
            .udp(handle)
            .send_slice(text.as_bytes(), metadata.endpoint)
            .unwrap();
        client.set_nonblocking(true).unwrap();
        let mut bytes = [0; 64];
        let (size, from) = guest.wait(|_| client.recv_from(&mut bytes).ok());
        assert_eq!((&bytes[..size], from), (text.as_bytes(), port.host));
    }
}

#[test]
fn the_hosts_resolver_answers_and_a_silent_one_is_passed_over() {
    in_namespace(|| {
        let silent = UdpSocket::bind("127.0.0.1:53").unwrap();
        let server = UdpSocket::bind("127.0.0.53:53").unwrap();
        let tcp_server = TcpListener::bind("127.0.0.53:53").unwrap();
        thread::spawn(move || {
            let mut bytes = [0; 512];
            while let Ok((size, peer)) = server.recv_from(&mut bytes) {
                server.send_to(&bytes[..size], peer).unwrap();
            }
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "nameserver 127.0.0.1\nnameserver 127.0.0.53\n").unwrap();
        let options = UserNetworkOptions::default();
        let network = UserNetwork::open_with_resolver(&options, MAC, MTU, file.path()).unwrap();
        let mut guest = Guest::bare(network);
        guest.configure();
        let handle = guest.add(udp_socket(5000));
        guest.udp(handle).send_slice(b"first", (DNS, 53)).unwrap();
        silent.set_nonblocking(true).unwrap();
        let mut query = [0; 64];
        let (size, _) = guest.wait(|_| silent.recv_from(&mut query).ok());
        assert_eq!(&query[..size], b"first");
        thread::sleep(Duration::from_millis(1100));
        guest.udp(handle).send_slice(b"again", (DNS, 53)).unwrap();
        guest.wait(|guest| guest.udp(handle).can_recv().then_some(()));
        let (answer, metadata) = guest.udp(handle).recv().unwrap();
        assert_eq!((answer, metadata.endpoint.addr), (&b"again"[..], DNS));
        // Long answers are asked for by TCP.
        let handle = guest.connect(DNS, 53, 40000);
        assert!(guest.is_connected(handle));
        tcp_server.accept().unwrap();
    });
}

#[test]
fn other_hosts_are_reached_and_pinged() {
    in_namespace(|| {
        namespace::ip(&["address", "add", "192.0.2.7/32", "dev", "lo"]);
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
        let listener = TcpListener::bind("192.0.2.7:80").unwrap();
        let mut guest = Guest::new(&UserNetworkOptions::default());
        let other = IpAddress::v4(192, 0, 2, 7);
        let handle = guest.connect(other, 80, 40000);
        assert!(guest.is_connected(handle));
        listener.accept().unwrap();

        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(0x1234)).unwrap();
        let handle = guest.add(socket);
        for (number, target) in (1..).zip([GATEWAY, DNS, other]) {
            let request = Icmpv4Repr::EchoRequest {
                ident: 0x1234,
                seq_no: number,
                data: b"ping",
            };
            let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
            let bytes = socket.send(request.buffer_len(), target).unwrap();
            request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &Default::default());
            guest.wait(|guest| {
                let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
                let (bytes, from) = socket.recv().ok()?;
                let packet = Icmpv4Packet::new_checked(bytes).unwrap();
                let reply = Icmpv4Repr::parse(&packet, &Default::default()).unwrap();
                let expected = Icmpv4Repr::EchoReply {
                    ident: 0x1234,
                    seq_no: number,
                    data: b"ping",
                };
                assert_eq!((reply, from), (expected, target));
                Some(())
            });
        }
        assert_eq!(
            guest.interface.ipv4_addr().map(IpAddress::from),
            Some(ADDRESS)
        );
    });
}
