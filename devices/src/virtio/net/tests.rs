//! The whole device against a test driver and a socket in place of the tap.

mod backend;
mod control_queue;
mod dirty_log;
mod limits;
mod metadata;
mod real_tap;
mod suspend;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use bantam_memory::GuestMemory;
use event_manager::{EventManager, SubscriberId, SubscriberOps};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{read, write};
use proptest::prelude::*;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_HOST_USO,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::event_loop::Subscriber;
use crate::tap::{PACKET_HEADER_SIZE, Tap};
use crate::virtio::DriverLink;
use crate::virtio::F_EVENT_IDX;
use crate::virtio::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};

const RECEIVE_RINGS: u64 = 0x1000;
const TRANSMIT_RINGS: u64 = RECEIVE_RINGS + RINGS_SIZE;
const CONTROL_RINGS: u64 = TRANSMIT_RINGS + RINGS_SIZE;
/// The card's own address.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Address of the test drivers' packets.
const DATA: u64 = 0x1_0000;
const MEMORY_SIZE: u64 = 0x20_0000;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const SEGMENTS: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;

/// A device at work, its driver, and the far end of its tap.
struct Machine {
    memory: Arc<GuestMemory>,
    receive: TestDriver,
    transmit: TestDriver,
    control: TestDriver,
    interrupts: InterruptCounter,
    link: Arc<DriverLink>,
    manager: EventManager<Subscriber>,
    worker: SubscriberId,
    host: OwnedFd,
}

fn memory() -> Arc<GuestMemory> {
    let regions = [(GuestAddress(0), MEMORY_SIZE as usize)];
    Arc::new(GuestMemory::from_ranges(&regions).unwrap())
}

fn rings(tap: Arc<Tap>) -> Arc<RingStore> {
    Arc::new(RingStore::new(tap))
}

fn worker(tap: Arc<Tap>, activation: Activation) -> Worker {
    worker_with(tap, &NetLimits::default(), activation)
}

fn worker_with(tap: Arc<Tap>, limits: &NetLimits, activation: Activation) -> Worker {
    let config = Arc::new(config_space(MAC, 1, 1500));
    let shared = Arc::new(Shared::new(limits).unwrap());
    Worker::new(rings(tap), 1500, MAC, config, shared, None, activation).unwrap()
}

/// Makes a card without limits.
fn net(tap: Tap, mac: [u8; 6], mtu: Option<u16>) -> Net {
    Net::new(Arc::new(tap), mac, mtu, &NetLimits::default(), None).unwrap()
}

/// Makes a socket in place of a tap, and its far end.
fn stand_in() -> (Tap, OwnedFd) {
    let (tap, host) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_NONBLOCK,
    )
    .unwrap();
    (Tap::from(tap), host)
}

impl Machine {
    fn new(features: u64) -> Machine {
        let (tap, host) = stand_in();
        Machine::with(features, host, |activation| {
            Box::new(worker(Arc::new(tap), activation))
        })
    }

    fn with(
        features: u64,
        host: OwnedFd,
        activate: impl FnOnce(Activation) -> Box<dyn VirtioWorker>,
    ) -> Machine {
        let memory = memory();
        let event_index = features & F_EVENT_IDX != 0;
        let receive = TestDriver::new(&memory, RECEIVE_RINGS, 256);
        let transmit = TestDriver::new(&memory, TRANSMIT_RINGS, 256);
        let control = TestDriver::new(&memory, CONTROL_RINGS, 256);
        let interrupts = InterruptCounter::default();
        let link = interrupts.link();
        let mut manager = EventManager::new().unwrap();
        let worker = manager.add_subscriber(Subscriber::Worker(activate(Activation {
            memory: memory.clone(),
            features,
            queues: vec![
                receive.queue(0, event_index),
                transmit.queue(1, event_index),
                control.queue(2, event_index),
            ],
            link: link.clone(),
            state: None,
        })));
        Machine {
            memory,
            receive,
            transmit,
            control,
            interrupts,
            link,
            manager,
            worker,
            host,
        }
    }

    /// Runs one turn of the event loop, and returns how many events there were.
    fn turn(&mut self) -> usize {
        self.manager.run_with_timeout(0).unwrap()
    }

    /// Lets the device work until it has nothing to do.
    fn run(&mut self) {
        for _ in 0..100 {
            if self.turn() == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Offers receive buffers of these sizes, each in its own chain and one after the other in memory.
    fn offer_receive_buffers(&mut self, sizes: &[u32]) {
        let mut address = DATA;
        for &len in sizes {
            self.receive.offer(&[writable(address, len)]);
            address += u64::from(len);
        }
        self.receive.ring_doorbell();
    }

    /// Sends a packet of the driver in parts of these sizes.
    fn transmit(&mut self, packet: &[u8], parts: &[usize]) {
        self.memory.write_slice(packet, GuestAddress(DATA)).unwrap();
        let mut address = DATA;
        let end = DATA + packet.len() as u64;
        let mut buffers = Vec::new();
        for &len in parts {
            let len = (len as u64).min(end - address);
            buffers.push(readable(address, len as u32));
            address += len;
        }
        buffers.push(readable(address, (end - address) as u32));
        self.transmit.offer(&buffers);
        self.transmit.ring_doorbell();
    }

    fn host_sends(&self, packet: &[u8]) {
        assert_eq!(write(&self.host, packet).unwrap(), packet.len());
    }

    /// Returns the next packet that has arrived at the host.
    fn host_receives(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 2 * MAX_PACKET_SIZE];
        match read(&self.host, &mut packet) {
            Ok(len) => {
                packet.truncate(len);
                Some(packet)
            }
            Err(Errno::EAGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

fn readable(address: u64, len: u32) -> Buffer {
    let writable = false;
    Buffer {
        address,
        len,
        writable,
    }
}

fn writable(address: u64, len: u32) -> Buffer {
    let writable = true;
    Buffer {
        address,
        len,
        writable,
    }
}

/// Makes a packet of `len` bytes, header included, that differs for each `seed`.
fn packet(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|index| (index % 251) as u8 ^ seed).collect()
}

/// Returns `packet` as its driver receives it in `buffer_count` buffers.
fn received(mut packet: Vec<u8>, buffer_count: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffer_count.to_le_bytes());
    packet
}

#[test]
fn what_is_offered_follows_tap_and_mtu() {
    let card = net(stand_in().0, [2, 0, 0, 1, 2, 3], Some(9000));
    let config = [2, 0, 0, 1, 2, 3, 1, 0, 1, 0, 0x28, 0x23];
    assert_eq!(card.config().array(0), config);
    assert_ne!(card.features() & 1 << VIRTIO_NET_F_MTU, 0);
    assert_eq!(card.features() & 1 << VIRTIO_NET_F_HOST_USO, 0);
    assert_eq!(card.features() & 1 << VIRTIO_NET_F_MQ, 0);
    assert_eq!(card.queue_max_sizes().len(), 3);

    let card = net(stand_in().0, MAC, None);
    assert_eq!(card.features() & 1 << VIRTIO_NET_F_MTU, 0);
}

#[test]
fn a_packet_of_the_driver_reaches_the_host_whole() {
    let mut machine = Machine::new(0);
    for (len, parts) in [
        (60, &[][..]),
        (1514, &[12]),
        (MAX_PACKET_SIZE, &[5, 7, 2000, 0, 9]),
    ] {
        let packet = packet(len, len as u8);
        machine.transmit(&packet, parts);
        machine.run();
        assert!(machine.host_receives() == Some(packet));
        assert_eq!(machine.transmit.take_used().len(), 1);
        assert_eq!(machine.interrupts.take(), 1);
    }
    assert!(machine.transmit.wants_doorbell());
}

#[test]
fn what_is_no_packet_is_dropped() {
    let mut machine = Machine::new(0);
    machine.transmit(&packet(11, 0), &[]);
    machine.run();
    machine.transmit(&packet(MAX_PACKET_SIZE + 1, 0), &[]);
    machine.run();
    machine.transmit.offer(&[writable(DATA, 100)]);
    machine.transmit(&packet(12, 0), &[]);
    machine.run();
    assert_eq!(machine.host_receives(), Some(packet(12, 0)));
    assert_eq!(machine.host_receives(), None);
    let used = machine.transmit.take_used();
    assert_eq!(used.len(), 4);
    assert!(used.iter().all(|&(_, len)| len == 0));
    assert!(!machine.link.needs_reset());
}

#[test]
fn packets_wait_for_a_host_that_is_busy() {
    let mut machine = Machine::new(0);
    let packets: Vec<_> = (0..40).map(|seed| packet(20_000, seed)).collect();
    // They are at one address in memory, so each must have left before the next is written.
    let mut sent = 0;
    while machine.transmit.take_used().len() == usize::from(sent > 0) {
        machine.transmit(&packets[sent], &[]);
        machine.run();
        sent += 1;
    }
    assert_eq!(machine.turn(), 0, "waiting costs nothing");
    for packet in &packets[..sent] {
        assert!(machine.host_receives().as_ref() == Some(packet));
        machine.run();
    }
    assert_eq!(machine.host_receives(), None);
    assert_eq!(machine.transmit.take_used().len(), 1);
    assert!(machine.transmit.wants_doorbell());
}

#[test]
fn a_packet_is_spread_over_as_many_buffers_as_it_needs() {
    let mut machine = Machine::new(MERGE);
    machine.offer_receive_buffers(&[100; 10]);
    machine.run();
    for (len, seed) in [(100, 1), (250, 2), (12, 3), (101, 4)] {
        machine.host_sends(&packet(len, seed));
    }
    machine.run();
    let used = machine.receive.take_used();
    let lengths = [100, 100, 100, 50, 12, 100, 1];
    assert_eq!(used, (0..).zip(lengths).collect::<Vec<(u16, u32)>>());
    assert_eq!(machine.bytes(DATA, 100), received(packet(100, 1), 1));
    assert_eq!(machine.bytes(DATA + 100, 250), received(packet(250, 2), 3));
    assert_eq!(machine.bytes(DATA + 400, 12), received(packet(12, 3), 1));
    assert_eq!(machine.bytes(DATA + 500, 101), received(packet(101, 4), 2));
    assert_eq!(machine.interrupts.take(), 1, "one for the batch");
    assert!(
        !machine.receive.wants_doorbell(),
        "there are buffers left for the next packet"
    );
}

#[test]
fn without_buffers_the_host_is_left_alone() {
    let mut machine = Machine::new(MERGE);
    machine.host_sends(&packet(60, 1));
    assert_eq!(machine.turn(), 0, "the driver has not rung");
    machine.receive.ring_doorbell();
    machine.run();
    assert_eq!(machine.turn(), 0);
    assert!(machine.receive.wants_doorbell());

    machine.offer_receive_buffers(&[100]);
    machine.run();
    assert_eq!(machine.receive.take_used(), [(0, 60)]);
    machine.host_sends(&packet(60, 2));
    machine.run();
    assert_eq!(machine.receive.take_used(), []);
    assert!(machine.receive.wants_doorbell());
}

#[test]
fn a_packet_waits_for_the_buffers_that_it_lacks() {
    let mut machine = Machine::new(MERGE | SEGMENTS);
    machine.offer_receive_buffers(&[100, 100]);
    machine.run();
    machine.host_sends(&packet(350, 7));
    machine.host_sends(&packet(30, 8));
    machine.run();
    assert_eq!(machine.receive.take_used(), []);
    assert_eq!(machine.interrupts.take(), 0);
    assert_eq!(machine.turn(), 0, "waiting costs nothing");
    assert!(machine.receive.wants_doorbell());

    machine.receive.offer(&[writable(DATA + 200, 100)]);
    machine.receive.ring_doorbell();
    machine.run();
    assert_eq!(machine.receive.take_used(), []);
    machine
        .receive
        .offer(&[writable(DATA + 300, 20), writable(DATA + 320, 80)]);
    machine.receive.ring_doorbell();
    machine.run();
    assert_eq!(
        machine.receive.take_used(),
        [(0, 100), (1, 100), (2, 100), (3, 50)]
    );
    assert_eq!(machine.bytes(DATA, 350), received(packet(350, 7), 4));
    machine.offer_receive_buffers(&[100]);
    machine.run();
    assert_eq!(machine.receive.take_used(), [(5, 30)]);
    assert_eq!(machine.bytes(DATA, 30), received(packet(30, 8), 1));
}

#[test]
fn without_merging_a_packet_that_does_not_fit_is_dropped() {
    let mut machine = Machine::new(0);
    machine.offer_receive_buffers(&[100, 100]);
    machine.host_sends(&packet(101, 1));
    machine.host_sends(&packet(100, 2));
    machine.run();
    let used = machine.receive.take_used();
    let [(head @ 0..2, 100)] = used[..] else {
        panic!("{used:?}");
    };
    let buffer = DATA + u64::from(head) * 100;
    assert_eq!(machine.bytes(buffer, 100), received(packet(100, 2), 1));
    // The buffer of the other packet is not lost.
    machine.host_sends(&packet(70, 3));
    machine.run();
    assert_eq!(machine.receive.take_used(), [(1 - head, 70)]);
}

#[test]
fn a_packet_that_no_driver_takes_is_dropped() {
    let mut machine = Machine::new(MERGE | SEGMENTS);
    machine.offer_receive_buffers(&[0x1000; 40]);
    machine.host_sends(&packet(MAX_PACKET_SIZE + 1, 1));
    machine.host_sends(&packet(MAX_PACKET_SIZE, 2));
    machine.run();
    let used = machine.receive.take_used();
    let len: u32 = used.iter().map(|&(_, len)| len).sum();
    assert_eq!(len as usize, MAX_PACKET_SIZE);
    let expected = received(packet(MAX_PACKET_SIZE, 2), used.len() as u16);
    let buffers = used.iter().flat_map(|&(head, len)| {
        let buffer = DATA + u64::from(head) * 0x1000;
        machine.bytes(buffer, len as usize)
    });
    assert!(buffers.eq(expected));
}

#[test]
fn packets_arrive_in_order_however_few_buffers_there_are() {
    let mut machine = Machine::new(MERGE | SEGMENTS);
    let size = |number: u8| if number % 5 < 3 { 60 } else { 5000 };
    let mut places = [0; 256];
    let mut received_parts: VecDeque<(u16, u32)> = VecDeque::new();
    let (mut sent, mut next) = (0, 0);
    for round in 0..1000 {
        for _ in 0..round % 5 {
            if sent < 100 {
                machine.host_sends(&packet(size(sent), sent));
                sent += 1;
            }
        }
        for buffer in 0..5 {
            let address = DATA + (round * 5 + buffer) % 200 * 2000;
            places[usize::from(machine.receive.next_head())] = address;
            machine.receive.offer(&[writable(address, 2000)]);
        }
        machine.receive.ring_doorbell();
        machine.run();
        received_parts.extend(machine.receive.take_used());
        while let Some(&(head, _)) = received_parts.front() {
            let header = machine.bytes(places[usize::from(head)], 12);
            let count = u16::from_le_bytes([header[10], header[11]]);
            if received_parts.len() < usize::from(count) {
                break;
            }
            let bytes: Vec<u8> = received_parts
                .drain(..usize::from(count))
                .flat_map(|(head, len)| machine.bytes(places[usize::from(head)], len as usize))
                .collect();
            assert!(bytes == received(packet(size(next), next), count), "{next}");
            next += 1;
        }
        if next == 100 {
            return;
        }
    }
    panic!("only {next} packets came");
}

#[test]
fn a_flood_is_received_in_turns() {
    let mut machine = Machine::new(0);
    // None of them fits, so one buffer is enough for all.
    for _ in 0..260 {
        machine.host_sends(&packet(13, 0));
    }
    machine.offer_receive_buffers(&[12]);
    assert_eq!(machine.turn(), 1, "the doorbell");
    assert_eq!(machine.turn(), 1, "the rest of the flood");
    assert_eq!(machine.turn(), 0);
}

#[test]
fn buffers_that_hold_no_header_need_a_reset() {
    for buffer in [readable(DATA, 100), writable(DATA, 0), writable(DATA, 11)] {
        let mut machine = Machine::new(MERGE);
        machine.receive.offer(&[buffer]);
        machine.receive.ring_doorbell();
        machine.host_sends(&packet(60, 1));
        machine.run();
        assert!(machine.link.needs_reset(), "{buffer:?}");
        machine.receive.ring_doorbell();
        machine.transmit.ring_doorbell();
        machine.run();
        assert_eq!(machine.receive.take_used(), []);
    }
}

#[test]
fn a_device_that_needs_a_reset_is_at_rest() {
    let mut machine = Machine::new(MERGE);
    machine.offer_receive_buffers(&[2000; 3]);
    machine.run();
    machine.transmit.offer(&[readable(MEMORY_SIZE, 60)]);
    machine.transmit.ring_doorbell();
    machine.run();
    assert!(machine.link.needs_reset());
    machine.host_sends(&packet(60, 1));
    machine.run();
    assert_eq!(machine.receive.take_used(), []);
}

#[test]
fn a_tap_that_vanishes_leaves_a_machine_without_network() {
    for features in [0, MERGE] {
        let mut machine = Machine::new(features);
        machine.offer_receive_buffers(&[2000; 3]);
        machine.run();
        machine.host = stand_in().1;
        machine.run();
        machine.transmit(&packet(60, 1), &[]);
        machine.receive.ring_doorbell();
        machine.run();
        assert_eq!(machine.transmit.take_used().len(), 1);
        assert_eq!(machine.receive.take_used(), []);
        assert!(!machine.link.needs_reset());
    }
}

#[test]
fn a_reset_leaves_no_packets_to_the_next_driver() {
    let (tap, host) = stand_in();
    let tap = Arc::new(tap);
    let mut machine = Machine::with(0, host, |activation| {
        Box::new(worker(tap.clone(), activation))
    });
    machine.host_sends(&packet(60, 1));
    machine.host_sends(&packet(60, 2));
    drop(machine.manager.remove_subscriber(machine.worker).unwrap());
    assert_eq!(read(&tap.queues()[0], &mut [0; 100]), Err(Errno::EAGAIN));
}

/// Random packet lengths, small ones as often as large ones.
fn packet_len() -> impl Strategy<Value = usize> {
    prop_oneof![
        PACKET_HEADER_SIZE..200,
        PACKET_HEADER_SIZE..=MAX_PACKET_SIZE
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn packets_arrive_whole_however_buffers_are_cut(
        event_index in prop_oneof![Just(0), Just(F_EVENT_IDX)],
        lens in prop::collection::vec(packet_len(), 1..6),
        sizes in prop::collection::vec(12u32..3000, 1..250),
        rings in prop::collection::vec(1usize..60, 1..20),
    ) {
        let mut machine = Machine::new(MERGE | SEGMENTS | event_index);
        let mut expected: VecDeque<_> = lens.iter().map(|&len| packet(len, len as u8)).collect();
        let mut unsent = expected.clone();
        let mut sizes = sizes.into_iter();
        let mut address = DATA;
        let mut addresses = Vec::new();
        for count in rings {
            for len in sizes.by_ref().take(count) {
                let head = machine.receive.offer(&[writable(address, len)]);
                prop_assert_eq!(usize::from(head), addresses.len());
                addresses.push(address);
                address += u64::from(len);
            }
            machine.receive.ring_doorbell();
            if let Some(packet) = unsent.pop_front() {
                // A socket cannot hold all of them at once.
                machine.host_sends(&packet);
            }
            machine.run();
            let mut used = machine.receive.take_used().into_iter();
            while let Some((first, _)) = used.as_slice().first().copied() {
                let start = addresses[usize::from(first)];
                let count = machine.bytes(start + 10, 2);
                let count = u16::from_le_bytes([count[0], count[1]]);
                prop_assert!((1..=used.len()).contains(&count.into()), "all are visible at once");
                let mut packet = Vec::new();
                for (head, len) in used.by_ref().take(usize::from(count)) {
                    packet.extend(machine.bytes(addresses[usize::from(head)], len as usize));
                }
                let sent = expected.pop_front().unwrap();
                prop_assert!(packet == received(sent, count));
            }
        }
    }

    #[test]
    fn packets_leave_whole_however_they_are_cut(
        len in packet_len(),
        parts in prop::collection::vec(0usize..3000, 0..200),
    ) {
        let mut machine = Machine::new(0);
        let packet = packet(len, 0);
        machine.transmit(&packet, &parts);
        machine.run();
        prop_assert!(machine.host_receives() == Some(packet));
    }

    #[test]
    fn no_descriptors_break_the_device(
        features in prop_oneof![Just(0), Just(MERGE)],
        descriptors in prop::collection::vec(
            (0..MEMORY_SIZE + 0x1000, prop_oneof![0u32..64, 0u32..0x2_0000, any::<u32>()],
             0u16..8, 0u16..20),
            1..20,
        ),
        heads in prop::collection::vec(0u16..20, 1..40),
    ) {
        let mut machine = Machine::new(features);
        for driver in [&mut machine.receive, &mut machine.transmit] {
            for (index, &(address, len, flags, next)) in descriptors.iter().enumerate() {
                driver.write_descriptor(index as u16, readable(address, len), flags, next);
            }
            for &head in &heads {
                driver.offer_head(head);
            }
            driver.ring_doorbell();
        }
        machine.host_sends(&packet(3000, 1));
        for _ in 0..20 {
            machine.turn();
            while machine.host_receives().is_some() {}
        }
    }
}
