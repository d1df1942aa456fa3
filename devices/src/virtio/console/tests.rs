//! Tests of the device with a scripted driver and real descriptors of the host.

mod suspend;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use bantam_memory::GuestMemory;
use event_manager::{EventManager, SubscriberId, SubscriberOps};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::ListeningSocket;
use crate::event_loop::Subscriber;
use crate::serial::SerialEndpoint;
use crate::virtio::DriverLink;
use crate::virtio::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};
use crate::worker::QueueProgress;

/// Address of the rings of the queues.
const RINGS: u64 = 0x1000;
/// Address of the buffers.
const DATA: u64 = 0x4_0000;
const MEMORY_SIZE: usize = 0x10_0000;

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// The queues of the first channel, port 1.
const CHANNEL_RECEIVE: usize = 4;
const CHANNEL_TRANSMIT: usize = 5;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// The port in messages about the device as a whole.
const NO_PORT: u32 = u32::MAX;

/// A guest with a driver for each queue, and the event loop of the device.
struct Guest {
    memory: Arc<GuestMemory>,
    device: Console,
    handle: ConsoleHandle,
    interrupts: InterruptCounter,
    link: Arc<DriverLink>,
    drivers: Vec<TestDriver>,
    manager: EventManager<Subscriber>,
    worker: Option<SubscriberId>,
    folder: TempDir,
}

impl Guest {
    fn new(device: Console) -> Guest {
        let regions = [(GuestAddress(0), MEMORY_SIZE)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let interrupts = InterruptCounter::default();
        let link = interrupts.link();
        Guest {
            memory,
            handle: device.handle(link.clone()),
            device,
            interrupts,
            link,
            drivers: Vec::new(),
            manager: EventManager::new().unwrap(),
            worker: None,
            folder: TempDir::new().unwrap(),
        }
    }

    /// Makes a console connected to pipes: the host reads its output from one, and writes its input to the
    /// other.
    fn with_pipes() -> (Guest, File, File) {
        let guest = Guest::new(Console::new());
        let (input, to_guest) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (from_guest, output) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let endpoint = SerialEndpoint::Descriptors {
            input: Some(input),
            output: Some(output),
        };
        guest.handle.connect(0, endpoint);
        (guest, from_guest.into(), to_guest.into())
    }

    /// Makes a channel connected to a socket, with a driver that has opened it.
    fn with_channel() -> Guest {
        let mut guest = Guest::new(Console::with_channels(vec!["org.example".to_string()]));
        guest.listen(1);
        guest.activate();
        guest.offer_control_buffers(8);
        guest.send_message(NO_PORT, DEVICE_READY, 1);
        guest.send_message(1, PORT_READY, 1);
        guest.send_message(1, PORT_OPEN, 1);
        guest.rest();
        guest
    }

    fn socket(&self) -> PathBuf {
        self.folder.as_path().join("socket")
    }

    fn listen(&self, port: usize) {
        let socket = ListeningSocket::bind(&self.socket()).unwrap();
        self.handle.connect(port, SerialEndpoint::Listener(socket));
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.socket()).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// Activates the device for its driver, as after a reset.
    fn activate(&mut self) {
        self.activate_with(self.device.features());
    }

    fn activate_with(&mut self, features: u64) {
        self.link.set_needs_reset(false);
        let count = self.device.queue_max_sizes().len();
        self.drivers = (0..count as u64)
            .map(|queue| TestDriver::new(&self.memory, RINGS + queue * RINGS_SIZE, QUEUE_SIZE))
            .collect();
        let zeros = vec![0; count * RINGS_SIZE as usize];
        self.memory
            .write_slice(&zeros, GuestAddress(RINGS))
            .unwrap();
        let progress = vec![QueueProgress::default(); count];
        let worker = self.make_worker(features, &progress, None);
        self.resume(worker.unwrap());
        self.rest();
    }

    fn make_worker(
        &mut self,
        features: u64,
        progress: &[QueueProgress],
        state: Option<Section>,
    ) -> Result<Box<dyn VirtioWorker>, String> {
        let queues = self.drivers.iter().zip(progress).zip(0..);
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features,
            queues: queues
                .map(|((driver, progress), index)| driver.queue_from(index, false, *progress))
                .collect(),
            link: self.link.clone(),
            state,
        })
    }

    fn resume(&mut self, worker: Box<dyn VirtioWorker>) {
        for driver in &self.drivers {
            driver.ring_doorbell();
        }
        let id = self.manager.add_subscriber(Subscriber::Worker(worker));
        self.worker = Some(id);
    }

    /// Has the driver reset the device; its worker is dropped on a thread other than the event loop's.
    fn reset(&mut self) {
        let worker = self.worker.take().unwrap();
        let worker = self.manager.remove_subscriber(worker).unwrap();
        std::thread::spawn(move || drop(worker)).join().unwrap();
    }

    /// Lets the device work until it has nothing to do.
    fn rest(&mut self) {
        for _ in 0..1000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    fn data_of(queue: usize) -> u64 {
        DATA + queue as u64 * 0x8000
    }

    /// Transmits `bytes` in a chain of several buffers, and lets the device work.
    fn transmit(&mut self, queue: usize, bytes: &[u8]) {
        let address = Guest::data_of(queue);
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
        let half = bytes.len() / 2;
        let buffer = |start: usize, end: usize| Buffer {
            address: address + start as u64,
            len: (end - start) as u32,
            writable: false,
        };
        let driver = &mut self.drivers[queue];
        driver.offer(&[buffer(0, half), buffer(half, bytes.len())]);
        driver.ring_doorbell();
        self.rest();
    }

    /// Offers a buffer of `len` bytes at place `slot`, and lets the device work.
    fn offer(&mut self, queue: usize, slot: u64, len: u32) {
        let driver = &mut self.drivers[queue];
        driver.offer(&[Buffer {
            address: Guest::data_of(queue) + slot * 0x200,
            len,
            writable: true,
        }]);
        driver.ring_doorbell();
        self.rest();
    }

    /// Returns what the device put into the buffers that were offered at `slots` in turn.
    fn received(&mut self, queue: usize, slots: std::ops::Range<u64>) -> Vec<u8> {
        let used = self.drivers[queue].take_used();
        assert!(used.len() <= slots.clone().count());
        let mut bytes = Vec::new();
        for ((_, len), slot) in used.into_iter().zip(slots) {
            let mut buffer = vec![0; len as usize];
            let address = Guest::data_of(queue) + slot * 0x200;
            self.memory
                .read_slice(&mut buffer, GuestAddress(address))
                .unwrap();
            bytes.extend(buffer);
        }
        bytes
    }

    fn offer_control_buffers(&mut self, count: u64) {
        for slot in 0..count {
            self.offer(CONTROL_RECEIVE, slot, 0x200);
        }
    }

    fn send_message(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.transmit(CONTROL_TRANSMIT, &message);
        assert_eq!(self.drivers[CONTROL_TRANSMIT].take_used().len(), 1);
    }

    /// Returns the messages that the device sent since the last call, from the buffer at `slot` on: port,
    /// event, value and the bytes after them.
    fn messages(&mut self, slot: u64) -> Vec<(u32, u16, u16, String)> {
        let used = self.drivers[CONTROL_RECEIVE].take_used();
        let message = |((_, len), slot): ((u16, u32), u64)| {
            let mut bytes = vec![0; len as usize];
            let address = Guest::data_of(CONTROL_RECEIVE) + slot * 0x200;
            let address = GuestAddress(address);
            self.memory.read_slice(&mut bytes, address).unwrap();
            (
                u32::from_le_bytes(bytes[..4].try_into().unwrap()),
                u16::from_le_bytes(bytes[4..6].try_into().unwrap()),
                u16::from_le_bytes(bytes[6..8].try_into().unwrap()),
                String::from_utf8(bytes[8..].to_vec()).unwrap(),
            )
        };
        used.into_iter().zip(slot..).map(message).collect()
    }
}

/// Reads what is there now.
fn read_available(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => bytes,
        result => {
            result.unwrap();
            bytes
        }
    }
}

fn has_ended(stream: &mut impl Read) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

/// Makes bytes in which the sequences after any two positions soon differ.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i ^ i >> 7 ^ i >> 13) as u8)
        .collect()
}

#[test]
fn bytes_move_both_ways() {
    let (mut guest, mut from_guest, mut to_guest) = Guest::with_pipes();
    guest.activate();
    guest.transmit(TRANSMIT, b"hello");
    assert_eq!(read_available(&mut from_guest), b"hello");
    assert_eq!(guest.drivers[TRANSMIT].take_used(), [(0, 0)]);
    assert_eq!(guest.interrupts.take(), 1);

    guest.offer(RECEIVE, 0, 3);
    guest.offer(RECEIVE, 1, 0x200);
    to_guest.write_all(b"keys").unwrap();
    guest.rest();
    assert_eq!(guest.received(RECEIVE, 0..2), b"keys");
    assert_eq!(guest.interrupts.take(), 1);
    let metrics = guest.handle.metrics();
    assert_eq!(metrics.tx_bytes_count.total(), 5);
    assert_eq!(metrics.rx_bytes_count.total(), 4);
}

#[test]
fn output_waits_in_the_queue_for_a_slow_reader() {
    let (mut guest, mut from_guest, _to_guest) = Guest::with_pipes();
    guest.activate();
    let bytes = pattern(3 << 10);
    let (mut sent, mut taken) = (0, 0);
    // Each chain takes two descriptors.
    while sent - taken < usize::from(QUEUE_SIZE) / 2 {
        guest.transmit(TRANSMIT, &bytes);
        sent += 1;
        taken += guest.drivers[TRANSMIT].take_used().len();
    }
    let mut read = Vec::new();
    while taken < sent {
        let available = read_available(&mut from_guest);
        assert!(!available.is_empty(), "{taken} of {sent}");
        read.extend(available);
        guest.rest();
        taken += guest.drivers[TRANSMIT].take_used().len();
    }
    read.extend(read_available(&mut from_guest));
    assert!(read.chunks(bytes.len()).all(|chunk| chunk == bytes));
    assert_eq!(read.len(), sent * bytes.len());
    assert_eq!(guest.handle.metrics().tx_dropped_bytes.total(), 0);
}

#[test]
fn input_stays_with_the_host_until_the_guest_offers_buffers() {
    let (mut guest, _from_guest, mut to_guest) = Guest::with_pipes();
    guest.activate();
    let bytes = pattern(1 << 20);
    let (mut written, mut received, mut slot) = (0, Vec::new(), 0);
    while received.len() < bytes.len() {
        match to_guest.write(&bytes[written..]) {
            Ok(count) => written += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.rest();
        assert!(written - received.len() <= 64 << 10, "the pipe holds it");
        for _ in 0..5 {
            guest.offer(RECEIVE, slot, 0x200);
            received.extend(guest.received(RECEIVE, slot..slot + 1));
            slot = (slot + 1) % 32;
        }
    }
    assert!(received == bytes);
}

#[test]
fn a_regular_file_takes_all_and_output_that_nobody_takes_is_dropped() {
    let mut guest = Guest::new(Console::new());
    let path = guest.folder.as_path().join("file");
    let output = File::create(&path).unwrap();
    let endpoint = SerialEndpoint::Descriptors {
        input: None,
        output: Some(output.into()),
    };
    guest.activate();
    guest.transmit(TRANSMIT, b"nowhere");
    assert_eq!(guest.drivers[TRANSMIT].take_used().len(), 1);
    assert_eq!(guest.handle.metrics().tx_dropped_bytes.total(), 7);

    guest.reset();
    guest.handle.connect(0, endpoint);
    guest.activate();
    for _ in 0..100 {
        guest.transmit(TRANSMIT, &pattern(0x4000));
        assert_eq!(guest.drivers[TRANSMIT].take_used().len(), 1);
    }
    assert!(std::fs::read(path).unwrap() == pattern(0x4000).repeat(100));
}

#[test]
fn a_reader_that_has_gone_holds_up_nobody() {
    let (mut guest, from_guest, to_guest) = Guest::with_pipes();
    guest.activate();
    drop((from_guest, to_guest));
    guest.offer(RECEIVE, 0, 8);
    for _ in 0..40 {
        guest.transmit(TRANSMIT, b"text");
        assert_eq!(guest.drivers[TRANSMIT].take_used().len(), 1);
    }
    assert!(guest.drivers[RECEIVE].take_used().is_empty());
    assert!(!guest.link.needs_reset());
}

#[test]
fn clients_of_a_console_come_one_after_another() {
    let mut guest = Guest::new(Console::new());
    guest.listen(0);
    let mut first = guest.client();
    first.write_all(b"a").unwrap();
    guest.activate();
    let mut second = guest.client();
    second.write_all(b"b").unwrap();
    guest.offer(RECEIVE, 0, 8);
    guest.offer(RECEIVE, 1, 8);
    guest.transmit(TRANSMIT, b"to the first");
    assert_eq!(guest.received(RECEIVE, 0..2), b"a");
    assert_eq!(read_available(&mut first), b"to the first");
    drop(first);
    guest.rest();
    assert_eq!(guest.received(RECEIVE, 1..2), b"b");

    // It stays connected while the driver resets the device.
    guest.reset();
    guest.activate();
    guest.transmit(TRANSMIT, b"to the second");
    assert_eq!(read_available(&mut second), b"to the second");
    assert_eq!(guest.handle.metrics().clients_count.total(), 2);
}

#[test]
fn a_client_that_has_sent_all_still_gets_answers() {
    let mut guest = Guest::with_channel();
    let mut client = guest.client();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    guest.offer(CHANNEL_RECEIVE, 0, 0x100);
    assert_eq!(guest.received(CHANNEL_RECEIVE, 0..1), b"question");
    guest.transmit(CHANNEL_TRANSMIT, b"answer");
    assert_eq!(read_available(&mut client), b"answer");
    drop(client);
    guest.rest();
    let events: Vec<_> = guest.messages(0).iter().map(|it| (it.1, it.2)).collect();
    assert_eq!(
        events,
        [
            (PORT_ADD, 1),
            (PORT_NAME, 1),
            (PORT_OPEN, 1),
            (PORT_OPEN, 0)
        ]
    );
}

#[test]
fn channels_are_announced_and_each_side_hears_of_the_other() {
    let names = ["org.example.0".to_string(), "two".to_string()];
    let mut guest = Guest::new(Console::with_channels(names.to_vec()));
    guest.listen(1);
    let mut client = guest.client();
    client.write_all(b"early").unwrap();
    guest.activate();
    guest.offer_control_buffers(10);
    guest.offer(CHANNEL_RECEIVE, 0, 0x100);
    assert!(guest.messages(0).is_empty());
    let message = |port, event, value, name: &str| (port, event, value, name.to_string());

    guest.send_message(NO_PORT, DEVICE_READY, 1);
    assert_eq!(
        guest.messages(0),
        [message(1, PORT_ADD, 1, ""), message(2, PORT_ADD, 1, "")]
    );
    guest.send_message(2, PORT_READY, 1);
    guest.send_message(1, PORT_READY, 1);
    assert_eq!(
        guest.messages(2),
        [
            message(2, PORT_NAME, 1, "two"),
            message(1, PORT_NAME, 1, "org.example.0"),
            message(1, PORT_OPEN, 1, "")
        ]
    );
    // Input waits: a driver drops what arrives before the guest has opened the port.
    assert!(guest.drivers[CHANNEL_RECEIVE].take_used().is_empty());
    guest.send_message(1, PORT_OPEN, 1);
    assert_eq!(guest.received(CHANNEL_RECEIVE, 0..1), b"early");

    guest.transmit(CHANNEL_TRANSMIT, b"last words");
    guest.send_message(1, PORT_OPEN, 0);
    assert_eq!(read_available(&mut client), b"last words");
    assert!(has_ended(&mut client));
    assert_eq!(guest.messages(5), [message(1, PORT_OPEN, 0, "")]);
    let _next = guest.client();
    guest.rest();
    assert_eq!(guest.messages(6), [message(1, PORT_OPEN, 1, "")]);
}

#[test]
fn the_next_client_waits_until_the_driver_knows_that_the_last_has_gone() {
    let mut guest = Guest::with_channel();
    let first = guest.client();
    guest.rest();
    // Of eight buffers three are used; five more changes use up the rest.
    drop(first);
    guest.rest();
    for _ in 0..2 {
        let client = guest.client();
        guest.rest();
        drop(client);
        guest.rest();
    }
    assert_eq!(guest.messages(0).len(), 8);
    let mut second = guest.client();
    guest.rest();
    drop(second);
    guest.rest();
    second = guest.client();
    second.write_all(b"x").unwrap();
    guest.rest();
    guest.offer(CHANNEL_RECEIVE, 0, 8);
    guest.offer(CONTROL_RECEIVE, 0, 0x200);
    let (_, event, value, _) = guest.messages(0).remove(0);
    assert_eq!((event, value), (PORT_OPEN, 1));
    assert_eq!(guest.received(CHANNEL_RECEIVE, 0..1), b"x");
}

#[test]
fn a_client_that_leaves_before_the_guest_opens_the_channel_is_noticed() {
    let mut guest = Guest::with_channel();
    guest.send_message(1, PORT_OPEN, 0);
    guest.messages(0);
    let client = guest.client();
    guest.rest();
    assert_eq!(guest.messages(2).len(), 1);
    drop(client);
    guest.rest();
    assert_eq!(guest.messages(3).len(), 1, "it has gone");
    // Input that a client has left to be read is kept.
    guest.client().write_all(b"note").unwrap();
    guest.rest();
    assert_eq!(guest.messages(4).len(), 1);
    guest.offer(CHANNEL_RECEIVE, 0, 8);
    guest.send_message(1, PORT_OPEN, 1);
    assert_eq!(guest.received(CHANNEL_RECEIVE, 0..1), b"note");
    assert_eq!(guest.messages(5).len(), 1, "it has gone");
}

#[test]
fn a_slow_reader_of_one_channel_holds_up_no_other() {
    let names = ["slow".to_string(), "other".to_string()];
    let mut guest = Guest::new(Console::with_channels(names.to_vec()));
    guest.listen(1);
    let mut slow = guest.client();
    let (from_guest, output) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    let endpoint = SerialEndpoint::Descriptors {
        input: None,
        output: Some(output),
    };
    guest.handle.connect(2, endpoint);
    guest.activate();
    guest.offer_control_buffers(8);
    guest.send_message(NO_PORT, DEVICE_READY, 1);
    guest.send_message(1, PORT_READY, 1);
    guest.send_message(1, PORT_OPEN, 1);
    for _ in 0..30 {
        guest.transmit(CHANNEL_TRANSMIT, &pattern(0x7000));
    }
    let taken = guest.drivers[CHANNEL_TRANSMIT].take_used().len();
    assert!(taken < 30);
    guest.transmit(CHANNEL_TRANSMIT + 2, b"other");
    assert_eq!(read_available(&mut File::from(from_guest)), b"other");

    // The guest closes the slow channel; its client sees the end once it has read everything.
    guest.send_message(1, PORT_OPEN, 0);
    let mut read = Vec::new();
    while read.len() < 30 * 0x7000 {
        let available = read_available(&mut slow);
        assert!(!available.is_empty(), "{}", read.len());
        read.extend(available);
        guest.rest();
    }
    assert!(read == pattern(0x7000).repeat(30));
    assert!(has_ended(&mut slow));
}

#[test]
fn a_reset_closes_what_the_guest_had_open() {
    let mut guest = Guest::with_channel();
    let mut client = guest.client();
    guest.rest();
    guest.reset();
    assert!(has_ended(&mut client));
    let _next = guest.client();
    guest.activate();
    guest.offer_control_buffers(4);
    guest.send_message(NO_PORT, DEVICE_READY, 1);
    guest.send_message(1, PORT_READY, 1);
    let events: Vec<_> = guest.messages(0).iter().map(|it| (it.1, it.2)).collect();
    assert_eq!(events, [(PORT_ADD, 1), (PORT_NAME, 1), (PORT_OPEN, 1)]);
}

#[test]
fn a_driver_that_knows_of_one_port_only_has_a_console_that_leads_nowhere() {
    let mut guest = Guest::new(Console::with_channels(vec!["name".to_string()]));
    guest.listen(1);
    let mut client = guest.client();
    guest.activate_with(COMMON_FEATURES);
    guest.offer(RECEIVE, 0, 8);
    guest.transmit(TRANSMIT, b"text");
    assert_eq!(guest.drivers[TRANSMIT].take_used().len(), 1);
    client.write_all(b"x").unwrap();
    guest.send_to_unused_queues();
    assert!(guest.drivers[RECEIVE].take_used().is_empty());
    assert!(!guest.link.needs_reset());
}

impl Guest {
    fn send_to_unused_queues(&mut self) {
        for queue in CONTROL_RECEIVE..self.drivers.len() {
            self.offer(queue, 0, 8);
            assert!(self.drivers[queue].take_used().is_empty());
        }
    }
}

#[test]
fn wrong_messages_are_ignored_and_broken_ones_need_a_reset() {
    let mut guest = Guest::with_channel();
    for (port, event, value) in [
        (0, PORT_OPEN, 1),
        (2, PORT_OPEN, 1),
        (NO_PORT, PORT_OPEN, 0),
        (0x8000_0000, PORT_READY, 1),
        (1, PORT_ADD, 1),
        (1, PORT_NAME, 1),
        (1, 0xffff, 0xffff),
        (1, PORT_READY, 0),
        (NO_PORT, DEVICE_READY, 0),
    ] {
        guest.send_message(port, event, value);
    }
    assert!(!guest.link.needs_reset());
    let mut client = guest.client();
    guest.rest();
    guest.transmit(CHANNEL_TRANSMIT, b"works");
    assert_eq!(read_available(&mut client), b"works");
    guest.transmit(CONTROL_TRANSMIT, &[0; 7]);
    assert!(guest.link.needs_reset());
    assert_eq!(guest.handle.metrics().event_fails.total(), 1);

    let mut guest = Guest::new(Console::with_channels(vec!["name".to_string()]));
    guest.activate();
    guest.offer(CONTROL_RECEIVE, 0, 7);
    assert!(!guest.link.needs_reset());
    guest.transmit(CONTROL_TRANSMIT, &[0, 0, 0, 0, 0, 0, 1, 0]);
    assert!(guest.link.needs_reset());

    // A buffer for the device to read, where it should write.
    let (mut guest, _from_guest, mut to_guest) = Guest::with_pipes();
    guest.activate();
    to_guest.write_all(b"x").unwrap();
    guest.transmit(RECEIVE, b"wrong");
    assert!(guest.link.needs_reset());
}

#[test]
fn a_guest_without_a_driver_writes_bytes_that_precede_those_of_the_driver() {
    let (mut guest, mut from_guest, _to_guest) = Guest::with_pipes();
    assert_ne!(guest.device.features() & feature::EMERGENCY_WRITE, 0);
    let write = |guest: &mut Guest, data: &[u8]| {
        guest.device.driver_wrote_config(8, data);
    };
    write(&mut guest, b"a\0\0\0");
    write(&mut guest, b"b");
    assert_eq!(read_available(&mut from_guest), b"ab");
    // Bytes that the pipe does not take are kept up to a limit.
    for _ in 0..80 << 10 {
        write(&mut guest, b"e");
    }
    guest.activate();
    guest.transmit(TRANSMIT, b"driver");
    assert!(guest.drivers[TRANSMIT].take_used().is_empty());
    let mut read = read_available(&mut from_guest);
    guest.rest();
    read.extend(read_available(&mut from_guest));
    let kept = read.len() - b"driver".len();
    assert_eq!(kept, (64 << 10) + 4096);
    assert!(read[..kept].iter().all(|&byte| byte == b'e'));
    assert_eq!(&read[kept..], b"driver");
    let dropped = guest.handle.metrics().tx_dropped_bytes.total();
    assert_eq!(dropped as usize, (80 << 10) - kept);
}

#[test]
fn a_resize_is_told_once_to_a_driver_that_is_at_work() {
    let (mut guest, _from_guest, _to_guest) = Guest::with_pipes();
    assert_ne!(guest.device.features() & feature::SIZE, 0);
    guest.handle.resize(80, 24);
    assert_eq!(guest.interrupts.take(), 0);
    assert_eq!(guest.device.config().array(0), [80, 0, 24, 0]);
    guest.activate();
    guest.handle.resize(80, 24);
    assert_eq!(guest.interrupts.take(), 0);
    let generation = guest.device.config().generation();
    guest.handle.resize(300, 50);
    assert_eq!(guest.interrupts.take(), 1);
    assert_eq!(guest.device.config().array(0), [44, 1, 50, 0]);
    assert_ne!(guest.device.config().generation(), generation);
    guest.reset();
    guest.handle.resize(1, 1);
    assert_eq!(guest.interrupts.take(), 0);
}

#[test]
fn the_last_output_waits_for_its_reader_and_that_of_a_reset_does_not() {
    for at_end in [true, false] {
        let (mut guest, mut from_guest, _to_guest) = Guest::with_pipes();
        guest.activate();
        // A socket, as a pipe would be enlarged for the last output.
        let (reader, output) = UnixStream::pair().unwrap();
        fcntl(output.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        guest.reset();
        let endpoint = SerialEndpoint::Descriptors {
            input: None,
            output: Some(output.into()),
        };
        guest.handle.connect(0, endpoint);
        guest.activate();
        for _ in 0..30 {
            guest.transmit(TRANSMIT, &pattern(0x7000));
        }
        let taken = guest.drivers[TRANSMIT].take_used().len();
        assert!(taken < 30);
        assert!(has_ended(&mut from_guest));
        let reader = std::thread::spawn(move || {
            let (mut bytes, mut reader) = (Vec::<u8>::new(), reader);
            let mut chunk = vec![0; 0x1000];
            while bytes.len() < 30 * 0x7000 {
                // Reads whatever there is until the device has ended.
                match reader.read(&mut chunk) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => bytes.extend(&chunk[..count]),
                }
            }
            bytes
        });
        if at_end {
            drop(guest.manager);
            drop((guest.device, guest.handle));
            assert!(reader.join().unwrap() == pattern(0x7000).repeat(30));
        } else {
            guest.reset();
            drop((guest.device, guest.handle));
            let bytes = reader.join().unwrap();
            assert_eq!(bytes, pattern(0x7000).repeat(30)[..bytes.len()]);
        }
    }
}
