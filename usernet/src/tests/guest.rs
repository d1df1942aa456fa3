//! A guest with a TCP of its own, smoltcp, which checks every checksum.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{AnySocket, tcp, udp};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};
use socket2::SockRef;

use crate::sys;
use crate::wire::{fold, number16, put16, sum};
use crate::{FrameBuffer, GuestFrame, UserNetwork, UserNetworkOptions};

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const ADDRESS: IpAddress = IpAddress::v4(10, 0, 2, 15);
pub(super) const GATEWAY: IpAddress = IpAddress::v4(10, 0, 2, 2);
pub(super) const MTU: u16 = 65520;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) struct Bytes(pub(super) Vec<u8>);

impl GuestFrame for Bytes {
    fn size(&self) -> usize {
        self.0.len()
    }

    fn read_at(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let rest = self.0.get(offset..).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        count
    }

    fn send_at(&mut self, offset: usize, size: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        SockRef::from(&socket).send_with_flags(&self.0[offset..offset + size], libc::MSG_NOSIGNAL)
    }
}

impl FrameBuffer for Bytes {
    fn size(&self) -> usize {
        self.0.len()
    }

    fn write_at(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn read_back(&self, offset: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0[offset..offset + bytes.len()]);
    }

    fn receive_at(
        &mut self,
        offset: usize,
        size: usize,
        rest: &mut [u8],
        socket: BorrowedFd<'_>,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let mut bytes = vec![0; size + rest.len()];
        let received = sys::receive(&socket.as_fd(), &mut bytes, flags)?;
        let (first, second) = bytes.split_at(size);
        self.0[offset..offset + size].copy_from_slice(first);
        rest.copy_from_slice(second);
        Ok(received)
    }
}

/// Takes the next frame from `network`, with its checksum completed as a driver would.
pub(super) fn next_frame(network: &mut UserNetwork) -> Option<Vec<u8>> {
    let mut buffer = Bytes(vec![0; 1 << 17]);
    let written = network.receive(&mut buffer)?;
    let mut frame = buffer.0;
    frame.truncate(written.size);
    if let Some(checksum) = written.checksum {
        let start = usize::from(checksum.start);
        let total = fold(sum(&frame[start..]));
        put16(&mut frame, start + usize::from(checksum.offset), !total);
    }
    Some(frame)
}

/// The link between guest and network.
pub(super) struct Cable {
    pub(super) network: UserNetwork,
    /// Of so many frames to the guest one is lost.
    pub(super) loss: Option<u32>,
    /// Of so many frames of the guest one is lost.
    pub(super) guest_loss: Option<u32>,
    /// Pseudo-random, so that losses do not keep step with attempts to send again.
    chance: u32,
    /// What has passed, in the format of pcap, if it is wanted.
    pub(super) capture: Option<Vec<u8>>,
    /// Size of the largest frame to the guest, in bytes.
    pub(super) largest: usize,
}

impl Cable {
    fn is_lost(&mut self, one_of: Option<u32>) -> bool {
        self.chance = self
            .chance
            .wrapping_mul(1_664_525)
            .wrapping_add(1_013_904_223);
        one_of.is_some_and(|number| (self.chance >> 16).is_multiple_of(number))
    }

    fn record(&mut self, frame: &[u8]) {
        if let Some(capture) = &mut self.capture {
            let size = (frame.len() as u32).to_le_bytes();
            // The time, and the size twice: that of the record, and that of the frame.
            capture.extend([0; 8]);
            capture.extend([size, size].as_flattened());
            capture.extend(frame);
        }
    }
}

pub(super) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, process: F) -> R {
        process(&self.0)
    }
}

pub(super) struct Sending<'a>(&'a mut Cable);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, size: usize, fill: F) -> R {
        let mut frame = vec![0; size];
        let result = fill(&mut frame);
        self.0.record(&frame);
        let lost = self.0.is_lost(self.0.guest_loss);
        if !lost {
            self.0.network.send(&mut Bytes(frame));
        }
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Received, Sending<'_>)> {
        loop {
            let frame = next_frame(&mut self.network)?;
            self.largest = self.largest.max(frame.len());
            self.record(&frame);
            if !self.is_lost(self.loss) {
                return Some((Received(frame), Sending(self)));
            }
        }
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Sending<'_>> {
        Some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 14 + usize::from(MTU);
        capabilities
    }
}

pub(super) struct Guest {
    pub(super) cable: Cable,
    pub(super) interface: Interface,
    pub(super) sockets: SocketSet<'static>,
    start: Instant,
}

impl Guest {
    /// A guest with the usual address.
    pub(super) fn new(options: &UserNetworkOptions) -> Guest {
        let network = UserNetwork::open(options, MAC, MTU).unwrap();
        let mut guest = Guest::bare(network);
        guest.configure();
        guest
    }

    /// A guest that has no address yet.
    pub(super) fn bare(network: UserNetwork) -> Guest {
        Guest::without_addresses(network, false)
    }

    fn without_addresses(network: UserNetwork, has_v6: bool) -> Guest {
        let mut cable = Cable {
            network,
            loss: None,
            guest_loss: None,
            chance: 1,
            capture: None,
            largest: 0,
        };
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        config.random_seed = 7;
        config.slaac = has_v6;
        let interface = Interface::new(config, &mut cable, StackInstant::ZERO);
        Guest {
            cable,
            interface,
            sockets: SocketSet::new(Vec::new()),
            start: Instant::now(),
        }
    }

    pub(super) fn configure(&mut self) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(ADDRESS, 24)).unwrap();
        });
        self.interface
            .routes_mut()
            .add_default_ipv4_route(std::net::Ipv4Addr::new(10, 0, 2, 2))
            .unwrap();
    }

    /// A guest that has made itself an address of IPv6, and has no other.
    pub(super) fn with_v6(network: UserNetwork) -> Guest {
        let mut guest = Guest::without_addresses(network, true);
        guest.interface.update_ip_addrs(|addresses| {
            let address = IpAddress::v6(0xfe80, 0, 0, 0, 0, 0, 0, 1);
            addresses.push(IpCidr::new(address, 64)).unwrap();
        });
        guest.wait(|guest| (guest.interface.ip_addrs().len() > 1).then_some(()));
        guest
    }

    /// Lets everything happen that can at once.
    pub(super) fn poll(&mut self) {
        let elapsed = self.start.elapsed().as_micros() as i64;
        let now = StackInstant::from_micros(elapsed);
        self.interface.poll(now, &mut self.cable, &mut self.sockets);
    }

    /// Waits until `done` returns something.
    #[track_caller]
    pub(super) fn wait<T>(&mut self, mut done: impl FnMut(&mut Guest) -> Option<T>) -> T {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(Instant::now() < deadline, "it takes too long");
            thread::sleep(Duration::from_micros(50));
        }
    }

    pub(super) fn add<T: AnySocket<'static>>(&mut self, socket: T) -> SocketHandle {
        self.sockets.add(socket)
    }

    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Begins a connection.
    pub(super) fn connect(&mut self, address: IpAddress, port: u16, own_port: u16) -> SocketHandle {
        let handle = self.add(tcp_socket(1 << 18));
        let context = self.interface.context();
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(context, (address, port), own_port).unwrap();
        handle
    }

    /// Waits for the end of an attempt to connect. Returns whether it has succeeded.
    #[track_caller]
    pub(super) fn is_connected(&mut self, handle: SocketHandle) -> bool {
        self.wait(|guest| {
            let socket = guest.tcp(handle);
            match socket.state() {
                tcp::State::SynSent | tcp::State::SynReceived => None,
                state => Some(state == tcp::State::Established),
            }
        })
    }

    /// Sends `bytes` and receives as many at the same time.
    #[track_caller]
    pub(super) fn exchange(&mut self, handle: SocketHandle, bytes: &[u8]) -> Vec<u8> {
        let (mut sent, mut received) = (0, Vec::new());
        self.wait(|guest| {
            let socket = guest.tcp(handle);
            if sent < bytes.len() && socket.can_send() {
                sent += socket.send_slice(&bytes[sent..]).unwrap();
            }
            while socket.can_recv() {
                socket
                    .recv(|part| {
                        received.extend_from_slice(part);
                        (part.len(), ())
                    })
                    .unwrap();
            }
            (received.len() >= bytes.len()).then_some(())
        });
        received
    }
}

pub(super) fn tcp_socket(size: usize) -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; size]);
    tcp::Socket::new(buffer(), buffer())
}

pub(super) fn udp_socket(port: u16) -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 32], vec![0; 1 << 17]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    socket
}

/// Returns the number of 16 bits at `offset`.
pub(super) fn at(frame: &[u8], offset: usize) -> u16 {
    number16(frame, offset).unwrap()
}
