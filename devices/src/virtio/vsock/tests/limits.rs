//! The bounds of the device: credit, buffers, numbers, time.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use super::guest::{Guest, QUEUE_SIZE, packet, with};
use super::{bytes, is_closed};
use crate::virtio::vsock::credit::BUFFER_SIZE;
use crate::virtio::vsock::packet::{Header, operation};
use crate::virtio::vsock::table::MAX_CONNECTIONS;

#[test]
fn the_program_gets_no_more_than_it_takes_and_the_guest_sends_no_more_than_there_is_room_for() {
    let mut guest = Guest::ready();
    let (mut client, packet) = guest.connected_by_host(52);
    let sent = bytes(12_000);
    let mut total = 0;
    let mut known = BUFFER_SIZE as usize;
    // Continue until the host's socket takes no more and the buffer is full.
    loop {
        let mut is_asked = false;
        if total + sent.len() > known {
            guest.transmit(with(packet, operation::CREDIT_REQUEST, 0), &[]);
            is_asked = true;
        } else {
            guest.transmit(packet, &sent);
            total += sent.len();
        }
        for packet in guest.received() {
            assert_eq!(packet.header.operation, operation::CREDIT_UPDATE);
            known = (packet.header.fwd_cnt + packet.header.buf_alloc) as usize;
        }
        if is_asked && total + sent.len() > known {
            break;
        }
        assert!(total < 4 << 20, "there is no end of it");
    }
    // The program reads, so there is room again.
    let mut data = vec![0; total];
    let mut filled = 0;
    while filled < total {
        filled += client.read(&mut data[filled..]).unwrap();
        guest.rest();
    }
    assert!(data.chunks(sent.len()).all(|chunk| chunk == sent));
    let packets = guest.received();
    let last = packets.last().unwrap().header;
    assert_eq!(last.operation, operation::CREDIT_UPDATE);
    assert!((last.fwd_cnt + last.buf_alloc) as usize >= total + BUFFER_SIZE as usize / 2);

    // A guest that sends more than that is not served.
    let mut overrun = 0;
    while guest.metrics.conns_killed.total() == 0 {
        guest.transmit(packet, &sent);
        overrun += sent.len();
        assert!(overrun < 4 << 20, "there is no end of it");
    }
    assert!(overrun > BUFFER_SIZE as usize);
    assert!(guest.operations().contains(&operation::RST));
}

#[test]
fn a_guest_gets_no_more_than_it_takes() {
    let mut guest = Guest::ready();
    let (mut client, packet) = guest.connected_by_host(52);
    let small = Header {
        buf_alloc: 1000,
        ..with(packet, operation::CREDIT_UPDATE, 0)
    };
    guest.transmit(small, &[]);
    client.write_all(&[5; 2500]).unwrap();
    let packets = guest.received();
    assert_eq!(packets[0].data.len(), 1000);
    assert_eq!(packets[1].header.operation, operation::CREDIT_REQUEST);
    assert_eq!(packets.len(), 2);
    // An answer that grants no credit is not answered.
    guest.transmit(small, &[]);
    guest.assert_silent();
    // Other connections go on.
    guest.assert_works();
    let update = Header {
        fwd_cnt: 1000,
        ..small
    };
    guest.transmit(update, &[]);
    assert_eq!(guest.received()[0].data.len(), 1000);
    let update = Header {
        fwd_cnt: 2000,
        ..small
    };
    guest.transmit(update, &[]);
    assert_eq!(guest.received()[0].data.len(), 500);
}

#[test]
fn a_guest_without_receive_buffers_costs_nothing() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.connected_by_host(52);
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    // More than the guest has buffers for.
    loop {
        match client.write(&[1; 4096]) {
            Ok(count) => sent += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                if guest.manager.run_with_timeout(0).unwrap() == 0 {
                    break;
                }
            }
        }
    }
    assert!(sent < 2 << 20);
    assert_eq!(
        guest.manager.run_with_timeout(50).unwrap(),
        0,
        "no busy loop"
    );
    let received: usize = guest
        .received()
        .iter()
        .map(|packet| packet.data.len())
        .sum();
    assert_eq!(received, sent);
}

#[test]
fn refusals_without_receive_buffers_stop_the_transmit_queue() {
    let mut guest = Guest::new();
    for _ in 0..300 {
        if guest.transmit.take_used().is_empty() && guest.sent_packets > 280 {
            break;
        }
        guest.transmit(packet(1000, 53, operation::RW), &[]);
    }
    let answered = guest.metrics.tx_packets_count.total();
    assert_eq!(answered, 256);
    assert!(!guest.link.needs_reset());
    let mut refusals = 0;
    guest.offer_buffers(QUEUE_SIZE);
    loop {
        let operations = guest.operations();
        if operations.is_empty() {
            break;
        }
        assert!(operations.iter().all(|&found| found == operation::RST));
        refusals += operations.len() as u64;
    }
    assert_eq!(refusals, guest.sent_packets);
}

/// Raises the process's limit on descriptors as far as it may.
fn allow_many_descriptors() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the calls write and read `limit` only while they run.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
}

#[test]
fn connections_are_bounded() {
    allow_many_descriptors();
    let mut guest = Guest::ready();
    let mut clients = Vec::new();
    for index in 0..MAX_CONNECTIONS {
        let mut client = guest.client();
        client.write_all(b"CONNECT 52\n").unwrap();
        clients.push(client);
        if index % 32 == 31 {
            assert_eq!(guest.operations().len(), 32);
        }
    }
    let mut one_more = guest.client();
    guest.rest();
    assert!(is_closed(&mut one_more));
    let _listener = guest.listen(53);
    guest.transmit(packet(1000, 53, operation::REQUEST), &[]);
    guest.received_one(operation::RST);
    clients.truncate(MAX_CONNECTIONS / 2);
    assert_eq!(guest.operations().len(), MAX_CONNECTIONS / 2);
    guest.assert_works();
}

#[test]
fn many_connections_share_the_receive_queue() {
    let mut guest = Guest::ready();
    let mut clients: Vec<_> = (0..4).map(|port| guest.connected_by_host(port)).collect();
    for (client, _) in &mut clients {
        client.set_nonblocking(true).unwrap();
        while client.write(&[1; 4096]).is_ok() {}
    }
    // One turn each, round and round.
    let packets = guest.received();
    let mut bytes = [0; 4];
    for packet in packets
        .iter()
        .take(2 * QUEUE_SIZE.next_multiple_of(16) as usize)
    {
        bytes[packet.header.dst_port as usize] += packet.data.len();
    }
    assert!(bytes.iter().all(|&count| count > 0), "{bytes:?}");
}

#[test]
fn times_are_limited() {
    let mut guest = Guest::ready();
    // One program sends nothing, one gets no answer, and the guest does not end a connection that the host
    // has ended.
    let mut silent = guest.client();
    let mut unanswered = guest.client();
    unanswered.write_all(b"CONNECT 52\n").unwrap();
    guest.received_one(operation::REQUEST);
    let (client, _) = guest.connected_by_host(53);
    drop(client);
    guest.received();
    let start = Instant::now();
    let mut resets = 0;
    while resets < 2 {
        guest.manager.run_with_timeout(1000).unwrap();
        resets += guest.operations().len();
        assert!(start.elapsed() < Duration::from_secs(30));
    }
    assert!(start.elapsed() > Duration::from_secs(7));
    assert!(is_closed(&mut silent));
    assert!(is_closed(&mut unanswered));
    assert_eq!(guest.metrics.conns_killed.total(), 2);
}
