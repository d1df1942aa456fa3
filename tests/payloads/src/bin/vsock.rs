//! Serves connections of the socket device, and makes some itself, all at the same time.
//!
//! On every connection that exchanges data, each side sends a number of bytes of a pattern and then
//! ends its direction; the guest then sends how many of the received bytes were correct, as 8
//! bytes.
//!
//! | port of the guest | what it does |
//! | --- | --- |
//! | 1 | exchanges `length=N` bytes |
//! | 2 | takes a connection and never reads from it |
//! | 3 | takes a connection, and resets it when data comes |
//! | 4 | resets the device when it is asked for, and initialises it again |
//! | 5 | ends the payload when it is asked for |
//!
//! It refuses all others. `connect=N` makes it open N connections to port 7000 of the host, which
//! exchange data as well.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use runtime::time::ticks;
use runtime::virtio::vsock::{
    HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, Vsock, operation,
};
use runtime::virtio::{Error, MmioDevice, device_id};
use runtime::{arguments, payload, println, report};

const QUEUE_SIZE: u16 = 128;
/// Size of the buffer that is advertised to the host, in bytes.
const BUFFER_SIZE: u32 = 256 << 10;
/// Most data of a packet.
const PACKET_SIZE: usize = 32 << 10;
/// Bytes after which the pattern repeats itself.
const PATTERN_SIZE: usize = 65_521;
const HOST_PORT: u32 = 7000;
const FIRST_GUEST_PORT: u32 = 10_000;

mod port {
    pub const EXCHANGE: u32 = 1;
    pub const STALL: u32 = 2;
    pub const RESET: u32 = 3;
    pub const RESET_DEVICE: u32 = 4;
    pub const FINISH: u32 = 5;
}

payload!(serve);

fn serve() {
    let device = arguments::virtio_mmio_windows()
        .filter_map(|window| MmioDevice::probe(window).ok())
        .find(|device| device.device_id() == device_id::VSOCK);
    let Some(device) = device else {
        report::fail("vsock", "there is no socket device");
        return;
    };
    let result = Vsock::open(device, QUEUE_SIZE)
        .map_err(|error| format!("{error}"))
        .and_then(|vsock| Guest::new(vsock).serve());
    report::check("vsock serves its connections", result);
}

/// The ports of the host and of the guest.
type Ports = (u32, u32);

#[derive(Default)]
struct Connection {
    /// Bytes to send: this many of the pattern, and then the verdict.
    length: u64,
    sent: u64,
    verdict: Option<&'static [u8]>,
    received: u64,
    /// How many of them, from the first on, match the pattern.
    right: u64,
    is_reading: bool,
    /// The host's credit.
    host_buffer: u32,
    host_forwarded: u32,
    /// The guest's credit as last sent to the host.
    announced: u32,
    /// Whether both sides have agreed to it.
    is_open: bool,
    /// Whether the guest has ended it.
    is_shut_down: bool,
    /// Operations and flags of packets without data that wait to be sent.
    due: Vec<(u16, u32)>,
}

impl Connection {
    fn room(&self) -> u32 {
        let under_way = (self.sent as u32).wrapping_sub(self.host_forwarded);
        self.host_buffer.saturating_sub(under_way)
    }
}

enum Step {
    Goes,
    ResetDevice,
    Finish,
}

struct Guest {
    vsock: Vsock,
    pattern: &'static [u8],
    length: u64,
    to_connect: u32,
    connections: BTreeMap<Ports, Connection>,
    refusals: Vec<Header>,
    exchanged: u64,
    mistakes: u64,
}

impl Guest {
    fn new(vsock: Vsock) -> Guest {
        let byte = |index: usize| {
            let index = index % PATTERN_SIZE;
            (index * 7 + index / 251) as u8
        };
        let pattern: Vec<u8> = (0..PATTERN_SIZE + PACKET_SIZE).map(byte).collect();
        Guest {
            vsock,
            pattern: Box::leak(pattern.into_boxed_slice()),
            length: arguments::value("length")
                .and_then(arguments::parse_number)
                .unwrap_or(1 << 20),
            to_connect: arguments::parsed("connect").unwrap_or(0),
            connections: BTreeMap::new(),
            refusals: Vec::new(),
            exchanged: 0,
            mistakes: 0,
        }
    }

    fn serve(mut self) -> Result<(), String> {
        println!("cid {}", self.vsock.cid);
        for index in 0..self.to_connect {
            let connection = Connection {
                length: self.length,
                is_reading: true,
                due: [(operation::REQUEST, 0)].into(),
                ..Connection::default()
            };
            let ports = (HOST_PORT, FIRST_GUEST_PORT + index);
            self.connections.insert(ports, connection);
        }
        println!("ready");
        let start = ticks();
        loop {
            match self.turn().map_err(|error| format!("{error}"))? {
                Step::Goes => {}
                Step::ResetDevice => {
                    self.connections.clear();
                    self.refusals.clear();
                    self.vsock.restart().map_err(|error| format!("{error}"))?;
                    println!("reset");
                }
                Step::Finish => break,
            }
        }
        let time = runtime::time::duration(start, ticks());
        println!("{} exchanges in {} ms", self.exchanged, time.as_millis());
        if self.vsock.device.needs_reset() {
            return Err("the device needs a reset".into());
        }
        if self.mistakes > 0 {
            return Err(format!("{} exchanges went wrong", self.mistakes));
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<Step, Error> {
        let mut step = Step::Goes;
        for _ in 0..QUEUE_SIZE {
            let (connections, refusals) = (&mut self.connections, &mut self.refusals);
            let (pattern, length) = (self.pattern, self.length);
            let taken = self.vsock.receive(|header, data| {
                take_packet(connections, refusals, pattern, length, header, data)
            })?;
            match taken {
                None => break,
                Some(Step::Goes) => {}
                Some(other) => step = other,
            }
        }
        self.vsock.publish_buffers();
        self.send_all()?;
        self.vsock.publish_packets();
        Ok(step)
    }

    /// Lets every connection send a packet, as far as there is room.
    fn send_all(&mut self) -> Result<(), Error> {
        while !self.refusals.is_empty() && self.vsock.can_send()? {
            if let Some(header) = self.refusals.pop() {
                self.vsock.send(header, &[])?;
            }
        }
        let mut ended = Vec::new();
        for (&ports, connection) in &mut self.connections {
            if !self.vsock.can_send()? {
                break;
            }
            let mut header = Header {
                src_cid: self.vsock.cid,
                dst_cid: HOST_CID,
                src_port: ports.1,
                dst_port: ports.0,
                socket_type: TYPE_STREAM,
                buffer_size: BUFFER_SIZE,
                forwarded: if connection.is_reading {
                    connection.received as u32
                } else {
                    0
                },
                ..Header::default()
            };
            let mut data: &'static [u8] = &[];
            let unannounced = header.forwarded.wrapping_sub(connection.announced);
            if !connection.due.is_empty() {
                let (operation, flags) = connection.due.remove(0);
                (header.operation, header.flags) = (operation, flags);
                if operation == operation::RST {
                    ended.push(ports);
                }
            } else if connection.is_open && connection.sent < connection.length {
                let left = connection.length - connection.sent;
                let size = left.min(PACKET_SIZE as u64).min(connection.room().into());
                if size > 0 {
                    let start = (connection.sent % PATTERN_SIZE as u64) as usize;
                    data = &self.pattern[start..start + size as usize];
                    header.operation = operation::RW;
                    connection.sent += size;
                }
            } else if let Some(verdict) = connection.verdict.filter(|_| connection.room() >= 8) {
                connection.verdict = None;
                data = verdict;
                header.operation = operation::RW;
                connection.sent += 8;
                connection.is_shut_down = true;
                let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
                connection.due.push((operation::SHUTDOWN, both));
                self.exchanged += 1;
                self.mistakes += u64::from(connection.right != connection.length);
            }
            if header.operation == 0 && unannounced >= BUFFER_SIZE / 4 {
                header.operation = operation::CREDIT_UPDATE;
            }
            if header.operation != 0 {
                connection.announced = header.forwarded;
                self.vsock.send(header, data)?;
            }
        }
        for ports in ended {
            self.connections.remove(&ports);
        }
        Ok(())
    }
}

fn take_packet(
    connections: &mut BTreeMap<Ports, Connection>,
    refusals: &mut Vec<Header>,
    pattern: &[u8],
    length: u64,
    header: Header,
    data: &[u8],
) -> Step {
    let ports = (header.src_port, header.dst_port);
    if header.operation == operation::REQUEST {
        let is_exchange = ports.1 == port::EXCHANGE;
        match ports.1 {
            port::EXCHANGE | port::STALL | port::RESET => {
                let connection = Connection {
                    length: if is_exchange { length } else { 0 },
                    is_reading: is_exchange,
                    host_buffer: header.buffer_size,
                    is_open: true,
                    due: [(operation::RESPONSE, 0)].into(),
                    ..Connection::default()
                };
                connections.insert(ports, connection);
                return Step::Goes;
            }
            port::RESET_DEVICE => return Step::ResetDevice,
            port::FINISH => return Step::Finish,
            _ => {}
        }
    }
    let Some(connection) = connections.get_mut(&ports) else {
        if header.operation != operation::RST {
            refusals.push(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                socket_type: header.socket_type,
                operation: operation::RST,
                ..Header::default()
            });
        }
        return Step::Goes;
    };
    connection.host_buffer = header.buffer_size;
    connection.host_forwarded = header.forwarded;
    match header.operation {
        operation::RESPONSE => connection.is_open = true,
        operation::RST => {
            if !connection.is_shut_down {
                println!("a connection to port {} was reset", header.dst_port);
            }
            connections.remove(&ports);
        }
        operation::RW if ports.1 == port::RESET => {
            connection.due.push((operation::RST, 0));
        }
        operation::RW if connection.is_reading => {
            let start = (connection.received % PATTERN_SIZE as u64) as usize;
            let expected = &pattern[start..start + data.len()];
            if connection.right == connection.received && is_same(data, expected) {
                connection.right += data.len() as u64;
            }
            connection.received += data.len() as u64;
        }
        operation::SHUTDOWN if header.flags & SHUTDOWN_SEND != 0 && !connection.is_shut_down => {
            if connection.length == 0 {
                connection.is_shut_down = true;
                let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
                connection.due.push((operation::SHUTDOWN, both));
            } else if connection.verdict.is_none() {
                connection.verdict = Some(Box::leak(Box::new(connection.right.to_le_bytes())));
            }
        }
        operation::CREDIT_REQUEST => connection.due.push((operation::CREDIT_UPDATE, 0)),
        _ => {}
    }
    Step::Goes
}

/// Whether two slices of the same size are equal, word by word, which is fast.
fn is_same(left: &[u8], right: &[u8]) -> bool {
    let (left, left_rest) = left.as_chunks::<8>();
    let (right, right_rest) = right.as_chunks::<8>();
    let differs = left.iter().zip(right).fold(0, |differs, (left, right)| {
        differs | (u64::from_ne_bytes(*left) ^ u64::from_ne_bytes(*right))
    });
    differs == 0 && left_rest == right_rest
}
