//! The device with a scripted driver at one end and programs on the host at the other.

mod backlog;
mod guest;
mod limits;
mod suspend;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::credit::BUFFER_SIZE;
use super::packet::{HEADER_SIZE, HOST_CID, Header, operation, shutdown};
use crate::virtio::VirtioDevice;
use crate::virtio::test_driver::Buffer;
use guest::{GUEST_CID, Guest, QUEUE_SIZE, RECEIVE_DATA, answer, packet, with};

/// Whether the other end has closed the stream.
fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
            true
        }
    }
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len)
        .map(|index| (index * 7 + index / 251) as u8)
        .collect()
}

#[test]
fn the_driver_reads_the_cid() {
    let guest = Guest::new();
    assert_eq!(guest.device.config().array(0), GUEST_CID.to_le_bytes());
    assert_eq!(guest.device.device_id(), 19);
}

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"CONNECT 52\nearly").unwrap();
    let request = guest.received_one(operation::REQUEST);
    assert!(request.src_port >= 1 << 30);
    assert_eq!(request.buf_alloc, BUFFER_SIZE);
    guest.transmit(answer(&request, operation::RESPONSE), &[]);
    let packets = guest.received();
    assert_eq!(packets.len(), 1, "{packets:?}");
    assert_eq!(packets[0].data, b"early");
    let sent = bytes(40_000);
    client.write_all(&sent).unwrap();
    let packets = guest.received();
    assert!(
        packets
            .iter()
            .all(|packet| packet.header.operation == operation::RW)
    );
    let data: Vec<u8> = packets.into_iter().flat_map(|packet| packet.data).collect();
    assert!(data == sent);
    assert_eq!(guest.metrics.rx_bytes_count.total(), 40_005);
    assert_eq!(guest.metrics.conns_added.total(), 1);
}

#[test]
fn the_guest_reaches_a_program_of_the_host() {
    let mut guest = Guest::ready();
    let (mut program, packet) = guest.connected_by_guest();
    let sent = bytes(10_000);
    guest.transmit(packet, &sent);
    let mut data = vec![0; sent.len()];
    program.read_exact(&mut data).unwrap();
    assert!(data == sent);
    program.write_all(b"answer").unwrap();
    let packets = guest.received();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].data, b"answer");
    assert_eq!(packets[0].header.fwd_cnt, sent.len() as u32);
    assert_eq!(guest.metrics.tx_bytes_count.total(), sent.len() as u64);
}

#[test]
fn what_does_not_exist_is_refused() {
    let mut guest = Guest::ready();
    guest.transmit(packet(1000, 53, operation::REQUEST), &[]);
    let reply = guest.received_one(operation::RST);
    assert_eq!((reply.src_port, reply.dst_port), (53, 1000));
    for operation in [0, 2, 4, 5, 6, 7, 8, 0xffff] {
        guest.transmit(packet(1000, 53, operation), b"data");
        guest.received_one(operation::RST);
    }
    guest.transmit(packet(1000, 53, operation::RST), &[]);
    guest.assert_silent();
    let mut other_type = packet(1000, 53, operation::REQUEST);
    other_type.socket_type = 2;
    guest.transmit(other_type, &[]);
    assert_eq!(guest.received_one(operation::RST).socket_type, 2);
    for (src_cid, dst_cid) in [(GUEST_CID, 3), (GUEST_CID + 1, HOST_CID), (1 << 32, 2)] {
        let packet = Header {
            src_cid,
            dst_cid,
            ..packet(1000, 53, operation::REQUEST)
        };
        guest.transmit(packet, &[]);
        guest.assert_silent();
    }
    guest.assert_works();
}

#[test]
fn the_guest_refuses() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.received_one(operation::REQUEST);
    guest.transmit(answer(&request, operation::RST), &[]);
    assert!(is_closed(&mut client));
    guest.assert_silent();
    assert_eq!(guest.metrics.conns_killed.total(), 1);
    assert_eq!(guest.metrics.conns_removed.total(), 1);
}

#[test]
fn a_program_that_says_something_else_is_turned_away() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    guest.assert_silent();
    assert!(is_closed(&mut client));
    assert_eq!(guest.metrics.conns_added.total(), 0);
    assert_eq!(guest.metrics.conns_removed.total(), 0);
}

#[test]
fn each_side_can_end_its_direction_first() {
    let mut guest = Guest::ready();
    // The guest.
    let (mut program, packet) = guest.connected_by_guest();
    guest.transmit(packet, b"last words");
    let ended = with(packet, operation::SHUTDOWN, shutdown::SEND);
    guest.transmit(ended, &[]);
    let mut text = String::new();
    program.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
    program.write_all(b"answer").unwrap();
    assert_eq!(guest.received()[0].data, b"answer");
    program.shutdown(Shutdown::Write).unwrap();
    let reply = guest.received_one(operation::SHUTDOWN);
    assert_eq!(reply.flags, shutdown::BOTH);
    guest.transmit(with(packet, operation::RST, 0), &[]);
    guest.assert_silent();

    // The program of the host.
    let (mut client, packet) = guest.connected_by_host(52);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let packets = guest.received();
    assert_eq!(packets[0].data, b"question");
    assert_eq!(packets[1].header.operation, operation::SHUTDOWN);
    assert_eq!(packets[1].header.flags, shutdown::SEND);
    guest.transmit(packet, b"answer");
    guest.transmit(with(packet, operation::SHUTDOWN, shutdown::BOTH), &[]);
    guest.received_one(operation::RST);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
    assert_eq!(guest.metrics.conns_removed.total(), 2);
    assert_eq!(guest.metrics.conns_killed.total(), 0);
}

#[test]
fn a_guest_that_receives_no_more_stops_the_program() {
    let mut guest = Guest::ready();
    let (mut program, packet) = guest.connected_by_guest();
    guest.transmit(with(packet, operation::SHUTDOWN, shutdown::RECEIVE), &[]);
    let error = program.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    guest.transmit(packet, b"still sending");
    let mut data = [0; 13];
    program.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"still sending");
    guest.assert_silent();
}

#[test]
fn a_program_that_leaves_ends_the_connection() {
    let mut guest = Guest::ready();
    let (mut client, packet) = guest.connected_by_host(52);
    client.write_all(b"bye").unwrap();
    drop(client);
    let packets = guest.received();
    assert_eq!(packets.len(), 2, "{packets:?}");
    assert_eq!(packets[0].data, b"bye");
    assert_eq!(packets[1].header.operation, operation::SHUTDOWN);
    assert_eq!(packets[1].header.flags, shutdown::BOTH);
    // Data of the guest that is still on its way is dropped.
    guest.transmit(packet, b"late");
    guest.assert_silent();
    guest.transmit(with(packet, operation::RST, 0), &[]);
    assert_eq!(guest.metrics.conns_removed.total(), 1);
    assert_eq!(guest.metrics.conns_killed.total(), 0);
}

#[test]
fn a_reset_of_the_guest_closes_the_stream() {
    let mut guest = Guest::ready();
    let (mut client, packet) = guest.connected_by_host(52);
    guest.transmit(with(packet, operation::RST, 0), &[]);
    assert!(is_closed(&mut client));
    guest.assert_silent();
    assert_eq!(guest.metrics.conns_killed.total(), 1);
}

#[test]
fn wrong_packets_of_a_connection_reset_it() {
    let mut guest = Guest::ready();
    for operation in [0, operation::REQUEST, operation::RESPONSE, 8] {
        let (mut client, packet) = guest.connected_by_host(52);
        guest.transmit(with(packet, operation, 0), &[]);
        guest.received_one(operation::RST);
        assert!(is_closed(&mut client));
    }
    let (_client, packet) = guest.connected_by_host(52);
    guest.transmit(with(packet, operation::SHUTDOWN, shutdown::SEND), &[]);
    guest.transmit(packet, b"after the end");
    guest.received_one(operation::RST);
    // A connection that has yet to be answered.
    let mut client = guest.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.received_one(operation::REQUEST);
    guest.transmit(answer(&request, operation::RW), b"x");
    guest.received_one(operation::RST);
    assert!(is_closed(&mut client));
    guest.assert_works();
}

#[test]
fn a_broken_packet_needs_a_reset() {
    let good = packet(1000, 53, operation::RW);
    let long = Header { len: 5, ..good };
    for (header, data) in [
        (&good.to_bytes()[..HEADER_SIZE - 1], &b""[..]),
        (&long.to_bytes()[..], b"1234"),
    ] {
        let mut guest = Guest::ready();
        let (mut client, _) = guest.connected_by_host(52);
        guest.transmit_raw(header, data);
        assert!(guest.link.needs_reset());
        assert!(is_closed(&mut client));
        assert_eq!(guest.metrics.tx_queue_event_fails.total(), 1);
        guest.reset();
        guest.offer_buffers(QUEUE_SIZE);
        guest.assert_works();
    }
    // More bytes than the header says are ignored.
    let mut guest = Guest::ready();
    let (mut program, packet) = guest.connected_by_guest();
    let header = Header { len: 2, ..packet };
    guest.transmit_raw(&header.to_bytes(), b"1234");
    guest.transmit(with(packet, operation::SHUTDOWN, shutdown::SEND), &[]);
    let mut text = String::new();
    program.read_to_string(&mut text).unwrap();
    assert_eq!(text, "12");
}

#[test]
fn a_receive_buffer_that_cannot_hold_a_packet_needs_a_reset() {
    for (len, writable) in [(HEADER_SIZE as u32, true), (100, false)] {
        let mut guest = Guest::new();
        guest.receive.offer(&[Buffer {
            address: RECEIVE_DATA,
            len,
            writable,
        }]);
        guest.receive.ring_doorbell();
        guest.rest();
        assert!(!guest.link.needs_reset(), "nothing is to be received");
        guest.transmit(packet(1000, 53, operation::RW), &[]);
        guest.rest();
        assert!(guest.link.needs_reset());
        assert_eq!(guest.metrics.rx_queue_event_fails.total(), 1);
    }
}

#[test]
fn a_reset_of_the_device_closes_all() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.connected_by_host(52);
    let mut greeting = guest.client();
    guest.rest();
    guest.reset();
    assert!(is_closed(&mut client));
    assert!(is_closed(&mut greeting));
    // A program that connects before the driver is ready waits.
    let mut waiting = guest.client();
    waiting.write_all(b"CONNECT 52\n").unwrap();
    guest.offer_buffers(QUEUE_SIZE);
    guest.received_one(operation::REQUEST);
    let path = guest.path();
    assert!(path.exists());
    drop(guest);
    assert!(!path.exists());
}

#[test]
fn a_guest_that_closes_waits_until_all_is_passed_on() {
    let mut guest = Guest::ready();
    let listener = guest.listen(53);
    let packet = packet(1000, 53, operation::RW);
    guest.transmit(with(packet, operation::REQUEST, 0), &[]);
    guest.received_one(operation::RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    let sent = bytes(12_000);
    let mut total = 0;
    // More than the host's socket takes at once.
    while guest.metrics.tx_flush_fails.total() == 0 && total < 30 * sent.len() {
        guest.transmit(packet, &sent);
        total += sent.len();
    }
    guest.received();
    guest.transmit(with(packet, operation::SHUTDOWN, shutdown::BOTH), &[]);
    guest.assert_silent();
    // It gives up waiting, and uses its port again at once; the data that it sent is not lost.
    guest.post(&with(packet, operation::RST, 0).to_bytes(), &[]);
    let again = with(packet, operation::REQUEST, 0);
    guest.transmit(again, &[]);
    guest.received_one(operation::RESPONSE);
    let mut data: Vec<u8> = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        let count = program.read(&mut chunk).unwrap();
        data.extend(&chunk[..count]);
        guest.rest();
        if count == 0 {
            break;
        }
    }
    assert_eq!(data.len(), total);
    assert!(data.chunks(sent.len()).all(|chunk| chunk == sent));
    assert_eq!(guest.metrics.conns_removed.total(), 1);
    assert_eq!(guest.metrics.conns_killed.total(), 0);
    guest.transmit(packet, b"again");
    let (mut program, _) = listener.accept().unwrap();
    let mut data = [0; 5];
    program.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"again");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bytes pass both ways in any pieces, whatever the order of the steps.
    #[test]
    fn bytes_arrive_in_order(steps in prop::collection::vec((0..4u8, 1..12_000usize), 1..100)) {
        let mut guest = Guest::ready();
        let (client, packet) = guest.connected_by_host(52);
        client.set_nonblocking(true).unwrap();
        let mut client = client;
        let (mut to_host, mut at_host) = (0usize, Vec::new());
        let (mut to_guest, mut at_guest) = (0usize, Vec::new());
        // As far as the guest knows that there is room.
        let mut room = BUFFER_SIZE as usize;
        let pattern = |from: usize, len| (from..from + len).map(|index| (index * 31) as u8).collect::<Vec<_>>();
        let mut receive = |guest: &mut Guest, room: &mut usize| {
            for packet in guest.received() {
                *room = (packet.header.fwd_cnt + packet.header.buf_alloc) as usize;
                at_guest.extend(packet.data);
            }
            at_guest.len()
        };
        let mut received = 0;
        for (step, len) in steps {
            match step {
                0 if to_host + len <= room => {
                    let credited = Header { fwd_cnt: received as u32, ..packet };
                    guest.transmit(credited, &pattern(to_host, len));
                    to_host += len;
                }
                1 => {
                    if let Ok(count) = client.write(&pattern(to_guest, len)) {
                        to_guest += count;
                    }
                }
                2 => {
                    let mut chunk = vec![0; 4 * len];
                    if let Ok(count) = client.read(&mut chunk) {
                        at_host.extend_from_slice(&chunk[..count]);
                    }
                }
                _ => received = receive(&mut guest, &mut room),
            }
        }
        let mut chunk = vec![0; to_host];
        while at_host.len() < to_host {
            let count = client.read(&mut chunk).unwrap();
            at_host.extend_from_slice(&chunk[..count]);
            guest.rest();
        }
        receive(&mut guest, &mut room);
        prop_assert!(room - to_host > BUFFER_SIZE as usize / 4 * 3 - 1, "{} of room", room - to_host);
        prop_assert_eq!(at_host, pattern(0, to_host));
        prop_assert_eq!(at_guest, pattern(0, to_guest));
    }
}
