//! A card whose guest reads metadata, frame by frame.

use std::time::{Duration, Instant};

use bantam_metadata::{
    CLAIM_SIZE, MAX_GUEST_FRAME_SIZE, Metadata, MetadataAddress, MetadataNetwork, MetadataOptions,
    MetadataService,
};

use super::*;

const GUEST_ADDRESS: [u8; 4] = [192, 168, 7, 2];
const SERVICE_ADDRESS: [u8; 4] = [169, 254, 169, 254];
const SERVICE_MAC: [u8; 6] = [6, 1, 0x23, 0x45, 0x67, 1];
/// Bytes of a packet before its IPv4 header.
const IPV4: usize = PACKET_HEADER_SIZE + 14;
/// Bytes of a packet before its TCP header, and before that header's flags.
const TCP: usize = IPV4 + 20;
const TCP_FLAGS: usize = TCP + 13;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

const _: () = assert!(CLAIM_SIZE <= FRAME_START_SIZE);

impl LocalEndpoint for MetadataNetwork {
    fn claims(&self, start: &[u8]) -> bool {
        MetadataNetwork::claims(self, start)
    }

    fn max_frame_size(&self) -> usize {
        MAX_GUEST_FRAME_SIZE
    }

    fn accept(&mut self, frame: &mut [u8], now: Instant) {
        MetadataNetwork::accept(self, frame, now);
    }

    fn reject(&mut self) {
        MetadataNetwork::reject(self);
    }

    fn poll(&mut self, now: Instant) {
        MetadataNetwork::poll(self, now);
    }

    fn wait_time(&mut self, now: Instant) -> Option<Duration> {
        MetadataNetwork::wait_time(self, now)
    }

    fn next_frame(&self) -> Option<&[u8]> {
        MetadataNetwork::next_frame(self)
    }

    fn take_frame(&mut self, delivered: bool) {
        MetadataNetwork::take_frame(self, delivered);
    }
}

/// Makes a machine whose card has a service.
fn machine(features: u64) -> (Machine, Metadata) {
    let (tap, host) = stand_in();
    let metadata = Metadata::new(&MetadataOptions::default()).unwrap();
    let service = MetadataService {
        metadata: metadata.clone(),
        address: MetadataAddress::default(),
    };
    let machine = Machine::with(features, host, |activation| {
        let config = Arc::new(config_space(MAC, 1, 1500));
        let service = LocalService::new("the metadata service", move |mtu, now| {
            Ok(Box::new(MetadataNetwork::new(&service, mtu, now)?))
        });
        let port = LocalPort::new(&service, 1500).unwrap();
        let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
        Box::new(
            Worker::new(
                rings(Arc::new(tap)),
                1500,
                MAC,
                config,
                shared,
                Some(port),
                activation,
            )
            .unwrap(),
        )
    });
    (machine, metadata)
}

/// Makes a packet with an ARP request of the guest.
fn arp_request(target: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0; PACKET_HEADER_SIZE];
    packet.extend([[0xff; 6], MAC].concat());
    packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet.extend([&MAC[..], &GUEST_ADDRESS, &[0; 6], &target].concat());
    packet
}

/// Makes a packet with a TCP segment of the guest, whose checksum is left to the device.
fn segment(flags: u8, sequence: u32, acknowledgement: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; PACKET_HEADER_SIZE];
    packet[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
    packet.extend([&SERVICE_MAC[..], &MAC, &[8, 0]].concat());
    let size = 40 + payload.len() as u16;
    packet.extend([0x45, 0]);
    packet.extend(size.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet.extend([GUEST_ADDRESS, SERVICE_ADDRESS].concat());
    packet.extend([0x10, 0, 0, 80]);
    packet.extend(sequence.to_be_bytes());
    packet.extend(acknowledgement.to_be_bytes());
    packet.extend([0x50, flags, 0x7f, 0xff, 0, 0, 0, 0]);
    packet.extend_from_slice(payload);
    packet
}

/// Sends a packet of the guest and lets the device work.
fn transmit(machine: &mut Machine, packet: &[u8]) {
    machine.transmit(packet, &[]);
    machine.run();
    assert_eq!(machine.transmit.take_used().len(), 1);
}

/// Offers one receive buffer that has room for any frame.
fn offer_buffer(machine: &mut Machine) {
    machine.receive.offer(&[writable(DATA + 0x1_0000, 2000)]);
    machine.receive.ring_doorbell();
    machine.run();
}

/// Returns the packet that has arrived in the buffer offered last.
fn take_received(machine: &mut Machine) -> Option<Vec<u8>> {
    let used = machine.receive.take_used();
    let &[(_, len)] = &used[..] else {
        assert!(used.is_empty());
        return None;
    };
    let packet = machine.bytes(DATA + 0x1_0000, len as usize);
    assert_eq!(packet[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    Some(packet)
}

fn number(packet: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(*packet[offset..].first_chunk().unwrap())
}

#[test]
fn frames_for_the_service_do_not_reach_the_host() {
    let (mut machine, metadata) = machine(0);
    offer_buffer(&mut machine);
    let other = arp_request([192, 168, 7, 1]);
    transmit(&mut machine, &other);
    assert_eq!(machine.host_receives(), Some(other));
    assert_eq!(take_received(&mut machine), None);
    transmit(&mut machine, &arp_request(SERVICE_ADDRESS));
    assert_eq!(machine.host_receives(), None);
    let answer = take_received(&mut machine).unwrap();
    assert_eq!(answer[12..24], [MAC, SERVICE_MAC].concat());
    assert_eq!(machine.interrupts.take(), 3, "one for each packet");
    assert_eq!(metadata.metrics().rx_accepted.total(), 1);
    assert_eq!(metadata.metrics().tx_frames.total(), 1);
    assert_eq!(metadata.metrics().tx_bytes.total(), 42);

    transmit(&mut machine, &packet(PACKET_HEADER_SIZE + 5, 0));
    assert!(machine.host_receives().is_some());
    assert_eq!(metadata.metrics().rx_bad_eth.total(), 1);
    let mut large = segment(ACK, 0, 0, &[]);
    large.resize(MAX_PACKET_SIZE, 0);
    transmit(&mut machine, &large);
    assert_eq!(machine.host_receives(), None);
    assert_eq!(metadata.metrics().rx_accepted_err.total(), 1);
}

#[test]
fn a_request_is_answered_by_way_of_the_queues() {
    let (mut machine, metadata) = machine(MERGE);
    metadata.put(serde_json::json!({})).unwrap();
    offer_buffer(&mut machine);
    transmit(&mut machine, &arp_request(SERVICE_ADDRESS));
    take_received(&mut machine).unwrap();
    offer_buffer(&mut machine);
    transmit(&mut machine, &segment(SYN, 100, 0, &[]));
    let answer = take_received(&mut machine).unwrap();
    assert_eq!(answer[TCP_FLAGS], SYN | ACK);
    assert_eq!(number(&answer, TCP + 8), 101);
    let theirs = number(&answer, TCP + 4).wrapping_add(1);
    offer_buffer(&mut machine);
    let request = b"GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n";
    transmit(&mut machine, &segment(ACK, 101, theirs, request));
    let answer = take_received(&mut machine).unwrap();
    let text = String::from_utf8_lossy(&answer[TCP + 20..]);
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(text.ends_with("\r\n\r\n{}"), "{text}");
    assert_eq!(metadata.metrics().connections_created.total(), 1);
    // A reset of the device ends the connection.
    drop(machine.manager.remove_subscriber(machine.worker).unwrap());
    assert_eq!(metadata.metrics().connections_destroyed.total(), 1);
}

#[test]
fn frames_of_the_service_wait_for_buffers() {
    let (mut machine, metadata) = machine(0);
    transmit(&mut machine, &arp_request(SERVICE_ADDRESS));
    assert!(machine.receive.wants_doorbell());
    assert_eq!(metadata.metrics().tx_count.total(), 1);
    assert_eq!(metadata.metrics().tx_frames.total(), 0);
    assert_eq!(machine.turn(), 0, "waiting costs nothing");
    offer_buffer(&mut machine);
    let answer = take_received(&mut machine).unwrap();
    assert_eq!(answer[18..24], SERVICE_MAC);
    // The host's packets arrive too, once there are buffers again.
    machine.host_sends(&packet(60, 1));
    machine.run();
    offer_buffer(&mut machine);
    assert_eq!(machine.receive.take_used().len(), 1);
}

#[test]
fn frames_of_the_service_follow_those_of_the_host_that_wait() {
    let (mut machine, _) = machine(MERGE | SEGMENTS);
    machine.offer_receive_buffers(&[100]);
    machine.host_sends(&packet(300, 5));
    machine.run();
    transmit(&mut machine, &arp_request(SERVICE_ADDRESS));
    assert_eq!(machine.receive.take_used(), []);
    for index in 1..4 {
        let address = DATA + 0x1_0000 + index * 100;
        machine.receive.offer(&[writable(address, 100)]);
    }
    machine.receive.ring_doorbell();
    machine.run();
    assert_eq!(
        machine.receive.take_used(),
        [(0, 100), (1, 100), (2, 100), (3, 54)]
    );
}

#[test]
fn a_frame_is_spread_over_small_buffers_or_dropped() {
    for (features, frames, errors) in [(MERGE, 1, 0), (0, 0, 1)] {
        let (mut machine, metadata) = machine(features);
        machine.offer_receive_buffers(&[20; 4]);
        transmit(&mut machine, &arp_request(SERVICE_ADDRESS));
        assert_eq!(metadata.metrics().tx_frames.total(), frames);
        assert_eq!(metadata.metrics().tx_errors.total(), errors);
        let used = machine.receive.take_used();
        let expected: &[_] = match frames {
            0 => &[],
            _ => &[(0, 20), (1, 20), (2, 14)],
        };
        assert_eq!(used, expected);
    }
}

#[test]
fn packets_that_are_sent_together_are_told_apart() {
    let (mut machine, metadata) = machine(0);
    let mut expected = Vec::new();
    for number in 0..40_u8 {
        let address = DATA + u64::from(number) * 0x100;
        let packet = if number % 3 == 0 {
            arp_request(SERVICE_ADDRESS)
        } else {
            arp_request([192, 168, 8, number])
        };
        machine
            .memory
            .write_slice(&packet, GuestAddress(address))
            .unwrap();
        machine
            .transmit
            .offer(&[readable(address, packet.len() as u32)]);
        if number % 3 != 0 {
            expected.push(packet);
        }
    }
    machine.transmit.ring_doorbell();
    machine.run();
    assert_eq!(machine.transmit.take_used().len(), 40);
    let received: Vec<_> = std::iter::from_fn(|| machine.host_receives()).collect();
    assert!(received == expected);
    assert_eq!(metadata.metrics().rx_count.total(), 14);
}

#[test]
fn what_is_not_acknowledged_is_sent_again() {
    let (mut machine, _) = machine(0);
    for packet in [arp_request(SERVICE_ADDRESS), segment(SYN, 100, 0, &[])] {
        offer_buffer(&mut machine);
        transmit(&mut machine, &packet);
        take_received(&mut machine).unwrap();
    }
    offer_buffer(&mut machine);
    assert_eq!(take_received(&mut machine), None);
    // The first time is after a second.
    assert_eq!(machine.manager.run_with_timeout(5000).unwrap(), 1);
    let again = take_received(&mut machine).unwrap();
    assert_eq!(again[TCP_FLAGS], SYN | ACK);
    // The guest resets the connection, and there is nothing to wait for any more.
    transmit(&mut machine, &segment(RST, 101, 0, &[]));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.turn(), 0);
}

#[test]
fn the_service_outlives_the_tap() {
    let (mut machine, _) = machine(MERGE);
    machine.offer_receive_buffers(&[2000; 3]);
    machine.run();
    machine.host = stand_in().1;
    machine.run();
    transmit(&mut machine, &arp_request(SERVICE_ADDRESS));
    assert_eq!(machine.receive.take_used(), [(0, 54)]);
    assert!(!machine.link.needs_reset());
}

#[test]
fn a_connection_outlives_a_pause() {
    let (mut machine, _) = machine(0);
    for packet in [arp_request(SERVICE_ADDRESS), segment(SYN, 100, 0, &[])] {
        offer_buffer(&mut machine);
        transmit(&mut machine, &packet);
        take_received(&mut machine).unwrap();
    }
    let worker = machine.pause();
    // Its timer expires during the pause.
    std::thread::sleep(Duration::from_millis(1200));
    machine.resume(worker);
    offer_buffer(&mut machine);
    let again = take_received(&mut machine).unwrap();
    assert_eq!(again[TCP_FLAGS], SYN | ACK);
    assert_eq!(number(&again, TCP_FLAGS - 5), 101);
}
