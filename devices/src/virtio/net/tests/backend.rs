//! A backend that is not a file.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use bantam_memory::GuestBuffers;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::tap::{FrameFilter, Offloads};
use crate::virtio::net::backend::{NetBackend, NetQueue, PacketBuffer};

/// Returns each packet to its sender. Its descriptor never becomes readable.
struct Echo {
    packets: Mutex<VecDeque<Vec<u8>>>,
    event: EventFd,
}

impl NetBackend for Echo {
    fn label(&self) -> String {
        "an echo".to_owned()
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn queue(&self, index: usize) -> Option<&dyn NetQueue> {
        (index == 0).then_some(self)
    }

    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_filter(&self, _: &FrameFilter) -> io::Result<()> {
        Ok(())
    }

    fn use_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn forget_driver(&self) -> io::Result<()> {
        self.packets.lock().unwrap().clear();
        Ok(())
    }
}

impl AsRawFd for Echo {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl NetQueue for Echo {
    fn write(&self, packet: &mut GuestBuffers) -> io::Result<()> {
        let mut bytes = vec![0; packet.len()];
        packet.read(&mut bytes);
        self.packets.lock().unwrap().push_back(bytes);
        Ok(())
    }

    fn read(&self, buffer: &mut PacketBuffer<'_>) -> io::Result<usize> {
        let packet = self.packets.lock().unwrap().pop_front();
        let packet = packet.ok_or(io::ErrorKind::WouldBlock)?;
        buffer.write_at(0, &packet);
        Ok(packet.len())
    }

    fn has_packets(&self) -> bool {
        !self.packets.lock().unwrap().is_empty()
    }
}

fn echo() -> Echo {
    Echo {
        packets: Mutex::default(),
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
    }
}

fn machine() -> Machine {
    machine_on(Arc::new(echo()))
}

fn machine_on(backend: Arc<dyn NetBackend>) -> Machine {
    let (_, unused) = stand_in();
    Machine::with(MERGE, unused, |activation| {
        let config = Arc::new(config_space(MAC, 1, 1500));
        let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
        let rings = Arc::new(RingStore::new(backend));
        Box::new(Worker::new(rings, 1500, MAC, config, shared, None, activation).unwrap())
    })
}

#[test]
fn packets_that_are_left_after_a_turn_have_another() {
    let echo = echo();
    let packets = vec![packet(70, 1); 3 * MAX_PACKETS_PER_TURN];
    echo.packets.lock().unwrap().extend(packets);
    // One event for all of them.
    echo.event.write(1).unwrap();
    let mut machine = machine_on(Arc::new(echo));
    let mut received = 0;
    for _ in 0..12 {
        machine.offer_receive_buffers(&[2000; 64]);
        machine.run();
        received += machine.receive.take_used().len();
    }
    assert_eq!(received, 3 * MAX_PACKETS_PER_TURN);
}

/// Sockets that a card connects to, one after the other.
type Listener = Arc<Mutex<VecDeque<UnixStream>>>;

/// Makes a backend that connects to the sockets of the listener.
fn stream_to(listener: &Listener) -> FrameStream {
    let listener = listener.clone();
    let connect = move || {
        let socket = listener.lock().unwrap().pop_front();
        socket.ok_or(io::ErrorKind::ConnectionRefused.into())
    };
    FrameStream::connect("a stream".to_owned(), connect).unwrap()
}

/// Adds a socket to the listener, and returns its far end.
fn listen(listener: &Listener) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    listener.lock().unwrap().push_back(near);
    far
}

/// Makes a card on a stream, and the stream's far end.
fn machine_on_stream() -> (Machine, UnixStream) {
    let listener = Listener::default();
    let far = listen(&listener);
    (machine_on(Arc::new(stream_to(&listener))), far)
}

fn frame_of(size: usize) -> Vec<u8> {
    let mut frame = (size as u32).to_be_bytes().to_vec();
    frame.extend((0..size).map(|index| index as u8));
    frame
}

#[test]
fn frames_follow_their_sizes_on_a_stream() {
    let (mut machine, mut far) = machine_on_stream();
    machine.offer_receive_buffers(&[2000; 4]);
    let frames: Vec<_> = [14, 1000, 1514].map(frame_of).concat();
    // They come in pieces that do not begin with frames.
    for piece in frames.chunks(700) {
        far.write_all(piece).unwrap();
        machine.run();
    }
    let used = machine.receive.take_used();
    let sizes: Vec<_> = used.iter().map(|(_, size)| *size as usize).collect();
    assert_eq!(
        sizes,
        [14, 1000, 1514].map(|size| size + PACKET_HEADER_SIZE)
    );
    let place = DATA + 2000 + PACKET_HEADER_SIZE as u64;
    assert_eq!(machine.bytes(place, 1000), frame_of(1000)[4..]);

    let sent = packet(600, 7);
    machine.transmit(&sent, &[12]);
    machine.run();
    let mut bytes = vec![0; 4 + 600 - PACKET_HEADER_SIZE];
    far.read_exact(&mut bytes).unwrap();
    let size = (600 - PACKET_HEADER_SIZE) as u32;
    assert_eq!(bytes[..4], size.to_be_bytes());
    assert_eq!(bytes[4..], sent[PACKET_HEADER_SIZE..]);
}

#[test]
fn a_stream_that_takes_no_more_gets_every_frame_once() {
    let (mut machine, mut far) = machine_on_stream();
    far.set_nonblocking(true).unwrap();
    let (mut got, mut expected) = (Vec::<u8>::new(), Vec::<u8>::new());
    let mut piece = vec![0; 50_000];
    for seed in 0..60 {
        let bytes = packet(60_000, seed);
        expected.extend(((60_000 - PACKET_HEADER_SIZE) as u32).to_be_bytes());
        expected.extend(&bytes[PACKET_HEADER_SIZE..]);
        machine.transmit(&bytes, &[12]);
        machine.run();
        // A part is read at a time, so that the socket has room for a part of a frame.
        while machine.transmit.take_used().is_empty() {
            let count = far.read(&mut piece).unwrap();
            got.extend(&piece[..count]);
            machine.run();
        }
    }
    while let Ok(count) = far.read(&mut piece) {
        got.extend(&piece[..count]);
        machine.run();
    }
    assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
}

#[test]
fn a_stream_that_ends_or_makes_no_sense_is_gone() {
    for bytes in [&b""[..], b"\0\0\0\x05hello", b"\xff\xff\xff\xff"] {
        let (mut machine, mut far) = machine_on_stream();
        machine.offer_receive_buffers(&[2000; 4]);
        far.write_all(bytes).unwrap();
        drop(far);
        machine.run();
        assert!(machine.receive.take_used().is_empty());
        // The guest's packets go nowhere.
        machine.transmit(&packet(600, 7), &[12]);
        machine.run();
        assert_eq!(machine.transmit.take_used().len(), 1);
        assert!(!machine.link.needs_reset());
    }
}

/// A card on a stream that comes and goes, and what is behind it.
struct StreamCard {
    machine: Machine,
    config: Arc<ConfigSpace>,
    listener: Listener,
}

impl StreamCard {
    fn new() -> (StreamCard, UnixStream) {
        let listener = Listener::default();
        let far = listen(&listener);
        let config = Arc::new(config_space(MAC, 1, 1500));
        let (_, unused) = stand_in();
        let features = MERGE
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
        let rings = Arc::new(RingStore::new(Arc::new(stream_to(&listener))));
        let (own, of_worker) = (config.clone(), rings.clone());
        let machine = Machine::with(features, unused, |activation| {
            let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
            let worker = Worker::new(of_worker, 1500, MAC, own, shared, None, activation);
            Box::new(worker.unwrap())
        });
        let card = StreamCard {
            machine,
            config,
            listener,
        };
        (card, far)
    }

    fn has_link(&self) -> bool {
        has_link(&self.config)
    }

    /// Lets the device work until its link is as wanted.
    fn run_until_link_is(&mut self, is_up: bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.has_link() != is_up {
            assert!(Instant::now() < deadline, "the link stays as it is");
            self.machine.run();
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_stream_that_ends_takes_the_link_down_until_there_is_another() {
    let (mut card, mut far) = StreamCard::new();
    card.machine.offer_receive_buffers(&[2000; 4]);
    card.machine.run();
    assert!(card.has_link());
    // Half a frame is under way to the driver, and another of the driver's to the other side.
    far.write_all(&frame_of(1000)[..500]).unwrap();
    for _ in 0..20 {
        card.machine.transmit(&packet(60_000, 1), &[12]);
        card.machine.run();
    }
    let taken = card.machine.transmit.take_used().len();
    assert!(taken < 20, "the stream takes everything");
    drop(far);
    card.machine.run();
    assert!(!card.has_link());
    assert_eq!(card.machine.interrupts.take_configuration_changes(), 1);
    // What waited for it goes nowhere.
    assert_eq!(card.machine.transmit.take_used().len(), 20 - taken);
    card.machine.transmit(&packet(600, 3), &[12]);
    card.machine.run();
    assert_eq!(card.machine.transmit.take_used().len(), 1);

    // Nobody listens for some time.
    thread::sleep(Duration::from_millis(250));
    card.machine.run();
    assert!(!card.has_link());
    let mut far = listen(&card.listener);
    card.run_until_link_is(true);
    assert!(asks_for_announcement(&card.config));
    assert!(card.machine.interrupts.take_configuration_changes() > 0);
    // Neither half is in the new stream.
    far.write_all(&frame_of(700)).unwrap();
    card.machine.run();
    let used = card.machine.receive.take_used();
    let sizes: Vec<_> = used.iter().map(|(_, size)| *size as usize).collect();
    assert_eq!(sizes, [PACKET_HEADER_SIZE + 700]);
    let place = DATA + PACKET_HEADER_SIZE as u64;
    assert_eq!(card.machine.bytes(place, 700), frame_of(700)[4..]);
    let sent = packet(500, 9);
    card.machine.transmit(&sent, &[12]);
    card.machine.run();
    let mut bytes = vec![0; 4 + 500 - PACKET_HEADER_SIZE];
    far.read_exact(&mut bytes).unwrap();
    assert_eq!(
        bytes[..4],
        ((500 - PACKET_HEADER_SIZE) as u32).to_be_bytes()
    );
    assert_eq!(bytes[4..], sent[PACKET_HEADER_SIZE..]);
    assert_eq!(card.machine.transmit.take_used().len(), 1);
}

#[test]
fn a_stream_that_makes_no_sense_each_time_does_not_keep_the_card_busy() {
    let (mut card, mut far) = StreamCard::new();
    card.machine.offer_receive_buffers(&[2000; 4]);
    for _ in 0..3 {
        far.write_all(b"\0\0\0\x05hello").unwrap();
        card.run_until_link_is(false);
        far = listen(&card.listener);
        card.run_until_link_is(true);
    }
    far.write_all(b"\xff\xff\xff\xff").unwrap();
    card.run_until_link_is(false);
    // By now it waits for 800 ms.
    let _far = listen(&card.listener);
    let start = Instant::now();
    card.run_until_link_is(true);
    assert!(start.elapsed() >= Duration::from_millis(500));
    assert!(card.machine.receive.take_used().is_empty());
    assert!(!card.machine.link.needs_reset());
}

#[test]
fn what_a_stream_leaves_to_others_is_not_offered_to_the_driver() {
    let listener = Listener::default();
    let _far = listen(&listener);
    let stream = stream_to(&listener);
    let card = Net::new(Arc::new(stream), MAC, None, &NetLimits::default(), None).unwrap();
    let unfinished = 1 << VIRTIO_NET_F_GUEST_CSUM | SEGMENTS | 1 << VIRTIO_NET_F_HOST_USO;
    assert_eq!(card.features() & (unfinished | 1 | 1 << 11 | 1 << 12), 0);
}

#[test]
fn answers_are_delivered_without_an_event() {
    let mut machine = machine();
    machine.offer_receive_buffers(&[2000; 4]);
    machine.run();
    for seed in 1..=4 {
        let sent = packet(1000, seed);
        machine.transmit(&sent, &[12]);
        machine.run();
        assert_eq!(machine.receive.take_used().len(), 1);
        let address = DATA + u64::from(seed - 1) * 2000;
        // The packet that is sent next is put over the first buffer.
        if seed > 1 {
            assert_eq!(machine.bytes(address, 1000), received(sent, 1));
        }
    }
}

#[test]
fn answers_wait_for_buffers() {
    let mut machine = machine();
    machine.transmit(&packet(600, 7), &[12]);
    machine.run();
    assert!(machine.receive.take_used().is_empty());
    machine.offer_receive_buffers(&[400, 400]);
    machine.run();
    assert_eq!(machine.receive.take_used().len(), 2);
}
