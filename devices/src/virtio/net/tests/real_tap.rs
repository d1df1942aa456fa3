//! The whole device against a driver of our own and a tap of this host.

use std::net::UdpSocket;
use std::process::Command;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_HDR_GSO_UDP_L4;

use super::*;
use crate::tap::QueueCount;

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// An Ethernet frame with a UDP datagram of `payload`, after an empty virtio header.
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
    // A checksum of zero is none.
    for field in [9, port, udp_len, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

/// Waits for the packet of `len` bytes that the host sends to the driver's address, among others
/// that it sends of itself; the driver's buffers are all of 256 bytes.
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
    let name = format!("btest{}n", std::process::id());
    if !nix::unistd::geteuid().is_root() || !std::fs::exists("/dev/net/tun").unwrap() {
        eprintln!("skipped: this user cannot create taps here");
        return;
    }
    let tap = Tap::open(&name, Some(1500), QueueCount::Exactly(1)).unwrap();
    ip(&format!("addr add 198.51.100.5/30 dev {name}"));
    let mut net = Net::new(tap, [2, 0, 0, 0, 0, 1], Some(1500));
    let features = net.features();
    let activate = |activation| net.activate(activation).unwrap();
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
        // Four datagrams, which the host leaves to the driver to part.
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
    assert!(!machine.interrupt.needs_reset());
}
