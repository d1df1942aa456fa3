//! The whole device against a test driver and a tap of this host.

use std::net::UdpSocket;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::*;
use crate::tap::QueueCount;

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Makes an Ethernet frame with a UDP datagram of `payload`, after an empty virtio header.
fn datagram(to_mac: [u8; 6], from: [u8; 4], to: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = 8 + payload.len() as u16;
    let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    header[2..4].copy_from_slice(&(20 + udp_len).to_be_bytes());
    header.extend(from);
    header.extend(to);
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&checksum.to_be_bytes());

    let mut packet = vec![0; PACKET_HEADER_SIZE];
    packet.extend(to_mac);
    packet.extend([2, 0, 0, 0, 0, 1, 8, 0]);
    packet.extend(header);
    // A checksum of zero means that there is none.
    for field in [9, port, udp_len, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

fn may_create_taps() -> bool {
    let may = nix::unistd::geteuid().is_root() && std::fs::exists("/dev/net/tun").unwrap();
    if !may {
        eprintln!("skipped: this user cannot create taps here");
    }
    may
}

/// Waits for the packet of `len` bytes that the host sends to the driver's address, among others that it
/// sends by itself. All of the driver's buffers have 256 bytes.
fn await_packet(machine: &mut Machine, len: usize) -> Vec<u8> {
    for _ in 0..500 {
        machine.manager.run_with_timeout(10).unwrap();
        let mut used = machine.receive.take_used().into_iter();
        while let Some((first, _)) = used.as_slice().first().copied() {
            let address = |head: u16| DATA + u64::from(head) * 256;
            let count = machine.bytes(address(first) + 10, 2);
            let mut packet = Vec::new();
            for (head, len) in used.by_ref().take(usize::from(count[0])) {
                packet.extend(machine.bytes(address(head), len as usize));
            }
            if packet.len() == len && packet[12..18] == [2, 0, 0, 0, 0, 1] {
                return packet;
            }
        }
    }
    panic!("no packet of {len} bytes has arrived");
}

#[test]
fn the_host_and_the_driver_exchange_packets() {
    if !may_create_taps() {
        return;
    }
    let name = format!("btest{}n", std::process::id());
    let tap = Tap::open(&name, Some(1500), QueueCount::Exactly(1)).unwrap();
    ip(&format!("addr add 198.51.100.5/30 dev {name}"));
    let mut card = net(tap, [2, 0, 0, 0, 0, 1], Some(1500));
    let features = card.features();
    let activate = |activation| card.activate(activation).unwrap();
    let mut machine = Machine::with(features, stand_in().1, activate);
    let mac = std::fs::read_to_string(format!("/sys/class/net/{name}/address")).unwrap();
    let mac: Vec<u8> = mac
        .trim()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();

    let socket = UdpSocket::bind("198.51.100.5:0").unwrap();
    let timeout = std::time::Duration::from_secs(5);
    socket.set_read_timeout(Some(timeout)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let (guest, host) = ([198, 51, 100, 6], [198, 51, 100, 5]);
    let greeting = datagram(mac.try_into().unwrap(), guest, host, port, b"hello, host");
    machine.transmit(&greeting, &[12, 14]);
    machine.run();
    assert_eq!(machine.transmit.take_used().len(), 1);
    let mut bytes = [0; 64];
    let len = socket.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"hello, host");

    ip(&format!(
        "neigh replace 198.51.100.6 lladdr 02:00:00:00:00:01 dev {name}"
    ));
    machine.offer_receive_buffers(&[256; 200]);
    machine.run();
    let payload = [0x5a; 600];
    socket.send_to(&payload, "198.51.100.6:9").unwrap();
    let headers = PACKET_HEADER_SIZE + 14 + 20 + 8;
    let packet_received = await_packet(&mut machine, headers + 600);
    assert_eq!(packet_received[10..12], [3, 0], "three buffers");
    assert_eq!(packet_received[headers..], payload);

    if features & 1 << VIRTIO_NET_F_GUEST_USO4 != 0 {
        // Four datagrams, which the host leaves to the driver to split.
        setsockopt(&socket, UdpGsoSegment, &1000).unwrap();
        let payload = packet(4000, 3);
        socket.send_to(&payload, "198.51.100.6:9").unwrap();
        let packet_received = await_packet(&mut machine, headers + 4000);
        assert_eq!(u32::from(packet_received[1]), VIRTIO_NET_HDR_GSO_UDP_L4);
        assert_eq!(packet_received[4..6], 1000u16.to_le_bytes());
        assert_eq!(packet_received[headers..], payload);
    }

    // A tap that is down refuses packets; they are dropped. One that is removed takes the rest.
    ip(&format!("link set {name} down"));
    machine.transmit(&greeting, &[]);
    machine.run();
    assert_eq!(machine.transmit.take_used().len(), 1);
    ip(&format!("link del {name}"));
    machine.run();
    machine.transmit(&greeting, &[]);
    machine.run();
    assert_eq!(machine.transmit.take_used().len(), 1);
    assert!(!machine.link.needs_reset());
}

/// Computes the ones' complement sum of the addresses and the datagram of a frame, which is 0xffff if the
/// checksum is right.
fn udp_sum(ip: &[u8]) -> u16 {
    let length = (ip.len() - 20) as u16;
    let pseudo_header = [&ip[12..20], &[0, 17], &length.to_be_bytes()].concat();
    let sum: u32 = [&pseudo_header, &ip[20..]]
        .concat()
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum();
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The host's own datagrams leave their checksum to the driver, except those of a DHCP server.
#[test]
fn what_a_dhcp_server_on_the_host_sends_has_its_checksum() {
    if !may_create_taps() {
        return;
    }
    // The port is free in this test's own network namespace.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let tap = Tap::open("tap0", None, QueueCount::Exactly(1)).unwrap();
    ip("addr add 198.51.100.5/30 dev tap0");
    ip("neigh replace 198.51.100.6 lladdr 02:00:00:00:00:01 dev tap0");
    let mut card = net(tap, [2, 0, 0, 0, 0, 1], None);
    let features = card.features();
    assert_ne!(features & 1 << VIRTIO_NET_F_GUEST_CSUM, 0);
    let activate = |activation| card.activate(activation).unwrap();
    let mut machine = Machine::with(features, stand_in().1, activate);
    machine.offer_receive_buffers(&[256; 200]);
    machine.run();
    for (port, is_complete) in [(67, true), (66, false), (547, false)] {
        let socket = UdpSocket::bind(("0.0.0.0", port)).unwrap();
        // A packet in a single buffer, and one in two.
        for size in [150, 301] {
            socket.send_to(&packet(size, 9), "198.51.100.6:68").unwrap();
            let headers = PACKET_HEADER_SIZE + 14;
            let received = await_packet(&mut machine, headers + 28 + size);
            let needs_checksum = u32::from(received[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
            assert_eq!(needs_checksum, !is_complete, "{size} bytes of port {port}");
            let sum = udp_sum(&received[headers..]);
            assert_eq!(sum == 0xffff, is_complete, "{size} bytes of port {port}");
        }
    }
}

/// Returns the sizes of the datagrams that arrive, up to one of `last` bytes. All of the driver's buffers
/// have 256 bytes, and no datagram is larger than a buffer.
fn sizes_up_to(machine: &mut Machine, last: usize) -> Vec<usize> {
    const HEADERS: usize = PACKET_HEADER_SIZE + 14 + 20 + 8;
    let mut sizes = Vec::new();
    for _ in 0..500 {
        machine.manager.run_with_timeout(10).unwrap();
        for (head, len) in machine.receive.take_used() {
            let packet = machine.bytes(DATA + u64::from(head) * 256, len as usize);
            // Packets that the host sends by itself are not UDP to the port "discard".
            if packet.get(HEADERS - 6..HEADERS - 4) == Some(&[0, 9]) {
                sizes.push(packet.len() - HEADERS);
            }
        }
        if sizes.last() == Some(&last) {
            return sizes;
        }
    }
    panic!("no datagram of {last} bytes has arrived, but {sizes:?}");
}

#[test]
fn the_host_filters_frames_as_the_driver_commands() {
    if !may_create_taps() {
        return;
    }
    let name = format!("btest{}f", std::process::id());
    let tap = Tap::open(&name, None, QueueCount::Exactly(1)).unwrap();
    ip(&format!("addr add 198.51.100.9/29 dev {name}"));
    let neighbours = [
        (10, "02:00:00:00:00:01"),
        (11, "02:00:00:00:00:02"),
        (12, "01:00:5e:00:00:77"),
    ];
    for (host, mac) in neighbours {
        ip(&format!(
            "neigh replace 198.51.100.{host} lladdr {mac} dev {name}"
        ));
    }
    let socket = UdpSocket::bind("198.51.100.9:0").unwrap();
    // To the card, to another card, to a group, and to the card.
    let send = |first: u8| {
        for (size, host) in (first..).zip([10, 11, 12, 10]) {
            let target = format!("198.51.100.{host}:9");
            socket.send_to(&vec![0; size.into()], target).unwrap();
        }
    };
    let mut card = net(tap, MAC, None);
    let features = card.features() & !GUEST_OFFLOADS;
    let activate = |activation| card.activate(activation).unwrap();
    let mut machine = Machine::with(features, stand_in().1, activate);
    machine.offer_receive_buffers(&[256; 200]);
    machine.run();
    send(10);
    assert_eq!(sizes_up_to(&mut machine, 13), [10, 11, 12, 13]);
    assert_eq!(machine.command(&[0, 0, 0]), 0);
    send(20);
    assert_eq!(sizes_up_to(&mut machine, 23), [20, 23]);
    assert_eq!(machine.command(&[0, 1, 1]), 0);
    send(30);
    assert_eq!(sizes_up_to(&mut machine, 33), [30, 32, 33]);
    assert_eq!(machine.command(&[0, 1, 0]), 0);
    let table = [1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0];
    assert_eq!(machine.command(&table), 0);
    send(40);
    assert_eq!(sizes_up_to(&mut machine, 43), [40, 41, 43]);
    // The card now has the other address.
    assert_eq!(machine.command(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(machine.command(&[1, 1, 2, 0, 0, 0, 0, 2]), 0);
    send(50);
    assert_eq!(machine.command(&[0, 0, 1]), 0);
    send(60);
    assert_eq!(sizes_up_to(&mut machine, 63), [51, 60, 61, 62, 63]);

    // The next driver has set no filter.
    assert_eq!(machine.command(&[0, 0, 0]), 0);
    drop(machine.manager.remove_subscriber(machine.worker).unwrap());
    assert_eq!(card.config().array(0), MAC);
    let activate = |activation| card.activate(activation).unwrap();
    let mut machine = Machine::with(features, stand_in().1, activate);
    machine.offer_receive_buffers(&[256; 200]);
    machine.run();
    send(70);
    assert_eq!(sizes_up_to(&mut machine, 73), [70, 71, 72, 73]);
}

#[test]
fn offloads_are_switched_at_run_time() {
    if !may_create_taps() {
        return;
    }
    let name = format!("btest{}o", std::process::id());
    let tap = Tap::open(&name, None, QueueCount::Exactly(1)).unwrap();
    let mut card = net(tap, MAC, None);
    let negotiated = card.features() & GUEST_OFFLOADS;
    assert_ne!(negotiated & 1 << VIRTIO_NET_F_GUEST_TSO6, 0);
    let features = card.features() & !(1 << VIRTIO_NET_F_GUEST_TSO4);
    let activate = |activation| card.activate(activation).unwrap();
    let mut machine = Machine::with(features, stand_in().1, activate);
    for (offloads, answer) in [
        (0, 0),
        (1 << VIRTIO_NET_F_GUEST_CSUM, 0),
        (negotiated, 1),
        (negotiated & features, 0),
        (1 << VIRTIO_NET_F_MAC, 1),
    ] {
        let command = [&[5, 0][..], &u64::to_le_bytes(offloads)].concat();
        assert_eq!(machine.command(&command), answer, "{offloads:#x}");
    }
}

/// The rings of a second pair of queues.
const SECOND_RECEIVE_RINGS: u64 = CONTROL_RINGS + RINGS_SIZE;
const SECOND_TRANSMIT_RINGS: u64 = SECOND_RECEIVE_RINGS + RINGS_SIZE;
const _: () = assert!(SECOND_TRANSMIT_RINGS + RINGS_SIZE <= DATA);

#[test]
fn pairs_of_queues_are_used_as_the_driver_commands() {
    if !may_create_taps() {
        return;
    }
    let name = format!("btest{}q", std::process::id());
    let tap = Tap::open(&name, None, QueueCount::Exactly(2)).unwrap();
    ip(&format!("addr add 198.51.100.17/30 dev {name}"));
    let attached = || std::fs::read_dir(format!("/sys/class/net/{name}/queues")).unwrap();
    let queues_in_use = || {
        let names = attached().map(|entry| entry.unwrap().file_name());
        names
            .filter(|name| name.as_encoded_bytes().starts_with(b"tx"))
            .count()
    };
    let mac = std::fs::read_to_string(format!("/sys/class/net/{name}/address")).unwrap();
    let mac: Vec<u8> = mac
        .trim()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    let mac: [u8; 6] = mac.try_into().unwrap();
    let socket = UdpSocket::bind("198.51.100.17:0").unwrap();
    let timeout = std::time::Duration::from_secs(5);
    socket.set_read_timeout(Some(timeout)).unwrap();
    let port = socket.local_addr().unwrap().port();

    let mut card = net(tap, MAC, None);
    assert_eq!(card.config().array(8), [2, 0]);
    assert_eq!(card.queue_max_sizes().len(), 5);
    let features = card.features();
    let mut second = None;
    let mut machine = Machine::with(features, stand_in().1, |mut activation| {
        let receive = TestDriver::new(&activation.memory, SECOND_RECEIVE_RINGS, 256);
        let transmit = TestDriver::new(&activation.memory, SECOND_TRANSMIT_RINGS, 256);
        let control = activation.queues.pop().unwrap();
        let event_index = features & F_EVENT_IDX != 0;
        activation.queues.push(receive.queue(2, event_index));
        activation.queues.push(transmit.queue(3, event_index));
        activation.queues.push(control);
        second = Some((receive, transmit));
        card.activate(activation).unwrap()
    });
    let (mut second_receive, mut second_transmit) = second.unwrap();
    let datagram =
        |payload: &[u8]| datagram(mac, [198, 51, 100, 18], [198, 51, 100, 17], port, payload);
    let mut send = |machine: &mut Machine, payload: &[u8]| {
        let packet = datagram(payload);
        machine
            .memory
            .write_slice(&packet, GuestAddress(DATA))
            .unwrap();
        second_transmit.offer(&[readable(DATA, packet.len() as u32)]);
        second_transmit.ring_doorbell();
        machine.run();
        second_transmit.take_used().len()
    };
    let arrived = |payload: &[u8]| {
        let mut bytes = [0; 64];
        let len = socket.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], payload);
    };

    assert_eq!(queues_in_use(), 1);
    assert_eq!(
        send(&mut machine, b"early"),
        0,
        "the pair is not in use yet"
    );
    for (pairs, answer) in [(0, 1), (3, 1), (2, 0)] {
        assert_eq!(machine.command(&[4, 0, pairs, 0]), answer, "{pairs}");
    }
    assert_eq!(queues_in_use(), 2);
    arrived(b"early");
    assert_eq!(send(&mut machine, b"second"), 2);
    arrived(b"second");

    // The host answers on the queue that a connection's packets came from.
    for number in 0..32 {
        second_receive.offer(&[writable(DATA + 0x8000 + number * 2048, 2048)]);
    }
    second_receive.ring_doorbell();
    machine.run();
    ip(&format!(
        "neigh replace 198.51.100.18 lladdr 02:00:00:00:00:01 dev {name}"
    ));
    socket.send_to(&[0x77; 900], "198.51.100.18:9").unwrap();
    let mut received = false;
    for _ in 0..500 {
        machine.manager.run_with_timeout(10).unwrap();
        let used = second_receive.take_used();
        received |= used
            .iter()
            .any(|&(_, len)| len as usize == PACKET_HEADER_SIZE + 42 + 900);
        if received {
            break;
        }
    }
    assert!(received, "the second pair has received nothing");

    assert_eq!(machine.command(&[4, 0, 1, 0]), 0);
    assert_eq!(queues_in_use(), 1);
    assert_eq!(
        send(&mut machine, b"late"),
        0,
        "the pair is out of use again"
    );
    assert_eq!(machine.turn(), 0, "what is out of use costs nothing");
    // Another worker goes on with both pairs.
    assert_eq!(machine.command(&[4, 0, 2, 0]), 0);
    arrived(b"late");
    let worker = machine.pause();
    let (progress, state) = (worker.progress(), worker.save().unwrap());
    drop(worker);
    assert_eq!(queues_in_use(), 1);
    let drivers = [
        &machine.receive,
        &machine.transmit,
        &second_receive,
        &second_transmit,
        &machine.control,
    ];
    assert_eq!(progress.len(), drivers.len());
    let queues = (0..).zip(drivers).zip(progress);
    let event_index = features & F_EVENT_IDX != 0;
    let queues =
        queues.map(|((index, driver), progress)| driver.queue_from(index, event_index, progress));
    let activation = Activation {
        memory: machine.memory.clone(),
        features,
        queues: queues.collect(),
        link: machine.link.clone(),
        state,
    };
    let worker = card.activate(activation).unwrap();
    assert_eq!(queues_in_use(), 2);
    machine.resume(worker);
    let packet = datagram(b"after");
    let place = GuestAddress(DATA);
    machine.memory.write_slice(&packet, place).unwrap();
    second_transmit.offer(&[readable(DATA, packet.len() as u32)]);
    second_transmit.ring_doorbell();
    machine.run();
    arrived(b"after");
    // The next driver begins with one pair.
    drop(machine.manager.remove_subscriber(machine.worker).unwrap());
    assert_eq!(queues_in_use(), 1);
    assert!(!machine.link.needs_reset());
}

#[test]
fn another_worker_sets_up_its_tap_as_the_driver_has_commanded() {
    if !may_create_taps() {
        return;
    }
    let name = format!("btest{}s", std::process::id());
    let tap = Tap::open(&name, None, QueueCount::Exactly(1)).unwrap();
    ip(&format!("addr add 198.51.100.25/29 dev {name}"));
    for (host, mac) in [(26, "02:00:00:00:00:01"), (27, "02:00:00:00:00:02")] {
        ip(&format!(
            "neigh replace 198.51.100.{host} lladdr {mac} dev {name}"
        ));
    }
    let socket = UdpSocket::bind("198.51.100.25:0").unwrap();
    let send = |first: u8| {
        for (size, host) in (first..).zip([27, 26]) {
            let target = format!("198.51.100.{host}:9");
            socket.send_to(&vec![0; size.into()], target).unwrap();
        }
    };
    let mut card = net(tap, MAC, None);
    let features = card.features();
    let activate = |activation| card.activate(activation).unwrap();
    let mut machine = Machine::with(features, stand_in().1, activate);
    machine.offer_receive_buffers(&[256; 200]);
    assert_eq!(machine.command(&[0, 0, 0]), 0);
    assert_eq!(machine.command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    send(10);
    assert_eq!(sizes_up_to(&mut machine, 11), [11]);

    // The tap does not notice a pause in place: packets that it queues meanwhile are not lost.
    let worker = machine.pause();
    send(20);
    machine.resume(worker);
    assert_eq!(sizes_up_to(&mut machine, 21), [21]);

    let worker = machine.pause();
    let activation = machine.activation(features, &*worker);
    // The tap is then like a new one.
    drop(worker);
    let worker = card.activate(activation).unwrap();
    send(30);
    machine.resume(worker);
    assert_eq!(sizes_up_to(&mut machine, 31), [31]);

    socket.send_to(&packet(150, 9), "198.51.100.26:9").unwrap();
    let headers = PACKET_HEADER_SIZE + 14;
    let received = await_packet(&mut machine, headers + 28 + 150);
    assert_eq!(received[0], 0, "nothing is left to the driver");
    assert_eq!(udp_sum(&received[headers..]), 0xffff);
}
