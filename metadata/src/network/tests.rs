//! A service, and a guest whose network is another instance of the same stack.

mod hostile;

use serde_json::{Value, json};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl,
    TcpPacket, TcpRepr, TcpSeqNumber,
};

use super::*;
use crate::metadata::{MetadataVersion, test_metadata};
use crate::service::MetadataAddress;

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 2);
const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Service, guest, the link between them, and the time.
struct World {
    metadata: Metadata,
    network: MetadataNetwork,
    guest: Interface,
    sockets: SocketSet<'static>,
    from_guest: VecDeque<Vec<u8>>,
    start: Instant,
    now: Instant,
    next_port: u16,
}

/// The guest's link.
struct GuestFrames<'a> {
    received: Option<Vec<u8>>,
    sent: &'a mut VecDeque<Vec<u8>>,
}

impl Device for GuestFrames<'_> {
    type RxToken<'a>
        = OwnedFrame
    where
        Self: 'a;
    type TxToken<'a>
        = SentFrame<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: StackInstant) -> Option<(OwnedFrame, SentFrame<'_>)> {
        let frame = OwnedFrame(self.received.take()?);
        Some((frame, SentFrame(self.sent)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<SentFrame<'_>> {
        Some(SentFrame(self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        // It verifies the checksums that it receives, and leaves its own to its card.
        capabilities.checksum.ipv4 = Checksum::Rx;
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

struct OwnedFrame(Vec<u8>);

impl RxToken for OwnedFrame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, process: F) -> R {
        process(&self.0)
    }
}

struct SentFrame<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for SentFrame<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, size: usize, fill: F) -> R {
        let mut frame = vec![0; size];
        let result = fill(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl World {
    fn new(version: MetadataVersion, contents: Value) -> World {
        let metadata = test_metadata(version, contents);
        let service = MetadataService {
            metadata: metadata.clone(),
            address: MetadataAddress::default(),
        };
        let start = Instant::now();
        let mut from_guest = VecDeque::new();
        let mut link = GuestFrames {
            received: None,
            sent: &mut from_guest,
        };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC)));
        let mut guest = Interface::new(config, &mut link, StackInstant::ZERO);
        guest.update_ip_addrs(|addresses| addresses.push(IpCidr::new(GUEST.into(), 0)).unwrap());
        World {
            network: MetadataNetwork::new(&service, 1500, start).unwrap(),
            metadata,
            guest,
            sockets: SocketSet::new(Vec::new()),
            from_guest,
            start,
            now: start,
            next_port: 1024,
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 64 << 10]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.next_port += 1;
        let remote = (IpAddress::Ipv4(SERVICE), PORT);
        socket
            .connect(self.guest.context(), remote, self.next_port)
            .unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn guest_time(&self) -> StackInstant {
        StackInstant::from_micros((self.now - self.start).as_micros() as i64)
    }

    /// Polls the guest's stack, with a frame that it receives.
    fn run_guest(&mut self, received: Option<Vec<u8>>) {
        let time = self.guest_time();
        let mut link = GuestFrames {
            received,
            sent: &mut self.from_guest,
        };
        self.guest.poll(time, &mut link, &mut self.sockets);
    }

    /// Exchanges frames until both sides wait.
    fn exchange(&mut self) {
        for _ in 0..10_000 {
            self.run_guest(None);
            let mut quiet = true;
            while let Some(mut frame) = self.from_guest.pop_front() {
                quiet = false;
                assert!(self.network.claims(&frame));
                self.network.accept(&mut frame, self.now);
            }
            self.network.poll(self.now);
            while let Some(frame) = self.network.next_frame() {
                quiet = false;
                let frame = frame.to_vec();
                self.network.take_frame(true);
                self.run_guest(Some(frame));
            }
            if quiet {
                return;
            }
        }
        panic!("the two never come to rest");
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.exchange();
    }

    fn send(&mut self, handle: SocketHandle, bytes: &[u8]) {
        self.exchange();
        let socket = self.socket(handle);
        assert_eq!(socket.send_slice(bytes), Ok(bytes.len()));
        self.exchange();
    }

    fn received(&mut self, handle: SocketHandle) -> String {
        let mut bytes = Vec::new();
        // Reading makes room for more.
        while self.socket(handle).can_recv() {
            let part = self.socket(handle).recv(|part| (part.len(), part.to_vec()));
            bytes.extend(part.unwrap());
            self.exchange();
        }
        String::from_utf8(bytes).unwrap()
    }

    /// Sends a request on a new connection and returns the response.
    fn ask(&mut self, request: &str) -> String {
        let handle = self.connect();
        self.send(handle, request.replace('\n', "\r\n").as_bytes());
        let answer = self.received(handle);
        self.socket(handle).close();
        self.exchange();
        assert!(!self.socket(handle).is_active(), "the connection is closed");
        self.sockets.remove(handle);
        answer
    }

    fn total(
        &self,
        counter: impl Fn(&crate::metrics::MetadataMetrics) -> &bantam_metrics::Counter,
    ) -> u64 {
        counter(self.metadata.metrics()).total()
    }
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn world() -> World {
    World::new(MetadataVersion::V1, json!({"a": "b"}))
}

#[test]
fn a_guest_reads_metadata() {
    let mut world = world();
    let answer = world.ask("GET /a HTTP/1.1\nHost: 169.254.169.254\n\n");
    assert_eq!(
        answer,
        "HTTP/1.1 200 OK\r\nServer: Bantam\r\nConnection: keep-alive\r\n\
         Content-Type: text/plain\r\nContent-Length: 1\r\n\r\nb"
    );
    let change = json!({"a": {"c": 1}});
    world.metadata.patch(change).unwrap();
    let answer = world.ask("GET /a HTTP/1.0\nAccept: application/json\n\n");
    assert_eq!(
        answer,
        "HTTP/1.0 200 OK\r\nServer: Bantam\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"c\":1}"
    );
    assert_eq!(world.total(|metrics| &metrics.connections_created), 2);
    assert_eq!(world.total(|metrics| &metrics.connections_destroyed), 2);
    let frames = world.total(|metrics| &metrics.tx_frames);
    assert!(frames >= 6, "{frames}");
    assert_eq!(world.total(|metrics| &metrics.tx_count), frames);
    assert_eq!(world.network.wait_time(world.now), None, "it is at rest");
}

#[test]
fn a_session_has_a_token() {
    let mut world = World::new(MetadataVersion::V2, json!({"a": "b"}));
    let answer = world.ask("GET /a HTTP/1.1\n\n");
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    let answer = world.ask("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 100\n\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("\r\nX-metadata-token-ttl-seconds: 100\r\n"));
    let request = format!("GET /a HTTP/1.1\nX-metadata-token: {}\n\n", body(&answer));
    assert_eq!(body(&world.ask(&request)), "b");
    world.now += Duration::from_secs(101);
    let answer = world.ask(&request);
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
}

#[test]
fn a_connection_serves_many_requests() {
    let mut world = world();
    let handle = world.connect();
    for _ in 0..100 {
        world.send(handle, b"GET /a HTTP/1.1\r\n\r\n");
        assert_eq!(body(&world.received(handle)), "b");
        world.pass(Duration::from_secs(1));
    }
    world.send(handle, &b"GET /a HTTP/1.1\r\n\r\n".repeat(50));
    let answers = world.received(handle);
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 50);
    assert_eq!(world.total(|metrics| &metrics.connections_created), 1);
}

#[test]
fn a_large_answer_waits_for_a_slow_client() {
    let large = "x".repeat(40_000);
    let mut world = World::new(MetadataVersion::V1, json!({"a": large}));
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; 100]),
        SocketBuffer::new(vec![0; 100]),
    );
    let remote = (IpAddress::Ipv4(SERVICE), PORT);
    socket
        .connect(world.guest.context(), remote, 2000_u16)
        .unwrap();
    let handle = world.sockets.add(socket);
    world.send(handle, b"GET /a HTTP/1.1\r\n\r\n");
    let mut answer = String::new();
    // A window that opens in small steps is announced with a delay.
    for _ in 0..20_000 {
        answer.push_str(&world.received(handle));
        if answer.ends_with('x') && body(&answer).len() == large.len() {
            break;
        }
        world.pass(Duration::from_millis(1));
    }
    assert!(body(&answer) == large, "{} bytes came", answer.len());
}

#[test]
fn a_slow_client_is_cut_off() {
    let large = "x".repeat(40_000);
    let mut world = World::new(MetadataVersion::V1, json!({"a": large}));
    let idle = world.connect();
    world.exchange();
    let half = world.connect();
    world.send(half, b"GET /a HTTP/1.1\r\n");
    let unread = world.connect();
    // More than fits into the buffers of guest and service together.
    world.send(unread, &b"GET /a HTTP/1.1\r\n\r\n".repeat(3));
    for _ in 0..40 {
        // A byte now and then does not help.
        world.send(half, b"a");
        world.pass(Duration::from_millis(700));
    }
    for handle in [idle, half, unread] {
        assert!(world.socket(handle).may_send());
    }
    assert!(world.network.wait_time(world.now).unwrap() < Duration::from_secs(3));
    world.pass(Duration::from_secs(2));
    for handle in [idle, half, unread] {
        assert!(!world.socket(handle).is_active());
    }
    assert_eq!(world.total(|metrics| &metrics.connections_destroyed), 3);
    assert_eq!(body(&world.ask("GET /a HTTP/1.1\n\n")).len(), 40_000);
}

#[test]
fn a_client_that_stops_sending_is_answered() {
    let mut world = world();
    let handle = world.connect();
    world.send(handle, b"GET /a HTTP/1.1\r\n\r\n");
    world.socket(handle).close();
    world.exchange();
    assert_eq!(body(&world.received(handle)), "b");
    let handle = world.connect();
    world.send(handle, b"GET /a HT");
    world.socket(handle).close();
    world.exchange();
    assert_eq!(world.received(handle), "");
    assert_eq!(world.total(|metrics| &metrics.connections_destroyed), 2);
}

#[test]
fn connections_beyond_the_limit_are_refused_until_others_end() {
    let mut world = world();
    let open: Vec<_> = (0..MAX_CONNECTIONS).map(|_| world.connect()).collect();
    world.exchange();
    let refused = world.connect();
    world.exchange();
    assert!(!world.socket(refused).is_open());
    world.send(open[7], b"GET /a HTTP/1.0\r\n\r\n");
    assert_eq!(body(&world.received(open[7])), "b");
    world.socket(open[7]).close();
    world.exchange();
    assert_eq!(body(&world.ask("GET /a HTTP/1.1\n\n")), "b");
    // Connections that follow one another do not wait for those that have ended.
    for _ in 0..200 {
        assert_eq!(body(&world.ask("GET /a HTTP/1.0\n\n")), "b");
    }
}

#[test]
fn a_guest_that_receives_nothing_is_waited_for() {
    let mut world = World::new(MetadataVersion::V1, json!({"a": "x".repeat(40_000)}));
    let handles: Vec<_> = (0..MAX_CONNECTIONS).map(|_| world.connect()).collect();
    world.exchange();
    for &handle in &handles {
        let request = b"GET /a HTTP/1.1\r\n\r\n";
        world.socket(handle).send_slice(request).unwrap();
    }
    world.run_guest(None);
    for mut frame in std::mem::take(&mut world.from_guest) {
        world.network.accept(&mut frame, world.now);
    }
    for _ in 0..10 {
        world.network.poll(world.now);
        assert_eq!(world.network.to_guest.len(), MAX_WAITING_FRAMES);
        let wait = world.network.wait_time(world.now).unwrap();
        assert!(wait > Duration::from_secs(20), "only a deadline is ahead");
    }
    // Meanwhile a frame that needs an answer is dropped.
    let errors = world.total(|metrics| &metrics.rx_accepted_err);
    let mut frame = segment(&TcpRepr::clone(&SYN), &[]);
    world.network.accept(&mut frame, world.now);
    assert_eq!(world.total(|metrics| &metrics.rx_accepted_err), errors + 1);
    world.exchange();
    for handle in handles {
        world.pass(Duration::from_millis(1));
        assert_eq!(body(&world.received(handle)).len(), 40_000);
    }
}

/// Returns a frame with an ARP packet.
fn arp(operation: u8, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = [
        &[0xff; 6][..],
        &GUEST_MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
    ]
    .concat();
    frame.extend([&GUEST_MAC[..], &GUEST.octets(), &[0; 6], &target.octets()].concat());
    frame
}

const SYN: TcpRepr<'static> = TcpRepr {
    src_port: 3000,
    dst_port: PORT,
    control: TcpControl::Syn,
    seq_number: TcpSeqNumber(1000),
    ack_number: None,
    window_len: 1000,
    window_scale: None,
    max_seg_size: None,
    sack_permitted: false,
    sack_ranges: [None; 3],
    timestamp: None,
    payload: &[],
};

/// Returns a frame with a TCP segment of the guest, followed by further bytes.
fn segment(tcp: &TcpRepr<'_>, behind: &[u8]) -> Vec<u8> {
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: SERVICE,
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; ETHERNET_HEADER_SIZE + ip.buffer_len() + tcp.buffer_len()];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    frame.set_src_addr(EthernetAddress(GUEST_MAC));
    frame.set_dst_addr(EthernetAddress(MAC));
    frame.set_ethertype(EthernetProtocol::Ipv4);
    let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
    let checksums = ChecksumCapabilities::ignored();
    ip.emit(&mut packet, &checksums);
    let mut segment = TcpPacket::new_unchecked(packet.payload_mut());
    tcp.emit(&mut segment, &GUEST.into(), &SERVICE.into(), &checksums);
    bytes.extend_from_slice(behind);
    bytes
}

#[test]
fn frames_for_the_address_are_claimed_and_no_others() {
    let network = world().network;
    assert!(network.claims(&arp(1, SERVICE)));
    assert!(network.claims(&arp(2, SERVICE)));
    assert!(!network.claims(&arp(1, GUEST)));
    let mut frame = segment(&SYN, &[]);
    assert!(network.claims(&frame));
    assert!(network.claims(&frame[..CLAIM_SIZE]));
    frame[offset::IPV4_DESTINATION + 3] ^= 1;
    assert!(!network.claims(&frame));
    for ethertype in [[0x86, 0xdd], [0x81, 0x00]] {
        let mut frame = segment(&SYN, &[]);
        frame[offset::ETHERTYPE..ETHERNET_HEADER_SIZE].copy_from_slice(&ethertype);
        assert!(!network.claims(&frame));
    }
    let bad = || network.metadata.metrics().rx_bad_eth.total();
    assert_eq!(bad(), 0);
    for size in 0..CLAIM_SIZE {
        assert!(size >= 34 || !network.claims(&segment(&SYN, &[])[..size]));
        assert!(!network.claims(&arp(1, SERVICE)[..size]));
    }
    assert_eq!(bad(), 28);
}

#[test]
fn arp_requests_for_the_address_are_answered() {
    let mut network = world().network;
    network.accept(&mut arp(1, SERVICE), network.start);
    let answer = network.next_frame().unwrap();
    assert_eq!(answer[..12], [GUEST_MAC, MAC].concat());
    assert_eq!(answer[20..22], [0, 2]);
    assert_eq!(answer[22..32], [&MAC[..], &SERVICE.octets()].concat());
    network.take_frame(true);
    network.accept(&mut arp(2, SERVICE), network.start);
    assert_eq!(network.next_frame(), None);
}

#[test]
fn a_frame_is_accepted_whatever_station_it_is_sent_to() {
    let mut network = world().network;
    network.accept(&mut arp(2, SERVICE), network.start);
    let mut frame = segment(&SYN, &[]);
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 99]);
    network.accept(&mut frame, network.start);
    network.poll(network.start);
    let answer = network.next_frame().unwrap();
    assert_eq!(answer[..12], [GUEST_MAC, MAC].concat());
    // SYN and ACK.
    assert_eq!(answer[47], 0x12);
}

#[test]
fn frames_without_a_tcp_segment_are_dropped() {
    let mut network = world().network;
    network.accept(&mut arp(2, SERVICE), network.start);
    let metrics = network.metadata.clone();
    let metrics = metrics.metrics();
    let mut ping = segment(&SYN, &[]);
    ping[offset::IPV4_PROTOCOL] = 1;
    let mut fragment = segment(&SYN, &[]);
    fragment[offset::IPV4_FRAGMENT] = 0x20;
    let mut rest = segment(&SYN, &[]);
    rest[offset::IPV4_FRAGMENT + 1] = 1;
    for mut frame in [ping, fragment, rest] {
        network.accept(&mut frame, network.start);
    }
    assert_eq!(metrics.rx_accepted_unusual.total(), 3);
    network.poll(network.start);
    assert_eq!(network.next_frame(), None);
    let mut unfragmented = segment(&SYN, &[]);
    unfragmented[offset::IPV4_FRAGMENT] = 0x40;
    network.accept(&mut unfragmented, network.start);
    network.poll(network.start);
    assert!(network.next_frame().is_some());
}
