//! Programs on the host with a small backlog.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{Backlog, listen};

use super::guest::{Guest, QUEUE_SIZE, packet, with};
use crate::virtio::vsock::packet::{operation, shutdown};
use crate::virtio::vsock::waiting::MAX_WAITING;

const LIMIT: Duration = Duration::from_secs(30);

/// How many connections Linux lets wait with a backlog of 1.
const FIRST: usize = 2;

fn listener_with_backlog_of_one(guest: &Guest) -> UnixListener {
    let listener = guest.listen(53);
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    listener
}

fn request(guest: &mut Guest, ports: std::ops::Range<u32>) {
    for port in ports {
        guest.transmit(packet(port, 53, operation::REQUEST), &[]);
    }
}

/// Returns the guest ports of the packets that have arrived, which are all for `operation`.
#[track_caller]
fn ports(guest: &mut Guest, operation: u16) -> Vec<u32> {
    let packets = guest.received();
    packets
        .into_iter()
        .map(|packet| {
            assert_eq!(packet.header.operation, operation, "{packet:?}");
            packet.header.dst_port
        })
        .collect()
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

#[test]
fn a_burst_waits_until_the_program_accepts() {
    const COUNT: usize = 20;
    let mut guest = Guest::ready();
    let listener = listener_with_backlog_of_one(&guest);
    request(&mut guest, 1000..1000 + COUNT as u32);
    let mut connected = ports(&mut guest, operation::RESPONSE);
    assert_eq!(connected, [1000, 1001]);
    guest.assert_works();
    let deadline = Instant::now() + LIMIT;
    let mut accepted = Vec::new();
    while accepted.len() < COUNT {
        assert!(Instant::now() < deadline, "{connected:?}");
        if accepted.len() < connected.len() {
            accepted.push(accept(&listener));
        } else {
            guest.manager.run_with_timeout(100).unwrap();
        }
        connected.extend(ports(&mut guest, operation::RESPONSE));
    }
    connected.sort_unstable();
    let expected: Vec<_> = (1000..1000 + COUNT as u32).collect();
    assert_eq!(connected, expected);
    // The program gets them in the order in which the guest asked.
    for (port, stream) in expected.into_iter().zip(&mut accepted) {
        guest.transmit(packet(port, 53, operation::RW), &port.to_le_bytes());
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), port);
    }
    assert_eq!(guest.metrics.conns_killed.total(), 0);
    assert_eq!(guest.metrics.conns_added.total(), COUNT as u64 + 1);
}

#[test]
fn a_guest_may_stop_waiting() {
    let mut guest = Guest::ready();
    let listener = listener_with_backlog_of_one(&guest);
    request(&mut guest, 1000..1005);
    assert_eq!(ports(&mut guest, operation::RESPONSE).len(), FIRST);
    guest.transmit(packet(1002, 53, operation::RST), &[]);
    guest.assert_silent();
    let shut_down = with(packet(1003, 53, 0), operation::SHUTDOWN, shutdown::BOTH);
    guest.transmit(shut_down, &[]);
    assert_eq!(ports(&mut guest, operation::RST), [1003]);
    // One that asks again goes on waiting.
    request(&mut guest, 1004..1005);
    guest.assert_silent();
    let _accepted: Vec<_> = (0..FIRST).map(|_| accept(&listener)).collect();
    let deadline = Instant::now() + LIMIT;
    loop {
        guest.manager.run_with_timeout(100).unwrap();
        let connected = ports(&mut guest, operation::RESPONSE);
        if !connected.is_empty() {
            assert_eq!(connected, [1004]);
            break;
        }
        assert!(Instant::now() < deadline);
    }
    let _accepted = accept(&listener);
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
}

#[test]
fn a_program_that_ends_refuses_those_that_wait() {
    let mut guest = Guest::ready();
    let listener = listener_with_backlog_of_one(&guest);
    request(&mut guest, 1000..1004);
    assert_eq!(ports(&mut guest, operation::RESPONSE).len(), FIRST);
    drop(listener);
    let deadline = Instant::now() + LIMIT;
    let mut refused = Vec::new();
    while refused.len() < 2 {
        assert!(Instant::now() < deadline);
        guest.manager.run_with_timeout(100).unwrap();
        let packets = guest.received().into_iter();
        let reset = packets.filter(|packet| packet.header.operation == operation::RST);
        refused.extend(reset.map(|packet| packet.header.dst_port));
        // The program had not accepted the others, so they end too.
        refused.retain(|&port| port >= 1002);
    }
    refused.sort_unstable();
    assert_eq!(refused, [1002, 1003]);
}

#[test]
fn those_that_wait_are_bounded_and_end_with_the_device() {
    let mut guest = Guest::ready();
    let _listener = listener_with_backlog_of_one(&guest);
    let most = 1000 + (FIRST + MAX_WAITING) as u32;
    request(&mut guest, 1000..most);
    assert_eq!(ports(&mut guest, operation::RESPONSE).len(), FIRST);
    request(&mut guest, most..most + 1);
    assert_eq!(ports(&mut guest, operation::RST), [most]);
    guest.assert_works();
    guest.reset();
    guest.offer_buffers(QUEUE_SIZE);
    guest.assert_works();
    assert!(guest.metrics.conns_removed.total() > MAX_WAITING as u64);
}
