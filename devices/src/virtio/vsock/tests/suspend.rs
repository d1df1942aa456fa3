//! Pausing the device in place, and going on in another process.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam_memory::GuestMemory;
use bantam_state::{RestoreError, Section};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::guest::{EVENT_DATA, GUEST_CID, Guest, QUEUE_SIZE, answer, with};
use super::{bytes, is_closed};
use crate::ListeningSocket;
use crate::suspend_test::suspend_tests;
use crate::virtio::suspend_test::{
    Backend, Driver, FREE_MEMORY, SuspendMachine, VirtioGuest, readable, writable,
};
use crate::virtio::test_driver::{RINGS_SIZE, TestDriver};
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::packet::{HEADER_SIZE, HOST_CID, Header, TYPE_STREAM, operation};
use crate::virtio::vsock::state::WorkerState;
use crate::virtio::{Activation, DriverLink, VirtioDevice};

impl Guest {
    fn pause_and_resume(&mut self) {
        let worker = self.pause();
        self.resume(worker);
    }

    /// Returns the events that have arrived.
    fn take_events(&mut self) -> Vec<u32> {
        self.rest();
        let used = self.event.take_used();
        used.into_iter()
            .map(|(_, len)| {
                assert_eq!(len, 4);
                self.memory.read_obj(GuestAddress(EVENT_DATA)).unwrap()
            })
            .collect()
    }
}

#[test]
fn a_pause_keeps_connections_whatever_their_state() {
    let mut guest = Guest::ready();
    let (mut client, packet) = guest.connected_by_host(52);
    let mut asking = guest.client();
    asking.write_all(b"CONNECT 5").unwrap();
    let mut asked = guest.client();
    asked.write_all(b"CONNECT 54\n").unwrap();
    let request = guest.received_one(operation::REQUEST);

    let worker = guest.pause();
    // What both sides do during the pause waits.
    client.write_all(b"from the host").unwrap();
    asking.write_all(b"3\n").unwrap();
    let data = b"from the guest";
    let header = Header {
        len: data.len() as u32,
        ..packet
    };
    guest.post(&header.to_bytes(), data);
    guest.post(&answer(&request, operation::RESPONSE).to_bytes(), &[]);
    let mut connecting = guest.client();
    connecting.write_all(b"CONNECT 55\n").unwrap();
    guest.rest();
    assert!(guest.transmit.take_used().is_empty());
    guest.resume(worker);

    let mut packets = guest.received();
    packets.sort_by_key(|packet| packet.header.dst_port);
    let found: Vec<_> = packets
        .iter()
        .map(|packet| (packet.header.dst_port, packet.header.operation))
        .collect();
    assert_eq!(
        found,
        [
            (52, operation::RW),
            (53, operation::REQUEST),
            (55, operation::REQUEST)
        ]
    );
    assert_eq!(packets[0].data, b"from the host");
    let mut text = [0; 14];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, data);
    let mut line = [0; 3];
    asked.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK ");
    assert_eq!(guest.metrics.conns_removed.total(), 0);
    guest.transmit.take_used();
    guest.assert_works();
    drop((asking, connecting));
}

#[test]
fn a_program_that_leaves_during_a_pause_is_noticed() {
    let mut guest = Guest::ready();
    let (client, _) = guest.connected_by_host(52);
    let worker = guest.pause();
    drop(client);
    guest.resume(worker);
    guest.received_one(operation::SHUTDOWN);
}

#[test]
fn what_a_slow_program_has_not_taken_survives_a_pause() {
    let mut guest = Guest::ready();
    let (mut program, packet) = guest.connected_by_guest();
    let sent = bytes(12_000);
    // More than the host's socket takes.
    for _ in 0..30 {
        guest.transmit(packet, &sent);
        guest.received();
    }
    guest.pause_and_resume();
    let mut data = vec![0; sent.len()];
    for _ in 0..30 {
        let mut filled = 0;
        while filled < data.len() {
            guest.rest();
            filled += program.read(&mut data[filled..]).unwrap();
        }
        assert!(data == sent);
        guest.pause_and_resume();
    }
}

#[test]
fn a_worker_that_is_dropped_while_it_is_paused_ends_its_connections() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.connected_by_host(52);
    drop(guest.pause());
    assert!(is_closed(&mut client));
    assert_eq!(guest.metrics.conns_removed.total(), 1);
}

#[test]
fn a_driver_that_goes_on_elsewhere_is_told_that_its_connections_have_ended() {
    let mut guest = Guest::ready();
    for _ in 0..3 {
        guest.offer_event_buffer();
    }
    assert!(guest.take_events().is_empty());
    let (mut client, packet) = guest.connected_by_host(52);
    let worker = guest.pause();
    let header = Header { len: 4, ..packet };
    guest.post(&header.to_bytes(), b"late");
    guest.restore(worker);
    assert!(is_closed(&mut client));
    // A program that connects at once is not ended with the others: it waits until the driver is done.
    let mut next = guest.client();
    next.write_all(b"CONNECT 52\n").unwrap();
    assert_eq!(guest.take_events(), [0]);
    let reset = guest.received_one(operation::RST);
    assert_eq!(
        (reset.src_port, reset.dst_port),
        (packet.dst_port, packet.src_port)
    );
    guest.transmit.take_used();
    guest.offer_event_buffer();
    let request = guest.received_one(operation::REQUEST);
    assert_ne!(request.src_port, packet.dst_port, "its packets may be late");
    guest.transmit(answer(&request, operation::RESPONSE), &[]);
    guest.transmit(answer(&request, operation::RW), b"new");
    let mut text = String::new();
    guest.transmit(with(answer(&request, 0), operation::SHUTDOWN, 3), &[]);
    guest.received_one(operation::RST);
    next.read_to_string(&mut text).unwrap();
    assert_eq!(text, format!("OK {}\nnew", request.src_port));
    assert!(guest.take_events().is_empty(), "it is told once");
    guest.assert_works();

    // The same happens the next time, and the device goes on where it was in each queue.
    let worker = guest.pause();
    guest.restore(worker);
    assert_eq!(guest.take_events(), [0]);
}

#[test]
fn the_event_passes_the_transport_of_a_moved_device_with_another_cid() {
    const RINGS: u64 = 0x1000;
    const EVENT: usize = 2;
    let folder = TempDir::new().unwrap();
    let device = |name: &str, cid| -> (Box<dyn VirtioDevice>, ()) {
        let listener = ListeningSocket::bind(&folder.as_path().join(name)).unwrap();
        (Box::new(Vsock::new(cid, listener)), ())
    };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let memory = Arc::new(memory);
    let (mut machine, ()) = SuspendMachine::new(&memory, |_| device("first", 7));
    let mut queues: Vec<_> = (0..3)
        .map(|index| TestDriver::new(&memory, RINGS + index * RINGS_SIZE, QUEUE_SIZE))
        .collect();
    machine.initialize(u64::MAX, &queues.iter().collect::<Vec<_>>());
    queues[EVENT].offer(&[writable(EVENT_DATA, 4)]);
    machine.ring_doorbell(EVENT as u32);
    machine.pause().unwrap();
    machine.resume();
    machine.pause().unwrap();
    assert!(queues[EVENT].take_used().is_empty(), "it is where it was");

    memory
        .write_obj(u32::MAX, GuestAddress(EVENT_DATA))
        .unwrap();
    let (mut machine, ()) = machine.moved(|_| device("second", 8));
    // The driver reads it again because of the event.
    assert_eq!(machine.config(8), 8_u64.to_le_bytes());
    let event = &mut queues[EVENT];
    event.move_to(&machine.memory);
    machine.resume();
    let deadline = Instant::now() + Duration::from_secs(20);
    let used = loop {
        let used = event.take_used();
        if !used.is_empty() {
            break used;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_micros(100));
    };
    assert_eq!(used, [(0, 4)]);
    let told: u32 = machine.memory.read_obj(GuestAddress(EVENT_DATA)).unwrap();
    assert_eq!(told, 0);
    assert!(machine.interrupts.take() > 0);
}

#[test]
fn the_event_waits_for_a_buffer_and_programs_do_not_wait_for_ever() {
    let mut guest = Guest::ready();
    let worker = guest.pause();
    guest.restore(worker);
    // The event is lost neither by a pause nor by another save.
    guest.pause_and_resume();
    let worker = guest.pause();
    guest.restore(worker);
    let mut client = guest.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    guest.assert_silent();
    let deadline = Instant::now() + Duration::from_secs(30);
    while guest.metrics.conns_added.total() == 0 {
        assert!(Instant::now() < deadline);
        guest.manager.run_with_timeout(100).unwrap();
    }
    guest.received_one(operation::REQUEST);
    assert!(guest.take_events().is_empty());
    guest.offer_event_buffer();
    assert_eq!(guest.take_events(), [0]);
}

#[test]
fn a_buffer_that_cannot_hold_an_event_needs_a_reset() {
    let mut guest = Guest::ready();
    let worker = guest.pause();
    guest.restore(worker);
    guest.event.offer(&[crate::virtio::test_driver::Buffer {
        address: EVENT_DATA,
        len: 3,
        writable: true,
    }]);
    guest.event.ring_doorbell();
    guest.rest();
    assert!(guest.link.needs_reset());
    guest.reset();
    guest.offer_buffers(QUEUE_SIZE);
    guest.assert_works();
}

#[test]
fn a_state_that_no_such_device_has_is_refused() {
    let mut guest = Guest::ready();
    for port in [0, (1 << 30) - 1, 1 << 31, u32::MAX] {
        let state = WorkerState {
            next_host_port: port,
        };
        let drivers = [&guest.receive, &guest.transmit, &guest.event];
        let queues = drivers.iter().zip(0..);
        let activation = Activation {
            memory: guest.memory.clone(),
            features: guest.device.features(),
            queues: queues.map(|(it, index)| it.queue(index, false)).collect(),
            link: guest.link.clone(),
            state: Some(Section::of(&state).unwrap()),
        };
        assert!(guest.device.activate(activation).is_err());
    }
    for config in [&[][..], &[7], &[0; 9]] {
        let restored = guest.device.restore(config, None);
        assert!(matches!(restored, Err(RestoreError::Invalid { .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bytes pass both ways, however often the device is paused in between.
    #[test]
    fn pauses_lose_nothing(steps in prop::collection::vec((0..4u8, 1..12_000usize), 1..100)) {
        let mut guest = Guest::ready();
        let (client, packet) = guest.connected_by_host(52);
        client.set_nonblocking(true).unwrap();
        let mut client: UnixStream = client;
        let (mut to_host, mut at_host) = (Vec::new(), Vec::new());
        let (mut to_guest, mut at_guest) = (Vec::<u8>::new(), Vec::new());
        let pattern = |from: usize, len: usize| -> Vec<u8> {
            (from..from + len).map(|index| (index ^ index >> 8) as u8).collect()
        };
        for (step, len) in steps {
            match step {
                // The packet is posted, and perhaps not handled before the pause.
                0 if to_host.len() + len <= 200_000 => {
                    let data = pattern(to_host.len(), len);
                    let header = Header { len: len as u32, ..packet };
                    guest.post(&header.to_bytes(), &data);
                    to_host.extend(data);
                    guest.manager.run_with_timeout(0).unwrap();
                    guest.transmit.take_used();
                }
                1 => {
                    let data = pattern(to_guest.len(), len);
                    if let Ok(count) = client.write(&data) {
                        to_guest.extend(&data[..count]);
                    }
                }
                2 => {
                    let mut chunk = vec![0; 4 * len];
                    if let Ok(count) = client.read(&mut chunk) {
                        at_host.extend_from_slice(&chunk[..count]);
                    }
                }
                _ => at_guest.extend(guest.received().into_iter().flat_map(|packet| packet.data)),
            }
            guest.pause_and_resume();
        }
        guest.rest();
        let mut chunk = vec![0; 200_000];
        while at_host.len() < to_host.len() {
            let count = client.read(&mut chunk).unwrap();
            at_host.extend_from_slice(&chunk[..count]);
            guest.rest();
        }
        at_guest.extend(guest.received().into_iter().flat_map(|packet| packet.data));
        prop_assert!(at_host == to_host);
        prop_assert!(at_guest == to_guest);
        prop_assert_eq!(guest.metrics.conns_removed.total(), 0);
    }
}

/// A host on which no program listens, so that each request of the guest is refused.
struct Refusal {
    folder: Option<TempDir>,
}

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

impl Refusal {
    fn request(driver: &mut Driver, port: u32) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: 1000,
            dst_port: port,
            socket_type: TYPE_STREAM,
            operation: operation::REQUEST,
            ..Header::default()
        };
        driver.offer(RECEIVE, &[writable(FREE_MEMORY + 0x1000, 0x1000)]);
        driver.store(FREE_MEMORY, &header.to_bytes());
        driver.offer(TRANSMIT, &[readable(FREE_MEMORY, HEADER_SIZE as u32)]);
    }

    fn refused(driver: &mut Driver, port: u32) {
        driver.wait(TRANSMIT, 1);
        assert_eq!(driver.wait(RECEIVE, 1), [HEADER_SIZE as u32]);
        let bytes = driver.load(FREE_MEMORY + 0x1000, HEADER_SIZE);
        let header = Header::from_bytes(bytes.first_chunk().unwrap());
        assert_eq!((header.operation, header.src_port), (operation::RST, port));
    }
}

impl Backend for Refusal {
    const QUEUES: u64 = 3;
    const FEATURES: u64 = u64::MAX;

    fn new() -> Refusal {
        Refusal { folder: None }
    }

    fn device(&mut self, _: &Arc<GuestMemory>, _: Arc<DriverLink>) -> Box<dyn VirtioDevice> {
        let folder = self.folder.insert(TempDir::new().unwrap());
        let listener = ListeningSocket::bind(&folder.as_path().join("v")).unwrap();
        Box::new(Vsock::new(GUEST_CID as u32, listener))
    }

    fn work(&mut self, driver: &mut Driver) {
        Refusal::request(driver, 70);
        Refusal::refused(driver, 70);
    }

    fn begin(&mut self, driver: &mut Driver) {
        Refusal::request(driver, 71);
    }

    fn end(&mut self, driver: &mut Driver) {
        Refusal::refused(driver, 71);
    }
}

suspend_tests!(VirtioGuest<Refusal>);
