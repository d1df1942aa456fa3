//! Networks of the host: `bantam network`, and machines on them.
//!
//! Each test has a network namespace that stands for the host, and another one that stands for the world, in which no
//! packet leaves them. Definitions and state are in file systems of the test's own.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_devices::tap::{PACKET_HEADER_SIZE, QueueCount, Tap};
use bantam_network::{Attachment, Mac, Networks, Place, Port};
use bantam_tests::virtual_host::{
    LEASE_SCRIPT, OUTSIDE, UPLINK, World, bantam, end, hanging, interfaces, json, kill, network,
    on_host, refused, succeed, wait_until,
};
use bantam_tests::{
    Bantam, Kernel, PacketSocket, monitor, require_kvm, require_taps, scripted_root, unprivileged,
};
use nix::unistd::gettid;
use serde_json::Value;

/// The rules of Docker 28 for forwarded packets, on a host without containers.
const DOCKER_RULES: &str = "\
*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
:DOCKER-FORWARD -
:DOCKER-USER -
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
";

#[test]
fn linux_guests_reach_the_world_and_each_other_beside_docker() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        let web = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)).unwrap();
        let _world = World::new(web);
        fs::write("/run/rules", DOCKER_RULES).unwrap();
        succeed("iptables-restore /run/rules");
        let folder = tempfile::tempdir().unwrap();
        let guest = |name: &str, work: &str| {
            let folder = folder.path().join(name);
            fs::create_dir(&folder).unwrap();
            let script = format!(
                "#!/bin/sh\n\
                 mount -t proc proc /proc\n\
                 udhcpc -i eth0 -n -q -f -s /lease.sh\n\
                 {work}\n\
                 echo DONE\n\
                 printf '\\000' | dd of=/dev/port bs=1 seek=1280\n"
            );
            let root = scripted_root(&folder, &[("test.sh", &script), ("lease.sh", LEASE_SCRIPT)]);
            Bantam::linux(Kernel::Small)
                .disk(&root, "")
                .append("quiet init=/test.sh")
                .option("--net", format!("nat,hostname={name}"))
                .limit(Duration::from_secs(300))
                .start()
        };
        let two = guest("two", "nc -l -p 7000");
        let one = guest(
            "one",
            &format!(
                "ping -c 1 -W 5 {OUTSIDE}\n\
                 wget -q -O - http://files.test/\n\
                 nslookup two.default.internal\n\
                 until ping -c 1 -W 2 two; do sleep 1; done\n\
                 until echo the guest two hears | nc -w 5 two 7000; do sleep 1; done"
            ),
        );
        let ended = two.wait();
        ended
            .succeeded()
            .printed("LEASE 192.168.130.")
            .printed("default.internal");
        ended.printed("the guest two hears").printed("DONE");
        let leases = json("leases default");
        let ended = one.wait();
        ended
            .succeeded()
            .printed("LEASE 192.168.130.")
            .printed("DONE");
        ended.printed(&format!("FETCHED by {UPLINK}"));
        let text = ended.text();
        assert_eq!(text.matches("1 packets received").count(), 2, "{text}");

        let names = leases
            .as_array()
            .unwrap()
            .iter()
            .map(|lease| lease["hostname"].as_str().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        assert_eq!(names, ["one", "two"]);
        assert!(!interfaces().contains("bnt"), "{}", interfaces());
        assert_eq!(json("info default")["ports"], Value::Array(vec![]));
        network("stop default");
        let rules = succeed("iptables -S DOCKER-USER");
        assert_eq!(rules.trim(), "-N DOCKER-USER");
    });
}

#[test]
fn a_machine_has_a_place_while_it_runs_and_leaves_nothing_when_it_is_killed() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        let machine = hanging("nat,hostname=web");
        let info = json("info default");
        assert_eq!(info["is-started"], true);
        assert_eq!(info["ports"][0]["hostname"], "web");
        assert_eq!(info["ports"][0]["interface"], "bnt0");
        let rules = succeed("nft list table bridge bantam0");
        assert!(rules.contains("elements = { \"bnt0\" }"), "{rules}");
        let subnet = info["addresses"]["subnet"].as_str().unwrap();
        assert_eq!(subnet, "192.168.130.0/24");

        // The same name, and the same MAC address.
        for (net, reason) in [
            ("nat,hostname=WEB", "is called 'WEB'"),
            (
                &format!("nat,mac={}", info["ports"][0]["mac"].as_str().unwrap()),
                "has MAC address",
            ),
        ] {
            let ended = Bantam::payload("hello").option("--net", net).finish();
            let error = ended.failed_with_one_line();
            assert!(error.contains(reason), "{error}");
        }

        // It is cut off while the network is stopped, and then on it again.
        let stopped = bantam(&["network", "stop", "default"], "");
        let said = String::from_utf8_lossy(&stopped.stderr).into_owned();
        assert!(said.contains("1 machine is cut off"), "{said}");
        assert!(!interfaces().contains("bantam0"));
        let started = bantam(&["network", "start", "default"], "");
        let said = String::from_utf8_lossy(&started.stderr).into_owned();
        assert!(said.contains("1 machine is on it again"), "{said}");
        let link = succeed("ip -oneline link show bnt0");
        assert!(link.contains("master bantam0"), "{link}");

        kill(machine);
        wait_until("the tap is gone", || !interfaces().contains("bnt0"));
        assert_eq!(json("info default")["ports"], Value::Array(vec![]));
        // The process that keeps places may be at it.
        wait_until("its rules are gone", || {
            !succeed("nft list table bridge bantam0").contains("elements")
        });
        for folder in ["ports", "started/default/hosts", "started/default/names"] {
            let path = Path::new("/run/bantam/networks").join(folder);
            assert_eq!(fs::read_dir(path).unwrap().count(), 0, "{folder}");
        }
        network("stop default");
        network("undefine default");
        assert_eq!(fs::read_dir("/var/lib/bantam/networks").unwrap().count(), 0);
    });
}

#[test]
fn what_another_program_removes_comes_back() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        network("start default");
        let server =
            || fs::read_to_string("/run/bantam/networks/started/default/dnsmasq.pid").unwrap();
        let first = server();
        succeed(&format!("nft flush ruleset; kill -9 {first}"));
        let command = format!("/proc/{}/cmdline", first.trim());
        wait_until("it has ended", || {
            fs::read(&command).map_or(true, |command| command.is_empty())
        });
        end(hanging("nat")).succeeded();
        assert_ne!(server(), first);
        let rules = succeed("nft list ruleset");
        assert!(
            rules.contains("masquerade") && rules.contains("@filtered"),
            "{rules}"
        );
        succeed("ip link delete bantam0");
        assert_eq!(json("list")[0]["is-started"], true);
        assert!(interfaces().contains("bantam0"));
        network("stop default");
        assert_eq!(succeed("nft list ruleset"), "");
    });
}

/// Programs that kill who has called them are put in the place of those that a network needs.
#[test]
fn a_start_that_is_killed_at_any_step_is_repaired() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        for (program, call, when) in [
            ("nft", 1, "before"),
            ("nft", 1, "after"),
            ("nft", 2, "before"),
            ("nft", 2, "after"),
            ("dnsmasq", 1, "before"),
            ("dnsmasq", 1, "after"),
        ] {
            let tools = Path::new("/run/tools");
            let _ = fs::remove_dir_all(tools);
            fs::create_dir(tools).unwrap();
            let real = format!("/usr/sbin/{program} \"$@\"");
            let (before, after) = match when {
                "before" => ("kill -9 $PPID", ""),
                _ => ("", "kill -9 $PPID"),
            };
            let script = format!(
                "#!/bin/sh\n\
                 echo >> /run/tools/calls\n\
                 if [ $(wc -l < /run/tools/calls) = {call} ]; then {before}\n{real}\n{after}\nelse {real}\nfi\n"
            );
            let path = tools.join(program);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            let killed = bantam(&["network", "start", "default"], "/run/tools");
            assert!(!killed.status.success(), "{program} {call} {when}");
            thread::sleep(Duration::from_millis(50));

            let list = json("list");
            assert_eq!(list[0]["is-started"], false, "{program} {call} {when}");
            assert!(!interfaces().contains("bantam"), "{program} {call} {when}");
            assert_eq!(succeed("nft list ruleset"), "", "{program} {call} {when}");
            assert_eq!(servers(), 0, "{program} {call} {when}");
            network("start default");
            assert_eq!(servers(), 1);
            network("stop default");
            assert_eq!(servers(), 0);
        }
    });
}

/// Returns how many servers of addresses there are in this namespace.
fn servers() -> usize {
    let here = fs::read_link("/proc/thread-self/ns/net").expect("it can be read");
    let processes = fs::read_dir("/proc").expect("it can be read").flatten();
    let servers = processes.filter(|process| {
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let is_here = fs::read_link(process.path().join("ns/net")).is_ok_and(|it| it == here);
        is_here && command.starts_with(b"/usr/sbin/dnsmasq")
    });
    servers.count()
}

#[test]
fn what_cannot_be_is_refused_with_a_remedy() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        succeed("ip link add d0 type bridge");
        succeed("ip addr add 192.168.130.9/24 dev d0");
        succeed("ip link set d0 up");
        for (arguments, reason) in [
            (
                "info lab",
                "there is no network 'lab'; 'bantam network define lab' defines it",
            ),
            ("start lab", "there is no network 'lab'"),
            ("define a/b", "invalid network name 'a/b'"),
            ("define lab --mode routed", "invalid value 'routed'"),
            (
                "define lab --subnet 192.168.130.128/25",
                "overlaps the route of the host to 192.168.130.0/24",
            ),
            (
                "define lab --subnet 10.0.0.0/8",
                "the prefix has 16 to 30 bits",
            ),
            ("define lab --mode bridged", "needs the name of its bridge"),
            ("define lab --domain a..b", "invalid domain 'a..b'"),
        ] {
            let words: Vec<_> = ["network"]
                .into_iter()
                .chain(arguments.split(' '))
                .collect();
            let error = refused(&words);
            assert!(error.contains(reason), "{error}");
        }
        network("define lab --subnet 10.9.0.0/16 --no-ipv6");
        let error = refused(&["network", "define", "other", "--subnet", "10.9.7.0/24"]);
        assert!(error.contains("overlaps network 'lab'"), "{error}");
        let error = refused(&["network", "define", "lab"]);
        assert!(
            error.contains("there is a network 'lab' already"),
            "{error}"
        );
        for (net, reason) in [
            ("network=lab", "'bantam network start lab' starts it"),
            ("network=none", "there is no network 'none'; there are lab"),
            (
                "bridge=none",
                "there is no bridge 'none'; as root 'ip link add none type bridge",
            ),
            ("bridge=lo", "interface 'lo' is not a bridge"),
            ("macvtap=none", "there is no interface 'none'"),
            (
                "tap=t,netns=none",
                "cannot enter network namespace '/run/netns/none': No such file",
            ),
        ] {
            let ended = Bantam::payload("hello").option("--net", net).finish();
            let error = ended.failed_with_one_line();
            assert!(error.contains(reason), "{error}");
        }
        // The free subnet is another one than that of the bridge.
        network("start default");
        assert_eq!(
            json("info default")["addresses"]["subnet"],
            "192.168.131.0/24"
        );
        network("stop default");
        // Its addresses were chosen, so others are if they are not free any more.
        succeed("ip addr add 192.168.131.9/24 dev d0");
        network("start default");
        assert_eq!(
            json("info default")["addresses"]["subnet"],
            "192.168.132.0/24"
        );
        let error = refused(&["network", "undefine", "default"]);
        assert!(
            error.contains("'bantam network stop default' stops it"),
            "{error}"
        );
        network("stop default");
        succeed("ip link add bantam0 type bridge");
        let error = refused(&["network", "start", "lab"]);
        assert!(
            error.contains("there is an interface 'bantam0' already"),
            "{error}"
        );

        let launcher = unprivileged();
        let output = Command::new(launcher[0])
            .args(&launcher[1..])
            .arg(monitor())
            .args(["network", "start", "default"])
            .output()
            .expect("there is setpriv");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            error.contains(
                "networks of the host take root (CAP_NET_ADMIN), '--net user' works without"
            ),
            "{error}"
        );

        for (program, package) in [("dnsmasq", "dnsmasq-base"), ("nft", "nftables")] {
            let file = format!("/usr/sbin/{program}");
            succeed(&format!("mount --bind /dev/null {file}"));
            let error = refused(&["network", "start", "default"]);
            assert!(
                error.contains(&format!("install the package '{package}'")),
                "{error}"
            );
            succeed(&format!("umount {file}"));
            assert!(!interfaces().contains("bantam1"), "{}", interfaces());
        }
    });
}

/// A machine on a network, without a machine: the test reads and writes its frames.
struct Guest {
    tap: Tap,
    port: Port,
    mac: [u8; 6],
}

impl Guest {
    fn on(name: &str, last: u8) -> Guest {
        let mac = [2, 0, 0, 0, 0, last];
        let port = Networks::of_host().attach(&Attachment {
            place: Place::Network(name.parse().expect("it is a name")),
            mac: Mac(mac),
            hostname: None,
            filter: None,
        });
        let port = port.expect("the network has a place");
        let tap = Tap::open(port.interface(), None, QueueCount::AtMost(1)).expect("it is free");
        port.connect().expect("there is a bridge");
        Guest { tap, port, mac }
    }

    fn address(&self) -> [u8; 4] {
        self.port.address().expect("one is reserved").octets()
    }

    fn send(&self, frame: &[u8]) {
        let packet = [&[0; PACKET_HEADER_SIZE], frame].concat();
        let queue = &self.tap.queues()[0];
        assert_eq!(
            nix::unistd::write(queue, &packet).expect("the tap is up"),
            packet.len()
        );
    }

    /// Whether a frame with this end arrives at the machine.
    fn hears(&self, end: &[u8]) -> bool {
        let deadline = Instant::now() + Duration::from_millis(200);
        let mut packet = [0; 2048];
        while Instant::now() < deadline {
            match nix::unistd::read(&self.tap.queues()[0], &mut packet) {
                Ok(size) if packet[..size].ends_with(end) => return true,
                Ok(_) => {}
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        }
        false
    }
}

const BROADCAST: [u8; 6] = [0xff; 6];

fn arp(source: [u8; 6], sender: [u8; 6], address: [u8; 4]) -> Vec<u8> {
    let mut frame = [BROADCAST, source].concat();
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(sender);
    frame.extend(address);
    frame.extend([0; 10]);
    frame.resize(60, 0);
    frame
}

/// An IPv4 datagram to all, from an address and a port to a port.
fn datagram(source: [u8; 6], address: [u8; 4], ports: [u16; 2]) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17, 0, 0];
    header.extend(address);
    header.extend([255; 4]);
    // RFC 1071; a bridge drops what is wrong if its packets go through the filters of IP too.
    let words = header
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum = words.sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let ether = [&BROADCAST[..], &source, &[8, 0]].concat();
    [ether, header, udp(ports)].concat()
}

/// The same over IPv6, to all nodes on the link.
fn datagram_v6(source: [u8; 6], ports: [u16; 2]) -> Vec<u8> {
    to_all_nodes(source, 17, &udp(ports))
}

/// Sixteen bytes over IPv6, to all nodes on the link.
fn to_all_nodes(source: [u8; 6], next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend(source);
    frame.extend([
        0x86,
        0xdd,
        0x60,
        0,
        0,
        0,
        0,
        16,
        next_header,
        255,
        0xfe,
        0x80,
    ]);
    frame.extend([0; 13]);
    frame.extend([1, 0xff, 2]);
    frame.extend([0; 13]);
    frame.push(1);
    frame.extend(payload);
    frame
}

/// Header and eight bytes.
fn udp([from, to]: [u16; 2]) -> Vec<u8> {
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
    bytes.extend([0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// A frame of a protocol that machines do not speak: LLDP.
fn of_another_protocol(source: [u8; 6]) -> Vec<u8> {
    let mut frame = [BROADCAST, source].concat();
    frame.extend([0x88, 0xcc]);
    frame.resize(60, 0);
    frame
}

fn router_advertisement(source: [u8; 6]) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8];
    message.extend([0; 8]);
    to_all_nodes(source, 58, &message)
}

#[test]
fn a_machine_sends_under_its_own_addresses_only() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        let (one, two) = (Guest::on("default", 1), Guest::on("default", 2));
        let other = [2, 0, 0, 0, 0, 9];
        let (mac, address) = (one.mac, one.address());
        assert_ne!(address, two.address());
        let cases = [
            ("its own", arp(mac, mac, address), true),
            ("whether an address is free", arp(mac, mac, [0; 4]), true),
            ("another source", arp(other, mac, address), false),
            ("another sender", arp(mac, other, address), false),
            ("another's address", arp(mac, mac, two.address()), false),
            ("a router", router_advertisement(mac), false),
            ("its own datagram", datagram(mac, address, [9, 9]), true),
            (
                "a datagram from another source",
                datagram(other, address, [9, 9]),
                false,
            ),
            (
                "a datagram from another's address",
                datagram(mac, two.address(), [9, 9]),
                false,
            ),
            (
                "a datagram without an address",
                datagram(mac, [0; 4], [9, 9]),
                false,
            ),
            ("a DHCP client", datagram(mac, [0; 4], [68, 67]), true),
            (
                "a DHCP client with its address",
                datagram(mac, address, [68, 67]),
                true,
            ),
            ("a DHCP server", datagram(mac, address, [67, 68]), false),
            ("a datagram of IPv6", datagram_v6(mac, [9, 9]), true),
            (
                "a datagram of IPv6 from another source",
                datagram_v6(other, [9, 9]),
                false,
            ),
            ("a DHCP client of IPv6", datagram_v6(mac, [546, 547]), true),
            ("a DHCP server of IPv6", datagram_v6(mac, [547, 546]), false),
            ("another protocol", of_another_protocol(mac), false),
        ];
        for (number, (what, frame, passes)) in (0..).zip(cases) {
            let mark = [0xbe, 0xef, number];
            let rest = &frame[..frame.len() - mark.len()];
            one.send(&[rest, &mark].concat());
            assert_eq!(two.hears(&mark), passes, "{what}");
        }
        drop((one, two));
        network("stop default");

        network("define open --no-filter");
        network("start open");
        let (one, two) = (Guest::on("open", 1), Guest::on("open", 2));
        let frame = [&arp(other, other, [10, 0, 0, 1])[..], &[0xbe, 0xef, 1]].concat();
        one.send(&frame);
        assert!(two.hears(&[0xbe, 0xef, 1]));
        drop((one, two));
        network("stop open");
    });
}

/// Who has the descriptor of a tap can give the host's end of it any address.
#[test]
fn a_machine_gets_no_frames_for_another_whose_address_its_tap_has() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        let (one, two) = (Guest::on("default", 1), Guest::on("default", 2));
        let address = Ipv4Addr::from(two.address());
        succeed(&format!(
            "ip neighbour add {address} lladdr 02:00:00:00:00:02 dev bantam0"
        ));
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.send_to(b"for two", (address, 9)).unwrap();
        assert!(two.hears(b"for two"));
        succeed("ip link set bnt0 address 02:00:00:00:00:02");
        socket.send_to(b"for two again", (address, 9)).unwrap();
        assert!(!one.hears(b"for two again"));
        drop((one, two));
        network("stop default");
    });
}

#[test]
fn machines_on_isolated_ports_reach_the_host_only() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        network("define apart --mode hostonly --isolate-ports");
        network("start apart");
        let (one, two) = (Guest::on("apart", 1), Guest::on("apart", 2));
        let socket = PacketSocket::open("bantam0");
        let mark = [0xbe, 0xef, 1];
        let frame = [&arp(one.mac, one.mac, one.address())[..], &mark].concat();
        one.send(&frame);
        let heard = socket.receive(Duration::from_secs(5), |frame| frame.ends_with(&mark));
        assert!(heard.is_some(), "the host hears it");
        assert!(!two.hears(&mark), "the other machine hears it");
        drop((one, two));
        network("stop apart");
    });
}

#[test]
fn a_tap_is_made_in_the_namespace_that_is_named() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        let mut keeper = Command::new("unshare");
        let keeper = keeper
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let mut keeper = keeper.unwrap();
        let namespace = format!("/proc/{}/ns/net", keeper.id());
        let own = fs::read_link(format!(
            "/proc/{}/task/{}/ns/net",
            std::process::id(),
            gettid()
        ))
        .unwrap();
        wait_until("there is a namespace", || {
            fs::read_link(&namespace).unwrap() != own
        });
        let there = || succeed(&format!("nsenter --net={namespace} ip -brief link"));
        let net = format!("tap=t0,netns={namespace}");
        let machine = hanging(&net);
        assert!(there().contains("t0"));
        assert!(!interfaces().contains("t0"));
        let ended = Bantam::payload("hello").option("--net", &net).finish();
        let error = ended.failed_with_one_line();
        assert!(error.contains("in use by another machine"), "{error}");
        // A tap of the same name elsewhere is another one.
        end(hanging("tap=t0")).succeeded();
        kill(machine);
        // It is waited for.
        end(hanging(&net)).succeeded();
        assert!(!there().contains("t0"));
        drop(keeper.stdin.take());
        keeper.wait().unwrap();
    });
}

#[test]
fn a_machine_is_a_station_beside_an_interface() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        succeed("ip link add p0 type veth peer name p1 && ip link set p0 up && ip link set p1 up");
        let machine = hanging("macvtap=p0,mac=02:00:00:00:00:07");
        assert!(interfaces().contains("bnt0@p0"), "{}", interfaces());
        end(machine).succeeded();
        assert!(!interfaces().contains("bnt0"), "{}", interfaces());
        // Each of its queues is an open file of its own.
        let machine = hanging("macvtap=p0,queues=4");
        let files = fs::read_dir(format!("/proc/{}/fd", machine.pid())).unwrap();
        let is_queue = |file: &std::io::Result<fs::DirEntry>| {
            let target = fs::read_link(file.as_ref().unwrap().path()).unwrap_or_default();
            target.to_string_lossy().starts_with("/dev/tap")
        };
        assert_eq!(files.filter(is_queue).count(), 4);
        end(machine).succeeded();
        kill(hanging("macvtap=p0"));
        wait_until("it is removed", || !interfaces().contains("bnt0"));
        // A machine that is not confined has no process beside it that removes what it leaves.
        let machine = Bantam::payload("devices")
            .option("--net", "macvtap=p0")
            .option("--seccomp", "off")
            .option("--landlock", "off")
            .append("finish=hang")
            .start();
        machine.wait_for_output("PASS\n");
        kill(machine);
        assert!(interfaces().contains("bnt0@p0"), "{}", interfaces());
        network("list");
        assert!(!interfaces().contains("bnt0"), "{}", interfaces());
    });
}

#[test]
fn a_machine_is_on_a_bridge_of_the_host() {
    require_kvm!();
    require_taps!();
    on_host(|| {
        succeed("ip link add br7 type bridge && ip link set br7 up");
        let machine = hanging("bridge=br7");
        let link = succeed("ip -oneline link show bnt0");
        assert!(link.contains("master br7"), "{link}");
        end(machine).succeeded();
        network("define lan --mode bridged --bridge br7");
        network("start lan");
        let machine = hanging("network=lan");
        assert_eq!(json("info lan")["ports"][0]["interface"], "bnt0");
        end(machine).succeeded();
        network("stop lan");
        assert!(interfaces().contains("br7"));
    });
}
