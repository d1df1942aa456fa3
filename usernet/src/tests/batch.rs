//! Datagrams of a burst, which leave together.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use super::guest::{Bytes, MAC, MTU};
use super::to_host;
use crate::UserNetwork;
use crate::wire::{Route, Udp};

fn datagram(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let route = Route {
        source_mac: MAC,
        destination_mac: [0x52, 0x55, 10, 0, 2, 2],
        source: Ipv4Addr::new(10, 0, 2, 15).into(),
        destination: Ipv4Addr::new(10, 0, 2, 2).into(),
    };
    Udp::frame(&route, source, destination, payload)
}

fn server() -> (UdpSocket, u16) {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let limit = Some(Duration::from_secs(5));
    server.set_read_timeout(limit).unwrap();
    let port = server.local_addr().unwrap().port();
    (server, port)
}

#[test]
fn bursts_arrive_whole_and_in_order() {
    let (first, first_port) = server();
    let (second, second_port) = server();
    let mut network = UserNetwork::open(&to_host(), MAC, MTU).unwrap();
    // Runs of equal sizes, longer than the host takes at once, single ones, none at all, and large ones.
    let sizes = [22; 100]
        .into_iter()
        .chain([23, 22, 22, 0, 22, 1472, 1472, 1473, 9000, 22]);
    let payloads: Vec<Vec<u8>> = (0..).zip(sizes).map(|(n, size)| vec![n; size]).collect();
    for (index, payload) in payloads.iter().enumerate() {
        network.send(&mut Bytes(datagram(1000, first_port, payload)));
        if index % 30 == 29 {
            network.send(&mut Bytes(datagram(1000, second_port, payload)));
        }
    }
    network.flush();
    let mut bytes = vec![0; 1 << 16];
    for payload in &payloads {
        let size = first.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..size], payload);
    }
    for payload in payloads.iter().skip(29).step_by(30) {
        let size = second.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..size], payload);
    }
}

#[test]
fn a_burst_survives_the_report_of_an_earlier_loss() {
    let (server, port) = server();
    drop(server);
    let mut network = UserNetwork::open(&to_host(), MAC, MTU).unwrap();
    network.send(&mut Bytes(datagram(1000, port, b"lost")));
    network.flush();
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let limit = Some(Duration::from_secs(5));
    server.set_read_timeout(limit).unwrap();
    for number in 0..10 {
        network.send(&mut Bytes(datagram(1000, port, &[number])));
    }
    network.flush();
    for number in 0..10 {
        let mut bytes = [0; 2];
        assert_eq!(server.recv(&mut bytes).unwrap(), 1);
        assert_eq!(bytes[0], number);
    }
}
