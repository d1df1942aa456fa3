//! A way to the other end that takes smaller packets than the host's link does, behind a router.

use std::net::{TcpListener, UdpSocket};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::wire::IpAddress;

use super::capture::{check, header};
use super::guest::{Guest, MAC, MTU, udp_socket};
use super::namespace::{enter_namespace, in_namespace, ip};
use super::pattern;
use crate::{UserNetwork, UserNetworkOptions};

const FAR_V4: IpAddress = IpAddress::v4(203, 0, 113, 2);
const FAR_V6: IpAddress = IpAddress::v6(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
const PORT: u16 = 7;

/// A host in a namespace of its own, whose thread does what it is told.
struct Host {
    tell: Sender<Box<dyn FnOnce() + Send>>,
    /// The file of its namespace.
    namespace: String,
}

impl Host {
    fn new() -> Host {
        let (tell, told) = channel::<Box<dyn FnOnce() + Send>>();
        let (send, namespace) = channel();
        thread::spawn(move || {
            assert!(enter_namespace());
            let thread = nix::unistd::gettid();
            send.send(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))
                .unwrap();
            while let Ok(work) = told.recv() {
                work();
            }
        });
        let namespace = namespace.recv().unwrap();
        Host { tell, namespace }
    }

    fn does(&self, work: impl FnOnce() + Send + 'static) {
        let (send, done) = channel();
        let work = move || {
            work();
            send.send(()).unwrap();
        };
        self.tell.send(Box::new(work)).unwrap();
        done.recv().expect("it succeeds");
    }
}

/// Carries out lines of arguments of `ip`.
fn set_up(lines: &str) {
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        ip(&line.split(' ').collect::<Vec<_>>());
    }
}

/// Puts a router, and a far host that returns what it gets, behind the namespace of this thread. Packets to the far host
/// have at most `mtu` bytes.
fn make_way(mtu: u16) -> (Host, Host) {
    let (router, far) = (Host::new(), Host::new());
    set_up(&format!(
        "link add near type veth peer name inner netns {}
         address add 198.51.100.1/24 dev near
         address add 2001:db8:1::1/64 dev near nodad
         link set near up",
        router.namespace
    ));
    let namespace = far.namespace.clone();
    router.does(move || {
        set_up(&format!(
            "link add outer mtu {mtu} type veth peer name far mtu {mtu} netns {namespace}
             address add 198.51.100.2/24 dev inner
             address add 2001:db8:1::2/64 dev inner nodad
             address add 203.0.113.1/24 dev outer
             address add 2001:db8:2::1/64 dev outer nodad
             link set inner up
             link set outer up"
        ));
        for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{name}"), "1").unwrap();
        }
    });
    far.does(|| {
        set_up(
            "address add 203.0.113.2/24 dev far
             address add 2001:db8:2::2/64 dev far nodad
             link set far up
             route add default via 203.0.113.1
             -6 route add default via 2001:db8:2::1",
        );
        let socket = UdpSocket::bind(("::", PORT)).unwrap();
        thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while let Ok((size, peer)) = socket.recv_from(&mut bytes) {
                let _ = socket.send_to(&bytes[..size], peer);
            }
        });
        let listener = TcpListener::bind(("::", PORT)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
    });
    set_up(
        "route add default via 198.51.100.2
         -6 route add default via 2001:db8:1::2",
    );
    (router, far)
}

/// Sends a datagram until it comes back, and returns how often.
fn echo(guest: &mut Guest, far: IpAddress, own_port: u16, size: usize) -> u32 {
    let handle = guest.add(udp_socket(own_port));
    let bytes = pattern(size);
    let (mut count, mut last) = (0, None::<Instant>);
    guest.wait(|guest| {
        if last.is_none_or(|last| last.elapsed() >= Duration::from_millis(300)) {
            let socket = guest.udp(handle);
            socket.send_slice(&bytes, (far, PORT)).unwrap();
            (count, last) = (count + 1, Some(Instant::now()));
        }
        let (answer, _) = guest.udp(handle).recv().ok()?;
        assert!(answer == bytes);
        Some(())
    });
    count
}

#[test]
fn the_guest_is_told_what_the_way_takes_and_its_packets_arrive() {
    for mtu in [1280, 1400] {
        for is_v4 in [true, false] {
            in_namespace(move || {
                let _hosts = make_way(mtu);
                let options = UserNetworkOptions::default();
                let network = UserNetwork::open(&options, MAC, MTU).unwrap();
                let (mut guest, far) = match is_v4 {
                    true => (Guest::bare(network), FAR_V4),
                    false => (Guest::with_v6(network), FAR_V6),
                };
                if is_v4 {
                    guest.configure();
                }
                guest.cable.capture = Some(header());
                // The first is lost, as on any network, and the guest is told.
                let size = usize::from(mtu) - 20;
                assert!(echo(&mut guest, far, 5000, size) > 1);
                // From now on the host sends fragments, of other flows too, and of bursts.
                for (port, size) in [(5003, 3000), (5001, size), (5002, 60_000)] {
                    assert_eq!(echo(&mut guest, far, port, size), 1, "{size}");
                }
                let capture = guest.cable.capture.take().unwrap();
                let report = match is_v4 {
                    true => format!("icmp.type == 3 and icmp.code == 4 and icmp.mtu == {mtu}"),
                    false => format!("icmpv6.type == 2 and icmpv6.mtu == {mtu}"),
                };
                check(&capture, &[&report]);
                let handle = guest.connect(far, PORT, 40000);
                let bytes = pattern(1 << 20);
                assert!(guest.exchange(handle, &bytes) == bytes);
            });
        }
    }
}
