//! Pauses, and workers that take the place of others.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bantam_state::{RestoreError, SaveError, Section};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
};

use super::*;
use crate::rate_limiter::{Limits, RateLimit};
use crate::suspend_test::suspend_tests;
use crate::virtio::net::config::{mac, set_mac};
use crate::virtio::net::filter::{AddressList, MAX_ADDRESSES, ReceiveFilter};
use crate::virtio::net::state::WorkerState;
use crate::virtio::no_io_uring_test::without_io_uring_setup;
use crate::virtio::suspend_test::{self, Backend, FREE_MEMORY, SuspendMachine, VirtioGuest};
use crate::virtio::transport::mmio::register;
use crate::worker::QueueProgress;

const COMMANDS: u64 = 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR;

impl Machine {
    /// Takes the worker off the event loop and pauses it.
    pub(super) fn pause(&mut self) -> Box<dyn VirtioWorker> {
        let Subscriber::Worker(mut worker) = self.manager.remove_subscriber(self.worker).unwrap()
        else {
            panic!("this is no worker");
        };
        worker.pause().unwrap();
        for progress in worker.progress() {
            assert_eq!(progress.next_available, progress.next_used);
        }
        worker
    }

    /// Puts a worker back to work as a transport does.
    pub(super) fn resume(&mut self, worker: Box<dyn VirtioWorker>) {
        for driver in [&self.receive, &self.transmit, &self.control] {
            driver.ring_doorbell();
        }
        self.worker = self.manager.add_subscriber(Subscriber::Worker(worker));
    }

    /// Makes the activation of a worker that takes the place of `worker`.
    pub(super) fn activation(&self, features: u64, worker: &dyn VirtioWorker) -> Activation {
        let event_index = features & F_EVENT_IDX != 0;
        let drivers = [&self.receive, &self.transmit, &self.control];
        let queue = |((index, driver), progress): ((u16, &TestDriver), QueueProgress)| {
            driver.queue_from(index, event_index, progress)
        };
        let progress = worker.progress();
        assert_eq!(progress.len(), drivers.len());
        Activation {
            memory: self.memory.clone(),
            features,
            queues: (0..).zip(drivers).zip(progress).map(queue).collect(),
            link: self.link.clone(),
            state: saved(worker).unwrap(),
        }
    }
}

/// Returns the state of `worker`, as read from a file.
fn saved(worker: &dyn VirtioWorker) -> Result<Option<Section>, SaveError> {
    let Some(section) = worker.save()? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    section.write_to(&mut bytes).unwrap();
    Ok(Some(Section::read_from(&mut &bytes[..]).unwrap()))
}

/// A sequence of pseudorandom numbers, the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

const NUMBER: usize = PACKET_HEADER_SIZE;
const PLACE_SIZE: u64 = 2000;
const TRANSMIT_DATA: u64 = DATA + 0x10_0000;
const _: () = assert!(TRANSMIT_DATA + 256 * PLACE_SIZE <= MEMORY_SIZE);

/// Makes packet `number` of a sequence, in which most packets are small.
fn numbered(number: u64, largest: usize) -> Vec<u8> {
    let len = match number % 11 {
        0 => 60 + number as usize * 37 % (largest - 60),
        rest => 60 + rest as usize * 130,
    };
    let mut packet = packet(len, number as u8);
    packet[10..12].fill(0);
    packet[NUMBER..NUMBER + 8].copy_from_slice(&number.to_le_bytes());
    packet
}

/// A driver that receives and sends numbered packets, and checks those that it receives.
struct Traffic {
    /// Receive descriptors that the device does not have.
    free: Vec<u16>,
    parts: VecDeque<(u16, u32)>,
    next_received: u64,
    lost: u64,
    next_sent: u64,
    in_flight: u64,
}

/// Most packets in flight between the driver and the host.
const MAX_IN_FLIGHT: u64 = 40;
/// Largest packet that the host sends to the driver.
const LARGEST: usize = 20_000;

impl Traffic {
    fn new() -> Traffic {
        Traffic {
            free: (0..256).collect(),
            parts: VecDeque::new(),
            next_received: 0,
            lost: 0,
            next_sent: 0,
            in_flight: 0,
        }
    }

    fn offer_buffers(&mut self, machine: &mut Machine, count: u64) {
        for _ in 0..count {
            let Some(index) = self.free.pop() else {
                break;
            };
            let buffer = writable(DATA + u64::from(index) * PLACE_SIZE, PLACE_SIZE as u32);
            machine.receive.write_descriptor(index, buffer, 2, 0);
            machine.receive.offer_head(index);
        }
        machine.receive.ring_doorbell();
    }

    fn send(&mut self, machine: &mut Machine, count: u64) {
        for _ in 0..count.min(255 - self.in_flight) {
            let packet = numbered(self.next_sent, PLACE_SIZE as usize);
            let head = machine.transmit.next_head();
            let address = TRANSMIT_DATA + u64::from(head) * PLACE_SIZE;
            let place = GuestAddress(address);
            machine.memory.write_slice(&packet, place).unwrap();
            let buffer = readable(address, packet.len() as u32);
            machine.transmit.offer(&[buffer]);
            self.next_sent += 1;
            self.in_flight += 1;
        }
        machine.transmit.ring_doorbell();
    }

    /// Takes what the device has returned.
    fn take(&mut self, machine: &mut Machine) {
        self.in_flight -= machine.transmit.take_used().len() as u64;
        self.parts.extend(machine.receive.take_used());
        while let Some(&(head, _)) = self.parts.front() {
            let place = |head: u16| DATA + u64::from(head) * PLACE_SIZE;
            let count = machine.bytes(place(head) + 10, 2);
            let count = u16::from_le_bytes([count[0], count[1]]);
            assert!((1..=self.parts.len()).contains(&count.into()));
            let mut bytes = Vec::new();
            for (head, len) in self.parts.drain(..usize::from(count)) {
                bytes.extend(machine.bytes(place(head), len as usize));
                assert!(!self.free.contains(&head), "it was returned twice");
                self.free.push(head);
            }
            let number = u64::from_le_bytes(*bytes[NUMBER..].first_chunk().unwrap());
            assert!(number >= self.next_received, "{number} comes again");
            self.lost += number - self.next_received;
            self.next_received = number + 1;
            assert!(
                bytes == received(numbered(number, LARGEST), count),
                "{number}"
            );
        }
    }
}

/// Ends a thread even if a test has failed.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Exchanges packets with the host as fast as possible in both directions, with pauses at random moments.
/// With `replaced`, another worker takes over after some of them, and then packets to the driver may be lost.
fn exchange(features: u64, count: u64, replaced: bool) {
    let (tap, host) = stand_in();
    let tap = Arc::new(tap);
    let mut machine = Machine::with(features, host, |activation| {
        Box::new(worker(tap.clone(), activation))
    });
    let (host, ended) = (machine.host.try_clone().unwrap(), AtomicBool::new(false));
    let arrived = AtomicU64::new(0);
    let mut traffic = Traffic::new();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut out_of_order = 0;
    std::thread::scope(|scope| {
        let (ended, arrived) = (&ended, &arrived);
        scope.spawn(move || {
            let (mut next_sent, mut next_received) = (0, 0);
            let mut bytes = vec![0; 2 * MAX_PACKET_SIZE];
            while !ended.load(Ordering::Relaxed) {
                if next_sent < count && write(&host, &numbered(next_sent, LARGEST)).is_ok() {
                    next_sent += 1;
                }
                while let Ok(len) = read(&host, &mut bytes) {
                    let expected = numbered(next_received, PLACE_SIZE as usize);
                    assert!(bytes[..len] == expected, "{next_received} is sent once");
                    next_received += 1;
                    arrived.store(next_received, Ordering::Relaxed);
                }
            }
        });
        let _end = EndOnDrop(ended);
        let start = Instant::now();
        let mut idle = 0;
        let is_sent = || arrived.load(Ordering::Relaxed) == count;
        while traffic.next_received < count || traffic.in_flight > 0 || !is_sent() {
            traffic.offer_buffers(&mut machine, random.below(64));
            // A full socket drops packets that are sent together, as a tap without memory does.
            let in_flight = traffic.next_sent - arrived.load(Ordering::Relaxed);
            let allowed = (count - traffic.next_sent).min(MAX_IN_FLIGHT - in_flight);
            traffic.send(&mut machine, random.below(MAX_IN_FLIGHT).min(allowed));
            for _ in 0..random.below(4) {
                machine.turn();
            }
            if random.below(4) == 0 {
                let worker = machine.pause();
                let section = worker.save().unwrap().unwrap();
                out_of_order += u32::from(!state(&section).receivers[0].substitutes.is_empty());
                let worker: Box<dyn VirtioWorker> = if replaced && random.below(8) == 0 {
                    let activation = machine.activation(features, &*worker);
                    drop(worker);
                    Box::new(super::worker(tap.clone(), activation))
                } else {
                    worker
                };
                machine.resume(worker);
            }
            let before = traffic.next_received;
            traffic.take(&mut machine);
            // The last packets may be among the lost ones.
            idle = if traffic.next_received == before {
                idle + 1
            } else {
                0
            };
            if replaced && idle > 5000 && traffic.in_flight == 0 && is_sent() {
                traffic.lost += count - traffic.next_received;
                break;
            }
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the device stands still"
            );
        }
    });
    assert!(out_of_order > 0, "buffers were always put back in order");
    assert!(replaced || traffic.lost == 0);
    assert!(traffic.lost < count / 2);
    assert!(!machine.link.needs_reset());
}

#[test]
fn each_packet_passes_once_however_often_the_device_is_paused() {
    exchange(MERGE | SEGMENTS, 20_000, false);
    exchange(MERGE | SEGMENTS | F_EVENT_IDX, 20_000, false);
}

#[test]
fn no_packet_passes_twice_as_other_workers_go_on() {
    exchange(MERGE | SEGMENTS, 20_000, true);
    exchange(MERGE | SEGMENTS | F_EVENT_IDX, 20_000, true);
}

/// Makes a machine whose driver has buffers for all but the last byte of a packet, with that packet read and
/// another one after it.
fn lacking_buffers() -> (Machine, Arc<Tap>) {
    let (tap, host) = stand_in();
    let tap = Arc::new(tap);
    let mut machine = Machine::with(MERGE | SEGMENTS, host, |activation| {
        Box::new(worker(tap.clone(), activation))
    });
    machine.offer_receive_buffers(&[100, 100, 100, 50]);
    machine.host_sends(&packet(351, 7));
    machine.host_sends(&packet(30, 8));
    machine.run();
    assert_eq!(machine.receive.take_used(), []);
    (machine, tap)
}

#[test]
fn a_packet_that_was_read_outlives_a_pause() {
    let (mut machine, _) = lacking_buffers();
    for _ in 0..3 {
        let worker = machine.pause();
        // Nothing guarantees that the buffers keep their content.
        machine
            .memory
            .write_slice(&[0xee; 350], GuestAddress(DATA))
            .unwrap();
        machine.resume(worker);
        machine.run();
        assert_eq!(machine.receive.take_used(), []);
    }
    machine.receive.offer(&[writable(DATA + 350, 100)]);
    machine.receive.offer(&[writable(DATA + 450, 100)]);
    machine.receive.ring_doorbell();
    machine.run();
    assert_eq!(
        machine.receive.take_used(),
        [(0, 100), (1, 100), (2, 100), (3, 50), (4, 1), (5, 30)]
    );
    assert_eq!(machine.bytes(DATA, 351), received(packet(351, 7), 5));
    assert_eq!(machine.bytes(DATA + 450, 30), received(packet(30, 8), 1));
}

#[test]
fn a_packet_that_was_read_is_lost_and_counted_when_another_worker_goes_on() {
    let (mut machine, tap) = lacking_buffers();
    let worker = machine.pause();
    let activation = machine.activation(MERGE | SEGMENTS, &*worker);
    drop(worker);
    let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
    let config = Arc::new(config_space(MAC, 1, 1500));
    let worker = Worker::new(
        rings(tap),
        1500,
        MAC,
        config,
        shared.clone(),
        None,
        activation,
    )
    .unwrap();
    let lost = serde_json::to_value(&*shared.metrics).unwrap()["rx_fails"].as_u64();
    assert!((1..=2).contains(&lost.unwrap()));
    machine.resume(Box::new(worker));
    machine.run();
    machine.host_sends(&packet(150, 9));
    machine.run();
    assert_eq!(machine.receive.take_used(), [(0, 100), (1, 50)]);
    assert_eq!(machine.bytes(DATA, 150), received(packet(150, 9), 2));
}

/// Makes a machine whose driver has given these commands, and its paused worker.
fn commanded(commands: &[Vec<u8>]) -> (Machine, Box<dyn VirtioWorker>) {
    let (tap, host) = stand_in();
    let mut machine = Machine::with(COMMANDS, host, |activation| {
        Box::new(worker(Arc::new(tap), activation))
    });
    for command in commands {
        assert_eq!(machine.command(command), 0);
    }
    let worker = machine.pause();
    (machine, worker)
}

fn state(section: &Section) -> WorkerState {
    section.decode().unwrap()
}

#[test]
fn another_worker_knows_what_the_driver_has_commanded() {
    let table = [
        &[1, 0][..],
        &[1, 0, 0, 0, 2, 0, 0, 0, 0, 2],
        &[1, 0, 0, 0, 3, 0, 0, 0, 0, 2],
    ];
    let (machine, worker) = commanded(&[vec![0, 0, 0], vec![0, 5, 1], table.concat()]);
    let saved = worker.save().unwrap().unwrap();
    assert_ne!(state(&saved).filter, ReceiveFilter::new());
    let activation = machine.activation(COMMANDS, &*worker);
    let other = super::worker(Arc::new(stand_in().0), activation);
    assert_eq!(other.save().unwrap().unwrap(), saved);
    assert_eq!(other.progress(), worker.progress());
}

#[test]
fn a_state_that_no_worker_has_is_refused() {
    let (machine, worker) = commanded(&[]);
    let good = state(&worker.save().unwrap().unwrap());
    let address_count = |count| {
        let unicast = AddressList {
            addresses: vec![[2; 6]; count],
            is_complete: true,
        };
        let mut state = good.clone();
        state.filter.set_table(unicast.clone(), unicast);
        state
    };
    let substitutes = |count| {
        let mut state = good.clone();
        state.receivers[0].substitutes = vec![u16::MAX; count];
        state
    };
    let pairs = |pairs_in_use, receiver_count| WorkerState {
        pairs_in_use,
        receivers: vec![good.receivers[0].clone(); receiver_count],
        ..good.clone()
    };
    let offloads = WorkerState {
        offloads: 1 << VIRTIO_NET_F_GUEST_CSUM,
        ..good.clone()
    };
    for (is_good, state) in [
        (true, good.clone()),
        (true, address_count(MAX_ADDRESSES)),
        (false, address_count(MAX_ADDRESSES + 1)),
        (true, substitutes(256)),
        (false, substitutes(257)),
        (false, pairs(0, 1)),
        (false, pairs(2, 1)),
        (false, pairs(2, 2)),
        (false, pairs(1, 0)),
        (false, offloads),
    ] {
        let mut activation = machine.activation(COMMANDS, &*worker);
        activation.state = Some(Section::of(&state).unwrap());
        let config = Arc::new(config_space(MAC, 1, 1500));
        let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
        let tap = Arc::new(stand_in().0);
        let made = Worker::new(rings(tap), 1500, MAC, config, shared, None, activation);
        assert_eq!(made.is_ok(), is_good, "{state:?}");
    }
}

#[test]
fn heads_that_the_driver_never_offered_need_a_reset() {
    let (tap, host) = stand_in();
    let tap = Arc::new(tap);
    let mut machine = Machine::with(MERGE, host, |activation| {
        Box::new(worker(tap.clone(), activation))
    });
    machine.offer_receive_buffers(&[2000; 3]);
    machine.run();
    let worker = machine.pause();
    let mut bad = state(&worker.save().unwrap().unwrap());
    bad.receivers[0].substitutes = vec![0, u16::MAX];
    let mut activation = machine.activation(MERGE, &*worker);
    activation.state = Some(Section::of(&bad).unwrap());
    drop(worker);
    machine.resume(Box::new(super::worker(tap, activation)));
    for seed in 0..3 {
        machine.host_sends(&packet(60, seed));
    }
    machine.run();
    assert!(machine.link.needs_reset());
    drop(machine.pause());
}

#[test]
fn only_its_own_configuration_space_fits_a_card() {
    let mut card = net(stand_in().0, MAC, Some(1500));
    let space = |mac, pairs, mtu| config_space(mac, pairs, mtu).save().0;
    let with_status = |status: u8| {
        let mut config = space(MAC, 1, 1500);
        config[6] = status;
        config
    };
    for (fits, config) in [
        (true, space(MAC, 1, 1500)),
        (true, with_status(3)),
        (false, with_status(4)),
        (true, space([2, 9, 9, 9, 9, 9], 1, 1500)),
        (false, space([3, 9, 9, 9, 9, 9], 1, 1500)),
        (false, space([0; 6], 1, 1500)),
        (false, space(MAC, 2, 1500)),
        (false, space(MAC, 1, 1400)),
        (false, Vec::new()),
        (false, [space(MAC, 1, 1500), vec![0]].concat()),
    ] {
        match card.restore(&config, None) {
            Ok(()) => assert!(fits, "{config:?}"),
            Err(RestoreError::Invalid { .. }) => assert!(!fits, "{config:?}"),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn the_address_that_a_driver_has_set_ends_with_it_wherever_it_was_set() {
    let set = [2, 9, 8, 7, 6, 5];
    let (machine, worker) = commanded(&[]);
    let activation = machine.activation(COMMANDS, &*worker);
    let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
    // The transport has restored the configuration space.
    let config = Arc::new(config_space(set, 1, 1500));
    let tap = Arc::new(stand_in().0);
    let worker = Worker::new(
        rings(tap),
        1500,
        MAC,
        config.clone(),
        shared,
        None,
        activation,
    )
    .unwrap();
    assert_eq!(mac(&config), set);
    drop(worker);
    assert_eq!(mac(&config), MAC);

    // No worker is made, as a socket is not a tap.
    let mut card = net(stand_in().0, MAC, None);
    set_mac(&card.config, set);
    let activation = Machine::new(COMMANDS).activation(COMMANDS, &*commanded(&[]).1);
    assert!(card.activate(activation).is_err());
    assert_eq!(mac(&card.config), MAC);
    set_mac(&card.config, set);
    card.reset();
    assert_eq!(mac(&card.config), MAC);
}

#[test]
fn limits_that_are_changed_in_a_pause_hold_after_it() {
    let one_an_hour = Limits {
        operations: Some(RateLimit {
            size: 1,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 0,
        }),
        bytes: None,
    };
    let limits = NetLimits {
        receive: one_an_hour,
        transmit: one_an_hour,
    };
    let (tap, host) = stand_in();
    let shared = Arc::new(Shared::new(&limits).unwrap());
    let handle = NetHandle {
        shared: shared.clone(),
    };
    let mut machine = Machine::with(MERGE, host, |activation| {
        let config = Arc::new(config_space(MAC, 1, 1500));
        Box::new(
            Worker::new(
                rings(Arc::new(tap)),
                1500,
                MAC,
                config,
                shared,
                None,
                activation,
            )
            .unwrap(),
        )
    });
    machine.offer_receive_buffers(&[2000; 5]);
    for seed in 0..5 {
        machine.host_sends(&packet(60, seed));
    }
    machine.run();
    let worker = machine.pause();
    machine.resume(worker);
    machine.run();
    // One packet, and one that exceeds the limit.
    assert_eq!(machine.receive.take_used().len(), 2);
    let worker = machine.pause();
    handle.set_limits(&NetLimits::default()).unwrap();
    machine.resume(worker);
    machine.run();
    assert_eq!(machine.receive.take_used().len(), 3);
}

#[test]
fn a_device_that_needs_a_reset_can_be_paused() {
    for buffer in [
        readable(DATA, 100),
        readable(MEMORY_SIZE, 100),
        writable(DATA, 11),
    ] {
        let mut machine = Machine::new(MERGE | COMMANDS);
        for driver in [
            &mut machine.receive,
            &mut machine.transmit,
            &mut machine.control,
        ] {
            driver.offer(&[buffer]);
            driver.ring_doorbell();
        }
        machine.run();
        assert!(machine.link.needs_reset());
        let worker = machine.pause();
        machine.resume(worker);
        machine.run();
        drop(machine.pause());
    }
}

/// A card whose tap is a socket, which has no offloads to set.
struct CardOfSocket(Net);

impl VirtioDevice for CardOfSocket {
    fn device_id(&self) -> u32 {
        self.0.device_id()
    }

    fn features(&self) -> u64 {
        self.0.features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.0.queue_max_sizes()
    }

    fn config(&self) -> &ConfigSpace {
        self.0.config()
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        let Net {
            rings,
            config,
            shared,
            ..
        } = &self.0;
        let (rings, config, shared) = (rings.clone(), config.clone(), shared.clone());
        let worker = Worker::new(rings, self.0.mtu, MAC, config, shared, None, activation)?;
        Ok(Box::new(worker))
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn restore(&mut self, config: &[u8], state: Option<&Section>) -> Result<(), RestoreError> {
        self.0.restore(config, state)
    }
}

/// A card that is connected to a socket, and whose driver changes its address.
struct Cable {
    tap: OwnedFd,
    host: OwnedFd,
}

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const PLACE: u64 = 0x1000;

impl Cable {
    fn offer(driver: &mut suspend_test::Driver) {
        driver.offer(RECEIVE, &[writable(FREE_MEMORY, PLACE as u32)]);
    }

    fn receive(driver: &mut suspend_test::Driver, packet: &[u8]) {
        assert_eq!(driver.wait(RECEIVE, 1), [packet.len() as u32]);
        assert!(driver.load(FREE_MEMORY, packet.len()) == received(packet.to_vec(), 1));
    }

    fn transmit(driver: &mut suspend_test::Driver, packet: &[u8]) {
        driver.store(FREE_MEMORY + PLACE, packet);
        driver.offer(
            TRANSMIT,
            &[readable(FREE_MEMORY + PLACE, packet.len() as u32)],
        );
    }

    fn has_sent(&self, driver: &mut suspend_test::Driver, packet: &[u8]) {
        driver.wait(TRANSMIT, 1);
        let mut bytes = vec![0; 0x1000];
        let len = read(&self.host, &mut bytes).unwrap();
        assert!(bytes[..len] == *packet);
    }
}

impl Backend for Cable {
    const QUEUES: u64 = 3;
    const FEATURES: u64 = u64::MAX;

    fn new() -> Cable {
        let (tap, host) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_NONBLOCK,
        )
        .unwrap();
        Cable { tap, host }
    }

    fn device(&mut self, _: &Arc<GuestMemory>, _: Arc<DriverLink>) -> Box<dyn VirtioDevice> {
        let tap = Tap::from(self.tap.try_clone().unwrap());
        Box::new(CardOfSocket(net(tap, MAC, None)))
    }

    /// Sets the card's address, which is then in the configuration space.
    fn set_up(&mut self, driver: &mut suspend_test::Driver) {
        let command = FREE_MEMORY + 2 * PLACE;
        driver.store(command, &[1, 1, 2, 9, 9, 9, 9, 9]);
        driver.offer(CONTROL, &[readable(command, 8), writable(command + 8, 1)]);
        driver.wait(CONTROL, 1);
        assert_eq!(driver.load(command + 8, 1), [0]);
    }

    fn work(&mut self, driver: &mut suspend_test::Driver) {
        let packet = packet(200, 1);
        Cable::offer(driver);
        write(&self.host, &packet).unwrap();
        Cable::receive(driver, &packet);
        Cable::transmit(driver, &packet);
        self.has_sent(driver, &packet);
    }

    /// Offers a buffer for a packet that the host has yet to send, and begins to send a packet to the host.
    fn begin(&mut self, driver: &mut suspend_test::Driver) {
        Cable::offer(driver);
        Cable::transmit(driver, &packet(300, 2));
    }

    fn end(&mut self, driver: &mut suspend_test::Driver) {
        self.has_sent(driver, &packet(300, 2));
        write(&self.host, &packet(400, 3)).unwrap();
        Cable::receive(driver, &packet(400, 3));
    }
}

suspend_tests!(VirtioGuest<Cable>);

/// Address of the rings of a moved card's driver.
const MOVED_RINGS: u64 = 0x1000;

/// A driver of a card, with its three queues.
struct MovingDriver {
    machine: SuspendMachine,
    queues: Vec<TestDriver>,
    /// The far end of the card's tap. Without it, the card has no link.
    _far: OwnedFd,
}

impl MovingDriver {
    /// Makes a driver that accepts `features`, and whose card is at work.
    fn new(features: u64) -> MovingDriver {
        let memory = memory();
        let (mut machine, far) = SuspendMachine::new(&memory, MovingDriver::card);
        let queues: Vec<_> = (0..3)
            .map(|index| TestDriver::new(&memory, MOVED_RINGS + index * RINGS_SIZE, 64))
            .collect();
        let drivers: Vec<_> = queues.iter().collect();
        machine.initialize(features, &drivers);
        MovingDriver {
            machine,
            queues,
            _far: far,
        }
    }

    fn card(_: Arc<DriverLink>) -> (Box<dyn VirtioDevice>, OwnedFd) {
        let (tap, far) = stand_in();
        (Box::new(CardOfSocket(net(tap, MAC, None))), far)
    }

    /// Saves the card, which is paused, and has the driver go on elsewhere, where the card is still paused.
    fn moved(self) -> MovingDriver {
        let (machine, far) = self.machine.moved(MovingDriver::card);
        let mut queues = self.queues;
        for queue in &mut queues {
            queue.move_to(&machine.memory);
        }
        MovingDriver {
            machine,
            queues,
            _far: far,
        }
    }

    /// Returns the status field of the card.
    fn status(&mut self) -> u8 {
        self.machine.config(8)[6]
    }

    /// Gives a command without data, and returns the answer.
    fn command(&mut self, command: [u8; 2]) -> u8 {
        let memory = self.machine.memory.clone();
        memory.write_slice(&command, GuestAddress(DATA)).unwrap();
        self.queues[CONTROL].offer(&[readable(DATA, 2), writable(DATA + 2, 1)]);
        self.machine.ring_doorbell(CONTROL as u32);
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.queues[CONTROL].take_used().is_empty() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_micros(100));
        }
        memory.read_obj(GuestAddress(DATA + 2)).unwrap()
    }
}

#[test]
fn a_driver_that_goes_on_elsewhere_is_asked_to_announce_its_card() {
    const LINK: u8 = 1;
    const LINK_AND_ANNOUNCE: u8 = 3;
    const CONFIGURATION_CHANGE: u32 = 2;
    let mut driver = MovingDriver::new(u64::MAX);
    driver.machine.pause().unwrap();
    driver.machine.resume();
    assert_eq!(driver.status(), LINK, "it is still where it was");
    for _ in 0..2 {
        driver.machine.pause().unwrap();
        driver = driver.moved();
        assert_eq!(driver.status(), LINK);
        driver.machine.resume();
        assert_eq!(driver.status(), LINK_AND_ANNOUNCE);
        let causes = driver.machine.read(register::INTERRUPT_STATUS);
        assert_ne!(causes & CONFIGURATION_CHANGE, 0);
        assert!(driver.machine.interrupts.take() > 0);
        assert_eq!(driver.command([3, 0]), 0);
        assert_eq!(driver.status(), LINK);
    }

    // It is asked until it has answered, elsewhere again if need be, and the next driver is not asked.
    driver.machine.pause().unwrap();
    driver = driver.moved();
    driver.machine.resume();
    driver.machine.pause().unwrap();
    driver = driver.moved();
    assert_eq!(driver.status(), LINK_AND_ANNOUNCE);
    driver.machine.resume();
    assert_eq!(driver.status(), LINK_AND_ANNOUNCE);
    driver.machine.write(register::STATUS, 0);
    assert_eq!(driver.status(), LINK);
}

#[test]
fn a_driver_that_cannot_announce_its_card_is_not_asked() {
    for refused in [VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_CTRL_VQ] {
        let mut driver = MovingDriver::new(!(1 << refused));
        driver.machine.pause().unwrap();
        let mut driver = driver.moved();
        driver.machine.resume();
        assert_eq!(driver.status(), 1);
    }
}

/// The descriptors of the rings that wait for a worker.
fn waiting_rings(store: &RingStore) -> [Option<RawFd>; 2] {
    let rings = store.take(0);
    let descriptors = [&rings.receive, &rings.transmit].map(|ring| {
        ring.as_ref()
            .filter(|ring| ring.is_usable())
            .map(AsRawFd::as_raw_fd)
    });
    store.give_back(0, rings);
    descriptors
}

#[test]
fn drivers_one_after_the_other_have_the_rings_that_were_made_with_the_device() {
    let memory = memory();
    let (mut machine, store) = SuspendMachine::new(&memory, |_| {
        let card = net(stand_in().0, MAC, None);
        let store = card.rings.clone();
        (Box::new(CardOfSocket(card)), store)
    });
    let made = waiting_rings(&store);
    assert!(made.iter().all(Option::is_some), "{made:?}");
    let receive = TestDriver::new(&memory, RECEIVE_RINGS, 256);
    let transmit = TestDriver::new(&memory, TRANSMIT_RINGS, 256);
    without_io_uring_setup(|| {
        for _ in 0..3 {
            machine.initialize(COMMON_FEATURES, &[&receive, &transmit]);
            assert_eq!(waiting_rings(&store), [None; 2]);
            machine.pause().unwrap();
            machine.resume();
            machine.write(register::STATUS, 0);
            assert_eq!(waiting_rings(&store), made);
        }
    });
}

#[test]
fn a_ring_that_has_failed_is_replaced_for_the_next_driver() {
    let store = rings(Arc::new(stand_in().0));
    let mut failed = store.take(0);
    for ring in [&mut failed.receive, &mut failed.transmit] {
        ring.as_mut().unwrap().fail();
    }
    store.give_back(0, failed);
    let (_, host) = stand_in();
    let machine = Machine::with(MERGE, host, |activation| {
        let config = Arc::new(config_space(MAC, 1, 1500));
        let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
        let worker = Worker::new(store.clone(), 1500, MAC, config, shared, None, activation);
        Box::new(worker.unwrap())
    });
    drop(machine);
    assert!(waiting_rings(&store).iter().all(Option::is_some));
}
