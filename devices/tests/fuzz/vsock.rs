//! The socket device, with programs on the host at both kinds of its sockets.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use bantam_devices::ListeningSocket;
use bantam_devices::virtio::VirtioDevice;
use bantam_devices::virtio::vsock::Vsock;
use vmm_sys_util::tempdir::TempDir;

use crate::Target;
use crate::driver::{DATA, Driver, readable, writable};
use crate::machine::Machine;
use crate::operation::Operation;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const GUEST_CID: u64 = 3;
/// Port of the host at which a program listens.
const HOST_PORT: u32 = 1;
const GUEST_PORT: u32 = 1000;
/// Port of the guest that programs ask for.
const SERVICE: u32 = 52;
const HEADER_SIZE: u32 = 44;
const BUFFER_SIZE: u32 = 1024;
/// Address at which packets are received.
const RECEIVE_DATA: u64 = DATA + 0x4000;
/// Most clients at a time.
const MAX_CLIENTS: usize = 8;
/// How long a packet may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Operations of packets.
mod operation {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

pub struct VsockTarget {
    folder: TempDir,
    listener: UnixListener,
    clients: VecDeque<UnixStream>,
}

impl VsockTarget {
    pub fn new() -> VsockTarget {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join(format!("v_{HOST_PORT}"));
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        VsockTarget {
            folder,
            listener,
            clients: VecDeque::new(),
        }
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.folder.as_path().join("v")).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// Does what the programs on the host do meanwhile: accept connections and read a little.
    fn serve(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            stream.set_nonblocking(true).unwrap();
            self.clients.push_back(stream);
        }
        for client in &mut self.clients {
            let _ = client.read(&mut [0; 256]);
        }
        while self.clients.len() > MAX_CLIENTS {
            self.clients.pop_front();
        }
    }
}

/// Makes a header of the guest.
fn header(guest_port: u32, host_port: u32, operation: u16, len: u32, flags: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(GUEST_CID.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(guest_port.to_le_bytes());
    bytes.extend(host_port.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(operation.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend((64u32 << 10).to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes
}

/// Has the guest send a packet, whose header is put at `address`, followed by its data.
fn send(driver: &mut Driver, address: u64, header: &[u8], len: u32) -> Vec<Operation> {
    let mut operations: Vec<_> = header
        .chunks(16)
        .enumerate()
        .map(|(index, bytes)| Operation::Store {
            address: address + index as u64 * 16,
            bytes: bytes.to_vec(),
        })
        .collect();
    operations.extend(driver.request(TRANSMIT, &[readable(address, HEADER_SIZE + len)]));
    operations
}

/// Returns the port of the host of connection number `index` that its programs begin.
fn host_port(index: u32) -> u32 {
    (1 << 30) + index
}

impl Target for VsockTarget {
    type Options = ();

    fn device(&mut self, (): &()) -> Box<dyn VirtioDevice> {
        self.clients.clear();
        self.serve();
        let listener = ListeningSocket::bind(&self.folder.as_path().join("v")).unwrap();
        Box::new(Vsock::new(GUEST_CID as u32, listener))
    }

    fn requests(driver: &mut Driver) -> Vec<Operation> {
        let mut operations = Vec::new();
        for index in 0..6 {
            let address = RECEIVE_DATA + index * u64::from(BUFFER_SIZE);
            operations.extend(driver.offer(RECEIVE, &[writable(address, BUFFER_SIZE)]));
        }
        operations.push(Operation::RingDoorbell { queue: RECEIVE });
        let mut packet = |ports: (u32, u32), operation, len, flags| {
            let header = header(ports.0, ports.1, operation, len, flags);
            operations.extend(send(driver, DATA, &header, len));
            operations.push(Operation::HostSends { len: 700 });
            operations.push(Operation::Rest);
        };
        let own = (GUEST_PORT, HOST_PORT);
        packet(own, operation::REQUEST, 0, 0);
        packet(own, operation::RW, 100, 0);
        packet(own, operation::CREDIT_REQUEST, 0, 0);
        let others = (SERVICE, host_port(0));
        packet(others, operation::RESPONSE, 0, 0);
        packet(others, operation::RW, 3000, 0);
        packet(others, operation::CREDIT_UPDATE, 0, 0);
        packet(own, operation::SHUTDOWN, 0, 2);
        packet(others, operation::SHUTDOWN, 0, 3);
        packet(own, operation::RST, 0, 0);
        operations
    }

    fn host_sends(&mut self, len: u16) {
        self.serve();
        let bytes = vec![0x33; usize::from(len)];
        for client in &mut self.clients {
            let _ = client.write(&bytes);
        }
        let mut client = self.client();
        let _ = client.write(format!("CONNECT {SERVICE}\n").as_bytes());
        self.clients.push_back(client);
        if len.is_multiple_of(3) {
            self.clients.pop_front();
        }
    }

    fn check_service(&mut self, (): &(), machine: &mut Machine) {
        self.clients.clear();
        self.serve();
        let mut driver = Driver::plain(2);
        machine.initialize(&mut driver);
        for index in 0..64 {
            let address = RECEIVE_DATA + index * u64::from(BUFFER_SIZE) / 4;
            for operation in driver.offer(RECEIVE, &[writable(address, BUFFER_SIZE / 4)]) {
                machine.act(&operation);
            }
        }
        machine.act(&Operation::RingDoorbell { queue: RECEIVE });
        machine.rest();
        let request = header(GUEST_PORT + 1, HOST_PORT, operation::REQUEST, 0, 0);
        for operation in send(&mut driver, DATA, &request, 0) {
            machine.act(&operation);
        }
        machine.rest();
        let (mut program, _) = self.listener.accept().unwrap();
        let data = header(GUEST_PORT + 1, HOST_PORT, operation::RW, 4, 0);
        machine.store(DATA + u64::from(HEADER_SIZE), b"ping");
        for operation in send(&mut driver, DATA, &data, 4) {
            machine.act(&operation);
        }
        machine.rest();
        let mut bytes = [0; 4];
        program.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping", "a packet of the guest");

        program.write_all(b"pong").unwrap();
        let deadline = Instant::now() + LIMIT;
        let is_there = |machine: &Machine| {
            (0..machine.used_count(RECEIVE).into()).any(|index: u64| {
                let packet = RECEIVE_DATA + index * u64::from(BUFFER_SIZE) / 4;
                machine.bytes(packet + u64::from(HEADER_SIZE), 4) == b"pong"
            })
        };
        while !is_there(machine) {
            assert!(Instant::now() < deadline, "a packet of the host");
            machine.wait();
        }
    }
}
