//! The network device, over a tap in an otherwise empty network namespace, and with a metadata service.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bantam_devices::tap::{PACKET_HEADER_SIZE, QueueCount, Tap};
use bantam_devices::virtio::net::{Net, NetLimits};
use bantam_devices::virtio::{Activation, ConfigSpace, VirtioDevice};
use bantam_devices::worker::VirtioWorker;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use nix::unistd::read;

use crate::Target;
use crate::driver::{DATA, Driver, readable, writable};
use crate::machine::Machine;
use crate::metadata::metadata_service;
use crate::operation::Operation;

const TAP: &str = "fuzz";
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// How long a packet may take.
const LIMIT: Duration = Duration::from_secs(20);

/// One device for all inputs, as the host takes some time to remove a tap.
pub struct NetTarget {
    net: Arc<Mutex<Net>>,
    /// A socket that sends and receives packets through the tap.
    host: OwnedFd,
    interface: i32,
}

/// A front of a device that outlives it.
struct SharedNet {
    net: Arc<Mutex<Net>>,
    device_id: u32,
    features: u64,
    queue_sizes: Vec<u16>,
    config: ConfigSpace,
}

impl VirtioDevice for SharedNet {
    fn device_id(&self) -> u32 {
        self.device_id
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        self.net.lock().unwrap().activate(activation)
    }
}

impl NetTarget {
    /// Makes the target, and moves this thread to its own network namespace. `None` if this user cannot
    /// create a tap.
    pub fn new() -> Option<NetTarget> {
        unshare(CloneFlags::CLONE_NEWNET).ok()?;
        // The host then sends nothing by itself. If this cannot be set, there is no IPv6.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        let tap = Tap::open(TAP, None, QueueCount::Exactly(1)).ok()?;
        let host = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        );
        let (mac, limits) = ([2, 0, 0, 0, 0, 1], NetLimits::default());
        let net = Net::new(Arc::new(tap), mac, None, &limits, Some(metadata_service()));
        Some(NetTarget {
            net: Arc::new(Mutex::new(net.unwrap())),
            host: host.unwrap(),
            interface: if_nametoindex(TAP).unwrap() as i32,
        })
    }

    /// Sends a frame to the guest; `false` if the tap takes no more.
    fn send(&self, frame: &[u8]) -> bool {
        // SAFETY: it consists of integers, all of which may be zero.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = self.interface;
        // SAFETY: the frame and the address are readable for the lengths that are given.
        let sent = unsafe {
            libc::sendto(
                self.host.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if sent >= 0 {
            return true;
        }
        let error = io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{error}");
        false
    }

    /// Whether `frame` is among those that have passed through the tap since the last call.
    fn has_seen(&self, frame: &[u8]) -> bool {
        let mut bytes = vec![0; 0x2_0000];
        let mut found = false;
        while let Ok(len) = read(&self.host, &mut bytes) {
            found |= &bytes[..len] == frame;
        }
        found
    }
}

/// Makes a broadcast frame of a protocol for local experiments.
fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame.resize(len, fill);
    frame
}

/// Makes frames for the service's address: an ARP request, and the start of a connection.
fn metadata_frames() -> [Vec<u8>; 2] {
    const GUEST: [u8; 10] = [2, 0, 0, 0, 0, 1, 192, 168, 7, 2];
    const SERVICE: [u8; 4] = [169, 254, 169, 254];
    let mut arp = vec![0xff; 6];
    arp.extend(
        [
            &GUEST[..6],
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &GUEST,
            &[0; 6],
        ]
        .concat(),
    );
    arp.extend(SERVICE);
    let mut segment = vec![6, 1, 0x23, 0x45, 0x67, 1];
    segment.extend(
        [
            &GUEST[..6],
            &[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0],
        ]
        .concat(),
    );
    segment.extend([&GUEST[6..], &SERVICE].concat());
    segment.extend([
        0x10, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 4, 0, 0, 0, 0, 0,
    ]);
    [arp, segment]
}

impl Target for NetTarget {
    type Options = ();

    fn device(&mut self, (): &()) -> Box<dyn VirtioDevice> {
        let net = self.net.lock().unwrap();
        Box::new(SharedNet {
            device_id: net.device_id(),
            features: net.features(),
            queue_sizes: net.queue_max_sizes().to_vec(),
            config: ConfigSpace::new(net.config().array::<12>(0).to_vec()),
            net: self.net.clone(),
        })
    }

    fn requests(driver: &mut Driver) -> Vec<Operation> {
        let mut operations = Vec::new();
        for _ in 0..6 {
            operations.extend(driver.offer(RECEIVE, &[writable(DATA + 0x4000, 1530)]));
        }
        operations.extend([
            Operation::RingDoorbell { queue: RECEIVE },
            Operation::Turn,
            Operation::HostSends { len: 60 },
            Operation::HostSends { len: 1514 },
            Operation::Rest,
        ]);
        let [arp, segment] = metadata_frames();
        for (len, bytes) in [
            (42, frame(14, 0)),
            (1514, frame(14, 0)),
            (42, arp),
            (54, segment),
        ] {
            operations.push(Operation::Store {
                address: DATA,
                bytes: [0; PACKET_HEADER_SIZE].into_iter().chain(bytes).collect(),
            });
            let buffers = [readable(DATA, 12), readable(DATA + 12, len)];
            operations.extend(driver.request(TRANSMIT, &buffers));
        }
        operations
    }

    fn host_sends(&mut self, len: u16) {
        self.send(&frame(len.into(), 0x33));
    }

    fn check_service(&mut self, (): &(), machine: &mut Machine) {
        const BUFFER_SIZE: u32 = 2048;
        let mut driver = Driver::plain(2);
        machine.initialize(&mut driver);
        self.has_seen(&[]);

        let packet: Vec<u8> = [0; PACKET_HEADER_SIZE]
            .into_iter()
            .chain(frame(100, 0x5a))
            .collect();
        machine.store(DATA, &packet);
        for operation in driver.request(TRANSMIT, &[readable(DATA, packet.len() as u32)]) {
            machine.act(&operation);
        }
        machine.await_used(TRANSMIT, 1);
        assert!(self.has_seen(&frame(100, 0x5a)), "a packet of the guest");

        let address = |index: u16| DATA + u64::from(index) * u64::from(BUFFER_SIZE);
        for index in 0..64 {
            for operation in driver.offer(RECEIVE, &[writable(address(index), BUFFER_SIZE)]) {
                machine.act(&operation);
            }
        }
        machine.act(&Operation::RingDoorbell { queue: RECEIVE });
        machine.rest();
        let expected = frame(200, 0xa5);
        assert!(self.send(&expected));
        let deadline = Instant::now() + LIMIT;
        let is_there = |machine: &Machine| {
            (0..machine.used_count(RECEIVE)).any(|index| {
                let start = address(index) + PACKET_HEADER_SIZE as u64;
                machine.bytes(start, expected.len()) == expected
            })
        };
        while !is_there(machine) {
            assert!(Instant::now() < deadline, "a packet of the host");
            machine.wait();
        }
    }
}
