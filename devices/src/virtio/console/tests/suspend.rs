//! Pausing the device in place, and going on in another process.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::suspend_test::suspend_tests;
use crate::virtio::console::state::WorkerState;
use crate::virtio::suspend_test::{Backend, Driver, FREE_MEMORY, VirtioGuest, readable, writable};

impl Guest {
    /// Takes the worker off the event loop as the transport does.
    fn pause(&mut self) -> Box<dyn VirtioWorker> {
        let id = self.worker.take().unwrap();
        let Subscriber::Worker(mut worker) = self.manager.remove_subscriber(id).unwrap() else {
            panic!("it is a worker");
        };
        worker.pause().unwrap();
        let progress = worker.progress();
        assert_eq!(progress.len(), self.device.queue_max_sizes().len());
        for queue in progress {
            assert_eq!(queue.next_available, queue.next_used);
        }
        worker
    }

    fn pause_and_resume(&mut self) {
        let worker = self.pause();
        self.resume(worker);
        self.rest();
    }

    /// Has `device`, whose ports are connected by `connect`, go on from the state of a paused worker.
    fn restore(
        &mut self,
        worker: Box<dyn VirtioWorker>,
        device: Console,
        connect: impl FnOnce(&ConsoleHandle),
    ) {
        let (progress, state) = (worker.progress(), worker.save().unwrap());
        let (config, generation) = self.device.config().save();
        let front_state = self.device.save().unwrap();
        drop(worker);
        let handle = device.handle(self.link.clone());
        connect(&handle);
        (self.device, self.handle) = (device, handle);
        self.device.restore(&config, front_state.as_ref()).unwrap();
        self.device.config().restore(&config, generation).unwrap();
        let features = self.device.features();
        let worker = self.make_worker(features, &progress, state);
        self.resume(worker.unwrap());
        self.rest();
    }

    /// Restores the state into another device whose channel is connected to a new socket.
    fn restore_channel(&mut self, worker: Box<dyn VirtioWorker>) {
        self.folder = TempDir::new().unwrap();
        let socket = ListeningSocket::bind(&self.socket()).unwrap();
        let device = Console::with_channels(vec!["org.example".to_string()]);
        self.restore(worker, device, |handle| {
            handle.connect(1, SerialEndpoint::Listener(socket));
        });
    }

    fn events(&mut self, slot: u64) -> Vec<(u16, u16)> {
        let messages = self.messages(slot);
        messages
            .iter()
            .map(|message| (message.1, message.2))
            .collect()
    }
}

fn descriptors(input: Option<OwnedFd>, output: Option<OwnedFd>) -> SerialEndpoint {
    SerialEndpoint::Descriptors { input, output }
}

#[test]
fn a_client_stays_during_a_pause_and_nothing_is_said_twice() {
    let mut guest = Guest::with_channel();
    let mut client = guest.client();
    guest.rest();
    assert_eq!(guest.messages(0).len(), 3);
    guest.offer(CHANNEL_RECEIVE, 0, 0x100);
    let worker = guest.pause();
    client.write_all(b"to the guest").unwrap();
    let waiting = guest.client();
    guest.transmit(CHANNEL_TRANSMIT, b"to the host");
    assert!(read_available(&mut client).is_empty());
    guest.resume(worker);
    guest.rest();
    assert_eq!(guest.received(CHANNEL_RECEIVE, 0..1), b"to the guest");
    assert_eq!(read_available(&mut client), b"to the host");
    assert!(guest.messages(3).is_empty());
    // A client that leaves during the pause is noticed, and the next one gets its turn.
    let worker = guest.pause();
    drop(client);
    guest.resume(worker);
    guest.rest();
    assert_eq!(guest.events(3), [(PORT_OPEN, 0), (PORT_OPEN, 1)]);
    assert_eq!(guest.handle.metrics().clients_count.total(), 2);
    drop(waiting);
}

#[test]
fn what_the_owner_connects_during_a_pause_is_used() {
    let (mut guest, mut first, _to_guest) = Guest::with_pipes();
    guest.activate();
    guest.transmit(TRANSMIT, b"before");
    let worker = guest.pause();
    let (second, output) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    guest.handle.connect(0, descriptors(None, Some(output)));
    guest.handle.resize(80, 24);
    guest.resume(worker);
    guest.transmit(TRANSMIT, b"after");
    assert_eq!(read_available(&mut first), b"before");
    assert_eq!(read_available(&mut File::from(second)), b"after");
    assert_eq!(guest.device.config().array(0), [80, 0, 24, 0]);
}

#[test]
fn a_channel_goes_on_elsewhere_as_the_guest_has_left_it() {
    let mut guest = Guest::with_channel();
    let mut client = guest.client();
    guest.rest();
    assert_eq!(guest.messages(0).len(), 3);
    let worker = guest.pause();
    guest.restore_channel(worker);
    // The client went with the process, and the driver is told of that and of nothing else.
    assert!(has_ended(&mut client));
    assert_eq!(guest.events(3), [(PORT_OPEN, 0)]);
    let mut next = guest.client();
    next.write_all(b"hello").unwrap();
    guest.rest();
    assert_eq!(guest.events(4), [(PORT_OPEN, 1)]);
    // The guest has the channel open.
    guest.offer(CHANNEL_RECEIVE, 0, 0x100);
    assert_eq!(guest.received(CHANNEL_RECEIVE, 0..1), b"hello");
    guest.transmit(CHANNEL_TRANSMIT, b"answer");
    assert_eq!(read_available(&mut next), b"answer");

    // A channel that the guest has closed stays closed.
    guest.send_message(1, PORT_OPEN, 0);
    assert!(has_ended(&mut next));
    let worker = guest.pause();
    guest.restore_channel(worker);
    let mut last = guest.client();
    last.write_all(b"early").unwrap();
    guest.offer(CHANNEL_RECEIVE, 1, 0x100);
    assert!(guest.drivers[CHANNEL_RECEIVE].take_used().is_empty());
    guest.send_message(1, PORT_OPEN, 1);
    assert_eq!(guest.received(CHANNEL_RECEIVE, 1..2), b"early");
}

#[test]
fn a_driver_that_has_not_heard_of_a_channel_hears_of_it_elsewhere() {
    let mut guest = Guest::new(Console::with_channels(vec!["org.example".to_string()]));
    guest.activate();
    guest.send_message(NO_PORT, DEVICE_READY, 1);
    let worker = guest.pause();
    guest.restore_channel(worker);
    guest.offer_control_buffers(4);
    assert_eq!(guest.events(0), [(PORT_ADD, 1)]);
    let worker = guest.pause();
    guest.restore_channel(worker);
    assert!(guest.messages(1).is_empty());
    guest.send_message(1, PORT_READY, 1);
    assert_eq!(guest.events(1), [(PORT_NAME, 1)]);
}

#[test]
fn output_that_a_slow_reader_has_not_taken_is_sent_once_and_by_one() {
    let (mut guest, mut from_guest, _to_guest) = Guest::with_pipes();
    guest.activate();
    for _ in 0..5 {
        guest.transmit(TRANSMIT, &pattern(0x7000));
    }
    let taken = guest.drivers[TRANSMIT].take_used().len();
    assert!(taken < 5);
    let worker = guest.pause();
    let (others, output) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    let mut others = File::from(others);
    guest.restore(worker, Console::new(), |handle| {
        handle.connect(0, descriptors(None, Some(output)));
    });
    let mut read = read_available(&mut from_guest);
    assert!(read.len() % 0x7000 > 0, "a chain was sent in part");
    assert!(has_ended(&mut from_guest));
    while read.len() < 5 * 0x7000 {
        let available = read_available(&mut others);
        assert!(!available.is_empty(), "{}", read.len());
        read.extend(available);
        guest.rest();
    }
    assert!(read == pattern(0x7000).repeat(5));
    assert_eq!(guest.drivers[TRANSMIT].take_used().len(), 5 - taken);
}

#[test]
fn a_worker_that_is_dropped_while_it_is_paused_waits_for_nobody() {
    let mut guest = Guest::new(Console::new());
    // A socket, as a pipe would be enlarged for the last output.
    let (_reader, output) = UnixStream::pair().unwrap();
    fcntl(output.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    guest
        .handle
        .connect(0, descriptors(None, Some(output.into())));
    guest.activate();
    for _ in 0..30 {
        guest.transmit(TRANSMIT, &pattern(0x7000));
    }
    assert!(guest.drivers[TRANSMIT].take_used().len() < 30);
    let worker = guest.pause();
    // The worker is dropped on the thread of its event loop, where it would wait if it were at work.
    let start = Instant::now();
    drop(worker);
    assert!(start.elapsed() < Duration::from_millis(500));
}

#[test]
fn what_is_left_is_sent_when_a_paused_worker_is_dropped_that_was_not_saved() {
    let (mut guest, mut from_guest, _to_guest) = Guest::with_pipes();
    guest.activate();
    let worker = guest.pause();
    guest.transmit(TRANSMIT, b"last words");
    drop(worker);
    assert_eq!(read_available(&mut from_guest), b"last words");

    guest.activate();
    let worker = guest.pause();
    worker.save().unwrap();
    guest.resume(worker);
    let worker = guest.pause();
    guest.transmit(TRANSMIT, b"later");
    drop(worker);
    assert_eq!(read_available(&mut from_guest), b"later");
}

#[test]
fn the_last_output_waits_for_its_reader_on_the_loop_of_the_resumed() {
    let mut guest = Guest::new(Console::new());
    let (mut reader, output) = UnixStream::pair().unwrap();
    fcntl(output.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    guest
        .handle
        .connect(0, descriptors(None, Some(output.into())));
    guest.activate();
    for _ in 0..30 {
        guest.transmit(TRANSMIT, &pattern(0x7000));
    }
    let worker = guest.pause();
    for driver in &guest.drivers {
        driver.ring_doorbell();
    }
    // The worker moves to an event loop on another thread, and ends with it.
    let thread = std::thread::spawn(move || {
        let mut manager: EventManager<Subscriber> = EventManager::new().unwrap();
        manager.add_subscriber(Subscriber::Worker(worker));
        drop(manager);
    });
    let mut bytes = vec![0; 30 * 0x7000];
    std::thread::sleep(Duration::from_millis(50));
    reader.read_exact(&mut bytes).unwrap();
    thread.join().unwrap();
    assert!(bytes == pattern(0x7000).repeat(30));
}

#[test]
fn the_size_of_the_terminal_is_told_again_elsewhere() {
    let (mut guest, _from_guest, _to_guest) = Guest::with_pipes();
    guest.handle.resize(80, 24);
    guest.activate();
    // A terminal whose size is known before the state is restored.
    let worker = guest.pause();
    guest.interrupts.take();
    guest.restore(worker, Console::new(), |handle| handle.resize(100, 40));
    assert_eq!(guest.interrupts.take(), 1);
    assert_eq!(guest.device.config().array(0), [100, 0, 40, 0]);
    // A terminal of unknown size.
    let worker = guest.pause();
    guest.restore(worker, Console::new(), |_| {});
    assert_eq!(guest.interrupts.take(), 1);
    assert_eq!(guest.device.config().array(0), [100, 0, 40, 0]);
    guest.handle.resize(1, 1);
    assert_eq!(guest.interrupts.take(), 1, "its driver is at work");
    // A later driver finds the size too.
    guest.reset();
    let config = guest.device.config();
    config.write(config::COLUMNS, &[80, 0, 24, 0]);
    guest.activate();
    assert_eq!(guest.device.config().array(0), [1, 0, 1, 0]);
}

#[test]
fn emergency_writes_that_are_kept_go_on_elsewhere() {
    let (mut guest, mut from_guest, _to_guest) = Guest::with_pipes();
    for _ in 0..(64 << 10) + 5 {
        guest.device.driver_wrote_config(8, b"e");
    }
    guest.activate();
    let worker = guest.pause();
    let (others, output) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    guest.restore(worker, Console::new(), |handle| {
        handle.connect(0, descriptors(None, Some(output)));
    });
    guest.transmit(TRANSMIT, b"driver");
    assert_eq!(read_available(&mut from_guest).len(), 64 << 10);
    assert_eq!(read_available(&mut File::from(others)), b"eeeeedriver");
    guest.device.reset();
    let state = guest.device.save().unwrap().unwrap();
    assert!(state.decode::<ConsoleState>().unwrap().emergency.is_empty());
}

#[test]
fn a_driver_that_knows_of_one_port_only_goes_on_elsewhere() {
    let channels = || Console::with_channels(vec!["name".to_string()]);
    let mut guest = Guest::new(channels());
    guest.activate_with(COMMON_FEATURES);
    guest.transmit(TRANSMIT, b"text");
    let worker = guest.pause();
    let (progress, state) = (worker.progress(), worker.save().unwrap());
    drop(worker);
    guest.device = channels();
    let worker = guest.make_worker(COMMON_FEATURES, &progress, state);
    guest.resume(worker.unwrap());
    guest.transmit(TRANSMIT, b"text");
    assert_eq!(guest.drivers[TRANSMIT].take_used().len(), 2);
}

#[test]
fn a_state_that_no_such_device_has_is_refused() {
    let mut guest = Guest::with_channel();
    let worker = guest.pause();
    let state: WorkerState = worker.save().unwrap().unwrap().decode().unwrap();
    drop(worker);
    let features = guest.device.features();
    let progress = [QueueProgress::default(); 6];
    let mut ports = state.clone();
    ports.ports.pop();
    let mut control = state.clone();
    control.control = None;
    let other = ConsoleState {
        emergency: Vec::new(),
    };
    for section in [
        Section::of(&ports).unwrap(),
        Section::of(&control).unwrap(),
        Section::of(&other).unwrap(),
    ] {
        let made = guest.make_worker(features, &progress, Some(section));
        assert!(made.is_err());
    }
    // A channel that the device does not have.
    guest.device = Console::with_channels(vec!["a".to_string(), "b".to_string()]);
    let section = Section::of(&state).unwrap();
    assert!(
        guest
            .make_worker(features, &progress, Some(section))
            .is_err()
    );

    let config = guest.device.config().save().0;
    let kept = |count| ConsoleState {
        emergency: vec![b'e'; count],
    };
    for (config, state) in [
        (&config[..], None),
        (&config[..4], Some(Section::of(&kept(0)).unwrap())),
        (&[0; 12][..], Some(Section::of(&kept(0)).unwrap())),
        (&config[..], Some(Section::of(&kept(4097)).unwrap())),
        (&config[..], Some(Section::of(&state).unwrap())),
    ] {
        assert!(guest.device.restore(config, state.as_ref()).is_err());
    }
}

#[test]
fn more_bytes_sent_than_a_chain_has_are_all_of_it() {
    let (mut guest, mut from_guest, _to_guest) = Guest::with_pipes();
    guest.activate();
    for _ in 0..3 {
        guest.transmit(TRANSMIT, &pattern(0x7000));
    }
    // A chain that was sent in part is a different and shorter one in the restored memory.
    let worker = guest.pause();
    guest.drivers[TRANSMIT].take_used();
    guest.drivers[TRANSMIT].write_descriptor(
        4,
        Buffer {
            address: DATA,
            len: 1,
            writable: false,
        },
        0,
        0,
    );
    read_available(&mut from_guest);
    guest.resume(worker);
    guest.rest();
    assert_eq!(guest.drivers[TRANSMIT].take_used().len(), 1);
    assert!(read_available(&mut from_guest).is_empty());
    guest.transmit(TRANSMIT, b"next");
    assert_eq!(read_available(&mut from_guest), b"next");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bytes pass both ways, however often the device is paused or moved in between.
    #[test]
    fn pauses_lose_nothing(steps in prop::collection::vec((0..6u8, 1..0x7000usize), 1..100)) {
        let mut guest = Guest::new(Console::new());
        let (input, to_guest) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (from_guest, output) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (mut from_guest, mut to_guest) = (File::from(from_guest), File::from(to_guest));
        let endpoint = || {
            descriptors(Some(input.try_clone().unwrap()), Some(output.try_clone().unwrap()))
        };
        guest.handle.connect(0, endpoint());
        guest.activate();
        let pattern = |from: usize, len: usize| -> Vec<u8> {
            (from..from + len).map(|index| (index ^ index >> 8) as u8).collect()
        };
        let (mut sent, mut read, mut is_sending) = (Vec::new(), Vec::<u8>::new(), false);
        let (mut written, mut received, mut is_offered) = (Vec::<u8>::new(), Vec::new(), false);
        for (step, len) in steps {
            is_sending &= guest.drivers[TRANSMIT].take_used().is_empty();
            match step {
                0 | 1 if !is_sending => {
                    let data = pattern(sent.len(), len);
                    guest.transmit(TRANSMIT, &data);
                    sent.extend(data);
                    is_sending = true;
                }
                2 => {
                    let mut chunk = vec![0; len];
                    if let Ok(count) = from_guest.read(&mut chunk) {
                        read.extend_from_slice(&chunk[..count]);
                    }
                }
                3 => {
                    let data = pattern(written.len(), len);
                    if let Ok(count) = to_guest.write(&data) {
                        written.extend(&data[..count]);
                    }
                }
                _ if !is_offered => {
                    guest.offer(RECEIVE, 0, 0x200);
                    is_offered = true;
                }
                _ => {}
            }
            let input = guest.received(RECEIVE, 0..1);
            is_offered &= input.is_empty();
            received.extend(input);
            match len % 2 {
                0 => guest.pause_and_resume(),
                _ => {
                    let worker = guest.pause();
                    guest.restore(worker, Console::new(), |handle| handle.connect(0, endpoint()));
                }
            }
        }
        while received.len() < written.len() {
            received.extend(guest.received(RECEIVE, 0..1));
            guest.offer(RECEIVE, 0, 0x200);
        }
        while read.len() < sent.len() {
            let available = read_available(&mut from_guest);
            prop_assert!(!available.is_empty());
            read.extend(available);
            guest.rest();
        }
        prop_assert!(read == sent);
        prop_assert!(received == written);
        prop_assert_eq!(guest.handle.metrics().tx_dropped_bytes.total(), 0);
    }
}

/// A console that is connected to two pipes.
struct Pipes {
    input: OwnedFd,
    output: OwnedFd,
    to_guest: File,
    from_guest: File,
}

impl Pipes {
    fn transmit(driver: &mut Driver, bytes: &[u8]) {
        driver.store(FREE_MEMORY, bytes);
        driver.offer(TRANSMIT, &[readable(FREE_MEMORY, bytes.len() as u32)]);
    }

    fn receive(&mut self, driver: &mut Driver, expected: &[u8]) {
        let address = FREE_MEMORY + 0x1000;
        driver.offer(RECEIVE, &[writable(address, 0x100)]);
        assert_eq!(driver.wait(RECEIVE, 1), [expected.len() as u32]);
        assert_eq!(driver.load(address, expected.len()), expected);
    }
}

impl Backend for Pipes {
    const QUEUES: u64 = 2;
    const FEATURES: u64 = u64::MAX;

    fn new() -> Pipes {
        let flags = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let ((input, to_guest), (from_guest, output)) =
            (pipe2(flags).unwrap(), pipe2(flags).unwrap());
        Pipes {
            input,
            output,
            to_guest: to_guest.into(),
            from_guest: from_guest.into(),
        }
    }

    fn device(&mut self, _: &Arc<GuestMemory>, link: Arc<DriverLink>) -> Box<dyn VirtioDevice> {
        let device = Console::new();
        let ends = [&self.input, &self.output].map(|end| Some(end.try_clone().unwrap()));
        let [input, output] = ends;
        device.handle(link).connect(0, descriptors(input, output));
        Box::new(device)
    }

    fn work(&mut self, driver: &mut Driver) {
        Pipes::transmit(driver, b"to the host");
        driver.wait(TRANSMIT, 1);
        assert_eq!(read_available(&mut self.from_guest), b"to the host");
        self.to_guest.write_all(b"to the guest").unwrap();
        self.receive(driver, b"to the guest");
    }

    fn begin(&mut self, driver: &mut Driver) {
        self.to_guest.write_all(b"begun").unwrap();
        Pipes::transmit(driver, b"begun as well");
    }

    fn end(&mut self, driver: &mut Driver) {
        self.receive(driver, b"begun");
        driver.wait(TRANSMIT, 1);
        assert_eq!(read_available(&mut self.from_guest), b"begun as well");
    }
}

suspend_tests!(VirtioGuest<Pipes>);
