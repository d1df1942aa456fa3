//! A guest whose driver does what a test says.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bantam_memory::GuestMemory;
use bantam_state::Section;
use event_manager::{EventManager, SubscriberId, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use crate::ListeningSocket;
use crate::event_loop::Subscriber;
use crate::virtio::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};
use crate::virtio::vsock::packet::{HEADER_SIZE, HOST_CID, Header, TYPE_STREAM, operation};
use crate::virtio::vsock::{Vsock, VsockMetrics};
use crate::virtio::{Activation, DriverLink, VirtioDevice};
use crate::worker::{QueueProgress, VirtioWorker};

pub const GUEST_CID: u64 = 7;
const RECEIVE_RINGS: u64 = 0;
const TRANSMIT_RINGS: u64 = RINGS_SIZE;
const EVENT_RINGS: u64 = 2 * RINGS_SIZE;
/// Where the packets to be transmitted are, each in a place of its own.
const TRANSMIT_DATA: u64 = 0x1_0000;
const TRANSMIT_SIZE: u64 = 0x4000;
/// Where events are received.
pub const EVENT_DATA: u64 = 0xf000;
/// Where packets are received.
pub const RECEIVE_DATA: u64 = 0x10_0000;
const RECEIVE_SIZE: u32 = 4096;
pub const QUEUE_SIZE: u16 = 64;
const MEMORY_SIZE: usize = 4 << 20;
/// What the guest says of its buffer.
const GUEST_BUFFER: u32 = 1 << 20;

/// A guest, and the device that it drives.
pub struct Guest {
    pub memory: Arc<GuestMemory>,
    pub receive: TestDriver,
    pub transmit: TestDriver,
    pub event: TestDriver,
    pub manager: EventManager<Subscriber>,
    pub worker: Option<SubscriberId>,
    pub device: Vsock,
    pub link: Arc<DriverLink>,
    pub metrics: Arc<VsockMetrics>,
    /// Packets transmitted so far.
    pub sent_packets: u64,
    pub folder: TempDir,
}

/// What the guest has received.
#[derive(Debug, Clone, PartialEq)]
pub struct Packet {
    pub header: Header,
    pub data: Vec<u8>,
}

impl Guest {
    /// A guest that has given the device no buffers yet.
    pub fn new() -> Guest {
        let folder = TempDir::new().unwrap();
        let listener = ListeningSocket::bind(&folder.as_path().join("v")).unwrap();
        let device = Vsock::new(GUEST_CID as u32, listener);
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        let memory = Arc::new(memory);
        let link = InterruptCounter::default().link();
        let mut guest = Guest {
            receive: TestDriver::new(&memory, RECEIVE_RINGS, QUEUE_SIZE),
            transmit: TestDriver::new(&memory, TRANSMIT_RINGS, QUEUE_SIZE),
            event: TestDriver::new(&memory, EVENT_RINGS, QUEUE_SIZE),
            memory,
            manager: EventManager::new().unwrap(),
            worker: None,
            metrics: device.metrics(),
            device,
            link,
            sent_packets: 0,
            folder,
        };
        guest.activate();
        guest
    }

    /// A guest with as many receive buffers as there can be.
    pub fn ready() -> Guest {
        let mut guest = Guest::new();
        guest.offer_buffers(QUEUE_SIZE);
        guest
    }

    pub fn activate(&mut self) {
        self.worker = Some(self.activate_with(&[QueueProgress::default(); 3], None));
    }

    fn activate_with(
        &mut self,
        progress: &[QueueProgress],
        state: Option<Section>,
    ) -> SubscriberId {
        let drivers = [&self.receive, &self.transmit, &self.event];
        let queues = drivers.iter().zip(progress).zip(0..);
        let worker = self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.device.features(),
            queues: queues
                .map(|((driver, progress), index)| driver.queue_from(index, false, *progress))
                .collect(),
            link: self.link.clone(),
            state,
        });
        self.manager
            .add_subscriber(Subscriber::Worker(worker.unwrap()))
    }

    /// Takes the worker off the event loop, as the transport does.
    pub fn pause(&mut self) -> Box<dyn VirtioWorker> {
        let id = self.worker.take().unwrap();
        let Subscriber::Worker(mut worker) = self.manager.remove_subscriber(id).unwrap() else {
            panic!("it is a worker");
        };
        worker.pause().unwrap();
        for queue in worker.progress() {
            assert_eq!(queue.next_available, queue.next_used);
        }
        worker
    }

    pub fn resume(&mut self, worker: Box<dyn VirtioWorker>) {
        self.ring_doorbells();
        let id = self.manager.add_subscriber(Subscriber::Worker(worker));
        self.worker = Some(id);
    }

    /// Has another device, with a socket of its own, go on from the state of a paused worker.
    pub fn restore(&mut self, worker: Box<dyn VirtioWorker>) {
        let (progress, state) = (worker.progress(), worker.save().unwrap());
        let (config, front_state) = (self.device.config().save().0, self.device.save().unwrap());
        drop(worker);
        let folder = TempDir::new().unwrap();
        let listener = ListeningSocket::bind(&folder.as_path().join("v")).unwrap();
        self.device = Vsock::new(GUEST_CID as u32, listener);
        self.metrics = self.device.metrics();
        self.folder = folder;
        self.device.restore(&config, front_state.as_ref()).unwrap();
        self.ring_doorbells();
        self.worker = Some(self.activate_with(&progress, state));
    }

    fn ring_doorbells(&self) {
        for driver in [&self.receive, &self.transmit, &self.event] {
            driver.ring_doorbell();
        }
    }

    /// Makes a buffer for an event available.
    pub fn offer_event_buffer(&mut self) {
        self.event.offer(&[Buffer {
            address: EVENT_DATA,
            len: 4,
            writable: true,
        }]);
        self.event.ring_doorbell();
        self.rest();
    }

    pub fn reset(&mut self) {
        let worker = self.worker.take().unwrap();
        drop(self.manager.remove_subscriber(worker).unwrap());
        self.memory
            .write_slice(&vec![0; 3 * RINGS_SIZE as usize], GuestAddress(0))
            .unwrap();
        self.receive = TestDriver::new(&self.memory, RECEIVE_RINGS, QUEUE_SIZE);
        self.transmit = TestDriver::new(&self.memory, TRANSMIT_RINGS, QUEUE_SIZE);
        self.event = TestDriver::new(&self.memory, EVENT_RINGS, QUEUE_SIZE);
        self.link.set_needs_reset(false);
        self.activate();
    }

    /// Makes receive buffers available, whose place follows from their descriptor.
    pub fn offer_buffers(&mut self, count: u16) {
        for _ in 0..count {
            let head = self.receive.next_head();
            self.receive.offer(&[Buffer {
                address: RECEIVE_DATA + u64::from(head) * u64::from(RECEIVE_SIZE),
                len: RECEIVE_SIZE,
                writable: true,
            }]);
        }
        self.receive.ring_doorbell();
    }

    /// Lets the device work until it has nothing to do.
    pub fn rest(&mut self) {
        for _ in 0..1000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    /// Transmits a packet as it is, and lets the device work.
    pub fn transmit_raw(&mut self, header: &[u8], data: &[u8]) {
        self.post(header, data);
        self.rest();
        self.transmit.take_used();
    }

    /// Makes a packet available.
    pub fn post(&mut self, header: &[u8], data: &[u8]) {
        let head = self.transmit.next_head();
        let address = TRANSMIT_DATA + u64::from(head / 2) * TRANSMIT_SIZE;
        self.memory
            .write_slice(header, GuestAddress(address))
            .unwrap();
        let data_address = address + header.len() as u64;
        self.memory
            .write_slice(data, GuestAddress(data_address))
            .unwrap();
        let part = |address, len: usize| Buffer {
            address,
            len: len as u32,
            writable: false,
        };
        self.transmit
            .offer(&[part(address, header.len()), part(data_address, data.len())]);
        self.transmit.ring_doorbell();
        self.sent_packets += 1;
    }

    pub fn transmit(&mut self, header: Header, data: &[u8]) {
        let header = Header {
            len: data.len() as u32,
            ..header
        };
        self.transmit_raw(&header.to_bytes(), data);
    }

    /// What has come, whose buffers are given back.
    pub fn received(&mut self) -> Vec<Packet> {
        self.rest();
        let mut packets = Vec::new();
        loop {
            let used = self.receive.take_used();
            if used.is_empty() {
                return packets;
            }
            for (head, len) in &used {
                let address = RECEIVE_DATA + u64::from(*head) * u64::from(RECEIVE_SIZE);
                let mut bytes = vec![0; *len as usize];
                self.memory
                    .read_slice(&mut bytes, GuestAddress(address))
                    .unwrap();
                let (header, data) = bytes.split_first_chunk::<HEADER_SIZE>().unwrap();
                let header = Header::from_bytes(header);
                assert_eq!(header.len as usize, data.len());
                assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
                packets.push(Packet {
                    header,
                    data: data.to_vec(),
                });
            }
            self.offer_buffers(used.len() as u16);
            self.rest();
        }
    }

    /// The only packet that has come, which is for `operation`.
    #[track_caller]
    pub fn received_one(&mut self, operation: u16) -> Header {
        let packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        assert_eq!(packets[0].header.operation, operation, "{packets:?}");
        packets[0].header
    }

    pub fn operations(&mut self) -> Vec<u16> {
        let packets = self.received();
        packets
            .iter()
            .map(|packet| packet.header.operation)
            .collect()
    }

    /// Nothing has come.
    #[track_caller]
    pub fn assert_silent(&mut self) {
        let packets = self.received();
        assert!(packets.is_empty(), "{packets:?}");
    }

    pub fn path(&self) -> PathBuf {
        self.folder.as_path().join("v")
    }

    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.as_path().join(format!("v_{port}"))).unwrap()
    }

    pub fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path()).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        client
    }

    /// A connection that a program of the host has begun, to port `port` of the guest.
    pub fn connected_by_host(&mut self, port: u32) -> (UnixStream, Header) {
        let mut client = self.client();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let request = self.received_one(operation::REQUEST);
        assert_eq!(request.dst_port, port);
        let reply = answer(&request, operation::RESPONSE);
        self.transmit(reply, &[]);
        let expected = format!("OK {}\n", request.src_port);
        let mut line = vec![0; expected.len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        (client, answer(&request, operation::RW))
    }

    /// A connection that the guest has begun, from its port 1000.
    pub fn connected_by_guest(&mut self) -> (UnixStream, Header) {
        let listener = self.listen(53);
        let packet = packet(1000, 53, operation::REQUEST);
        self.transmit(packet, &[]);
        self.received_one(operation::RESPONSE);
        let (program, _) = listener.accept().unwrap();
        program
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        (
            program,
            Header {
                operation: operation::RW,
                ..packet
            },
        )
    }

    #[track_caller]
    pub fn assert_works(&mut self) {
        assert!(!self.link.needs_reset());
        let (mut client, packet) = self.connected_by_host(9999);
        self.transmit(packet, b"ping");
        let mut bytes = [0; 4];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
        drop(client);
        self.received_one(operation::SHUTDOWN);
    }
}

/// A packet of the guest's.
pub fn packet(guest: u32, host: u32, operation: u16) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        socket_type: TYPE_STREAM,
        operation,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

/// What the guest says in answer to a packet.
pub fn answer(to: &Header, operation: u16) -> Header {
    packet(to.dst_port, to.src_port, operation)
}

pub fn with(packet: Header, operation: u16, flags: u32) -> Header {
    Header {
        operation,
        flags,
        ..packet
    }
}
