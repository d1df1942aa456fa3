//! Networks of the host that members of a group use without root.
//!
//! Machines of users are processes that have given up all rights of root, with the supplementary groups of a member or of
//! somebody else.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_devices::tap::{PACKET_HEADER_SIZE, Tap};
use bantam_network::{Attachment, Mac, NetworkName, Networks, Place, UserPlace};
use bantam_tests::virtual_host::{
    LEASE_SCRIPT, OUTSIDE, UPLINK, World, bantam, end, interfaces, json, kill, network, on_host,
    refused, succeed, wait_until,
};
use bantam_tests::{
    Bantam, Kernel, Running, monitor, payload, require_kvm, require_taps, scripted_root,
};
use nix::sys::signal::{Signal, kill as send_signal};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send,
    sendmsg, socket,
};
use nix::unistd::Pid;
use serde_json::Value;

/// The user of machines, and the group whose members may use networks.
const USER: u32 = 65_533;
const GROUP: &str = "users";
const SOCKET: &str = "/run/bantam/networks/started/lab/broker.socket";

/// What runs a program as the ordinary user, with these options of `setpriv` for its supplementary groups.
fn as_user(groups: &str) -> Vec<String> {
    let words = format!(
        "setpriv --reuid {USER} --regid {USER} {groups} --bounding-set=-all --inh-caps=-all --no-new-privs --"
    );
    words.split(' ').map(str::to_owned).collect()
}

fn member() -> Vec<String> {
    as_user(&format!("--groups {GROUP}"))
}

/// Runs `test` on a host whose users may run machines, but may not open taps.
fn with_users(test: impl FnOnce() + Send + 'static) {
    on_host(|| {
        succeed("mknod /run/kvm c 10 232 && chmod 666 /run/kvm && mount --bind /run/kvm /dev/kvm");
        fs::create_dir("/run/home").unwrap();
        chown("/run/home", Some(USER), Some(USER)).unwrap();
        test();
    });
}

/// Runs the program as a user, who finds its machines in a folder of its own.
fn by(launcher: &[String], arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(&launcher[0]);
    command.args(&launcher[1..]).arg(monitor()).args(arguments);
    let command = command.env("BANTAM_STATE_DIR", "/run/home");
    command.output().expect("there is setpriv")
}

#[track_caller]
fn done_by(launcher: &[String], arguments: &[&str]) -> String {
    let output = by(launcher, arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Starts a machine of a user, whose payload has used its devices and stays.
fn machine(launcher: Vec<String>, net: &str) -> Running {
    let machine = Bantam::payload("devices")
        .launcher(launcher)
        .option("--net", net)
        .append("finish=hang")
        .start();
    machine.wait_for_output("PASS\n");
    machine
}

/// Has a machine of a user refused, and returns the line that it says.
#[track_caller]
fn machine_refused(launcher: Vec<String>, net: &str) -> String {
    let ended = Bantam::payload("hello")
        .launcher(launcher)
        .option("--net", net)
        .finish();
    ended.failed_with_one_line().to_owned()
}

/// Returns how many places are known on the host, without a command that would look after them.
fn records() -> usize {
    fs::read_dir("/run/bantam/networks/ports").map_or(0, Iterator::count)
}

fn broker() -> Pid {
    let text = fs::read_to_string("/run/bantam/networks/started/lab/broker.pid").unwrap();
    Pid::from_raw(text.trim().parse().unwrap())
}

fn is_running(pid: Pid) -> bool {
    // A process that has ended has none, even if nobody has waited for it.
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|command| !command.is_empty())
}

/// A place that the broker gives to this process, and its tap.
fn place(last: u8) -> Result<(UserPlace, Tap), String> {
    let attachment = Attachment {
        place: Place::Network("lab".parse().unwrap()),
        mac: Mac([2, 0, 0, 0, 1, last]),
        hostname: None,
        filter: None,
    };
    let name: NetworkName = "lab".parse().unwrap();
    let asked = Networks::of_host().ask_for_place(&name, &attachment, 1);
    let (place, queues) = asked.map_err(|error| error.to_string())?;
    Ok((place, Tap::of_queues(queues).unwrap()))
}

/// A connection to the broker that says nothing by itself.
fn connection() -> nix::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    connect(socket.as_raw_fd(), &UnixAddr::new(SOCKET)?)?;
    Ok(socket)
}

#[test]
fn members_of_the_group_use_a_network_and_others_do_not() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        let error = machine_refused(member(), "network=lab");
        assert!(
            error.contains("'bantam network start lab' starts it"),
            "{error}"
        );
        network("start lab");
        network("start default");
        assert_eq!(json("info lab")["group"], GROUP);
        assert!(network("info lab").contains("group: users\n"));
        let found = fs::metadata(SOCKET).unwrap();
        assert_eq!((found.uid(), found.gid()), (0, 100));
        assert_eq!(found.mode() & 0o777, 0o660);

        let one = machine(member(), "network=lab,hostname=one");
        let info = json("info lab");
        let port = &info["ports"][0];
        assert_eq!(port["hostname"], "one");
        assert_eq!(port["uid"], USER);
        assert_eq!(port["pid"], one.pid().as_raw());
        assert_eq!(port["filter"], true);
        let text = network("info lab");
        assert!(text.contains(&format!("of user {USER} on bnt0")), "{text}");
        let link = succeed("ip -oneline link show bnt0");
        assert!(
            link.contains("master bantam0") && link.contains(",UP"),
            "{link}"
        );
        let rules = succeed("nft list table bridge bantam0");
        assert!(rules.contains("elements = { \"bnt0\" }"), "{rules}");

        let outsider = || as_user("--clear-groups");
        let error = machine_refused(outsider(), "network=lab");
        assert!(
            error.contains("is for members of the group 'users'"),
            "{error}"
        );
        assert!(error.contains("usermod -aG users 65533"), "{error}");
        assert!(error.contains("'--net user' works without"), "{error}");
        for (net, reason) in [
            ("nat", "as root 'bantam network group default GROUP'"),
            ("network=none", "there is no network 'none'"),
            ("bridge=bantam0", "networks of the host take root"),
            ("network=lab,filter=off", "only root may lift the filter"),
            (
                "network=lab,hostname=wpad",
                "only root may call a machine 'wpad'",
            ),
            ("network=lab,hostname=ONE", "is called 'ONE'"),
            (
                &format!("network=lab,mac={}", port["mac"].as_str().unwrap()),
                "has MAC address",
            ),
            (
                &format!(
                    "network=lab,mac={}",
                    info["addresses"]["mac"].as_str().unwrap()
                ),
                "has MAC address",
            ),
        ] {
            let error = machine_refused(member(), net);
            assert!(error.contains(reason), "{net}: {error}");
        }
        assert_eq!(records(), 1);

        // Nobody runs a command that would look after it.
        kill(one);
        wait_until("the place is given up", || records() == 0);
        assert!(!interfaces().contains("bnt0"));
        let rules = succeed("nft list table bridge bantam0");
        assert!(!rules.contains("elements"), "{rules}");
        for folder in ["hosts", "names"] {
            let path = Path::new("/run/bantam/networks/started/lab").join(folder);
            assert_eq!(fs::read_dir(path).unwrap().count(), 0, "{folder}");
        }
        end(machine(member(), "network=lab,hostname=one,queues=4")).succeeded();
        network("stop lab");
        network("stop default");
    });
}

#[test]
fn a_linux_guest_of_a_user_has_addresses_names_and_a_way_out() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        let web = std::net::TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, 80)).unwrap();
        let _world = World::new(web);
        network(&format!("group default {GROUP}"));
        network("start default");
        let folder = Path::new("/run/guest");
        fs::create_dir(folder).unwrap();
        let script = format!(
            "#!/bin/sh\n\
             mount -t proc proc /proc\n\
             udhcpc -i eth0 -n -q -f -s /lease.sh\n\
             ping -c 1 -W 5 {OUTSIDE}\n\
             wget -q -O - http://files.test/\n\
             nslookup web.default.internal\n\
             echo DONE\n\
             printf '\\000' | dd of=/dev/port bs=1 seek=1280\n"
        );
        let root = scripted_root(folder, &[("test.sh", &script), ("lease.sh", LEASE_SCRIPT)]);
        // The user cannot read the cache of root.
        let kernel = folder.join("vmlinux");
        fs::copy(Kernel::Small.vmlinux(), &kernel).unwrap();
        succeed(&format!("chown -R {USER} /run/guest"));
        let _slot = bantam_tests::linux_slot();
        let ended = Bantam::run(&kernel)
            .launcher(member())
            .disk(&root, "")
            .append("quiet init=/test.sh")
            .option("--net", "nat,hostname=web")
            .limit(Duration::from_secs(300))
            .finish();
        ended
            .succeeded()
            .printed("LEASE 192.168.130.")
            .printed("DONE");
        ended.printed("1 packets received");
        ended.printed(&format!("FETCHED by {UPLINK}"));
        let leases = done_by(
            &as_user("--clear-groups"),
            &["network", "leases", "default"],
        );
        assert!(leases.contains("web"), "{leases}");
        network("stop default");
    });
}

#[test]
fn named_machines_of_users_are_on_networks() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let kernel = payload("hello");
        let kernel = kernel.to_str().unwrap();
        let create = [
            "create",
            "web",
            "--kernel",
            kernel,
            "--append",
            "finish=hang",
            "--memory",
            "32M",
            "--net",
            "network=lab",
        ];
        done_by(&member(), &create);
        done_by(&member(), &["start", "web"]);
        let info = json("info lab");
        let port = &info["ports"][0];
        assert_eq!(port["hostname"], "web");
        assert_eq!(port["uid"], USER);
        // The payload does not ask for an address.
        let lease = format!(
            "2000000000 {} {} web *\n",
            port["mac"].as_str().unwrap(),
            port["address"].as_str().unwrap()
        );
        fs::write("/var/lib/bantam/networks/lab.leases", lease).unwrap();
        let addresses = done_by(&member(), &["domifaddr", "web"]);
        assert!(
            addresses.contains(port["address"].as_str().unwrap()),
            "{addresses}"
        );
        let interfaces = done_by(&member(), &["domiflist", "web"]);
        assert!(interfaces.contains("network"), "{interfaces}");

        let process: Value =
            serde_json::from_str(&done_by(&member(), &["dominfo", "web", "--output", "json"]))
                .unwrap();
        let process = Pid::from_raw(i32::try_from(process["process"].as_i64().unwrap()).unwrap());
        send_signal(process, Signal::SIGKILL).unwrap();
        wait_until("the place is given up", || records() == 0);
        done_by(&member(), &["start", "web"]);
        assert_eq!(json("info lab")["ports"][0]["mac"], port["mac"]);
        done_by(&member(), &["destroy", "web"]);
        wait_until("the place is given up", || records() == 0);
        network("stop lab");
    });
}

#[test]
fn a_broker_that_is_killed_is_started_again_and_machines_go_on() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let one = machine(member(), "network=lab,hostname=one");
        let first = broker();
        send_signal(first, Signal::SIGKILL).unwrap();
        wait_until("it has ended", || !is_running(first));
        let error = machine_refused(member(), "network=lab");
        assert!(
            error.contains("as root 'bantam network start lab' repairs it"),
            "{error}"
        );
        // This command repairs it too, and the machine is still known.
        assert_eq!(json("list")[0]["ports"][0]["hostname"], "one");
        assert_ne!(broker(), first);
        assert!(interfaces().contains("bnt0"));
        let error = machine_refused(member(), "network=lab,hostname=one");
        // By the MAC address that it has of its name.
        assert!(
            error.contains("another machine on network 'lab'"),
            "{error}"
        );
        let two = machine(member(), "network=lab,hostname=two");
        kill(one);
        wait_until("its tap is gone", || !interfaces().contains("bnt0"));
        assert_eq!(json("info lab")["ports"].as_array().unwrap().len(), 1);
        end(two).succeeded();
        network("stop lab");
    });
}

#[test]
fn machines_of_users_are_cut_off_while_their_network_is_stopped() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let one = machine(member(), "network=lab,hostname=one");
        let pid = broker();
        let stopped = bantam(&["network", "stop", "lab"], "");
        let said = String::from_utf8_lossy(&stopped.stderr).into_owned();
        assert!(said.contains("1 machine is cut off"), "{said}");
        assert!(!is_running(pid));
        assert!(!Path::new(SOCKET).exists());
        let started = bantam(&["network", "start", "lab"], "");
        let said = String::from_utf8_lossy(&started.stderr).into_owned();
        assert!(said.contains("1 machine is on it again"), "{said}");
        let link = succeed("ip -oneline link show bnt0");
        assert!(link.contains("master bantam0"), "{link}");

        // Another group, and none: who is on the network stays.
        network("group lab games");
        let error = machine_refused(member(), "network=lab");
        assert!(
            error.contains("is for members of the group 'games'"),
            "{error}"
        );
        end(machine(as_user("--groups games"), "network=lab")).succeeded();
        network("group lab --none");
        let error = machine_refused(member(), "network=lab");
        assert!(error.contains("is for root only"), "{error}");
        assert_eq!(json("info lab")["ports"][0]["hostname"], "one");
        assert!(json("info lab").get("group").is_none());
        end(one).succeeded();

        for (arguments, reason) in [
            (
                "group lab no-such-group",
                "there is no group 'no-such-group'",
            ),
            ("group none users", "there is no network 'none'"),
            ("define other --group a/b", "there is no group 'a/b'"),
        ] {
            let words: Vec<_> = ["network"]
                .into_iter()
                .chain(arguments.split(' '))
                .collect();
            let error = refused(&words);
            assert!(error.contains(reason), "{error}");
        }
        let output = by(&member(), &["network", "group", "lab", GROUP]);
        assert!(!output.status.success());
        network("stop lab");
    });
}

#[test]
fn a_network_that_is_bridged_has_a_group_too() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        succeed("ip link add br7 type bridge && ip link set br7 up");
        network(&format!(
            "define lab --mode bridged --bridge br7 --group {GROUP}"
        ));
        network("start lab");
        let machine = machine(member(), "network=lab");
        let link = succeed("ip -oneline link show bnt0");
        assert!(link.contains("master br7"), "{link}");
        kill(machine);
        wait_until("the place is given up", || records() == 0);
        network("stop lab");
    });
}

#[test]
fn a_broker_survives_what_users_send() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let pid = broker();
        let good = br#"{"mac":"02:00:00:00:01:01","queues":1}"#;
        let large = vec![b' '; 100_000];
        let deep = "[".repeat(1000);
        let packets: [&[u8]; 12] = [
            b"",
            b"\0",
            b"{}",
            b"null",
            b"\xff\xfe",
            deep.as_bytes(),
            &large,
            br#"{"mac":"02:00:00:00:01:01","queues":99}"#,
            br#"{"mac":"ff:ff:ff:ff:ff:ff","queues":1}"#,
            br#"{"mac":"02:00:00:00:01:01","queues":1,"hostname":"a; flush ruleset"}"#,
            br#"{"mac":"02:00:00:00:01:01","queues":1,"interface":"lo"}"#,
            &[good, &b"\n"[..], good].concat(),
        ];
        for packet in packets {
            let socket = connection().unwrap();
            let _ = send(socket.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL);
            let mut answer = [0; 2048];
            wait_until("it is answered", || {
                match recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()) {
                    Ok(size) => {
                        let text = String::from_utf8_lossy(&answer[..size]);
                        assert!(size == 0 || text.starts_with("{\"refused\":"), "{text}");
                        true
                    }
                    Err(errno) => errno != nix::errno::Errno::EAGAIN,
                }
            });
        }
        // Descriptors that come along, and more packets than one.
        let open = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let before = open();
        let socket = connection().unwrap();
        let descriptors = [socket.as_raw_fd(); 20];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(good)],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        wait_until("it has a place", || records() == 1);
        for _ in 0..100 {
            if send(socket.as_raw_fd(), good, MsgFlags::MSG_NOSIGNAL).is_err() {
                break;
            }
        }
        drop(socket);
        wait_until("the place is given up", || records() == 0);
        wait_until("nothing stays open", || open() <= before);
        assert_eq!(broker(), pid);
        assert!(is_running(pid));
        let _place = place(1).unwrap();
        drop(_place);
        network("stop lab");
    });
}

#[test]
fn users_that_connect_a_thousand_times_and_stall_hold_nobody_up() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let pid = broker();
        let open = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let before = open();
        // A connection can be refused at once, or not be accepted while there are many.
        let stalled: Vec<_> = (0..1000).filter_map(|_| connection().ok()).collect();
        assert!(stalled.len() >= 100, "{}", stalled.len());
        let begin = Instant::now();
        end(machine(member(), "network=lab")).succeeded();
        assert!(begin.elapsed() < Duration::from_secs(20));
        let answered = |socket: &OwnedFd| {
            let mut answer = [0; 2048];
            match recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()) {
                Ok(size) => String::from_utf8_lossy(&answer[..size]).into_owned(),
                Err(_) => String::new(),
            }
        };
        let refused = stalled
            .iter()
            .filter(|socket| answered(socket).contains("too many connections"));
        assert!(refused.count() >= 90);
        // Who does not ask is not waited for.
        wait_until("the others are closed", || open() <= before);
        drop(stalled);
        assert_eq!(broker(), pid);
        network("stop lab");
    });
}

#[test]
fn a_user_has_a_bounded_number_of_places() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let places: Vec<_> = (0..32).map(|last| place(last).unwrap()).collect();
        let error = place(32).unwrap_err();
        assert!(error.contains("has 32 machines of yours"), "{error}");
        // Another user has room.
        end(machine(member(), "network=lab")).succeeded();
        // Places count as long as they are in use, also if the broker is another one.
        send_signal(broker(), Signal::SIGKILL).unwrap();
        thread::sleep(Duration::from_millis(100));
        network("list");
        place(32).unwrap_err();
        drop(places);
        // A process that another test is starting has copies of descriptors until it executes its program.
        wait_until("their records are gone", || {
            network("list");
            records() == 0
        });
        place(32).unwrap();
        wait_until("the place is given up", || records() == 0);
        network("stop lab");
    });
}

/// A tap has requests that its user can make.
#[test]
fn a_tap_does_not_outlive_its_place() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let (place, tap) = place(1).unwrap();
        let owner = fs::read_to_string("/sys/class/net/bnt0/owner").unwrap_or_default();
        let name = place.interface().to_owned();
        // It is read from sysfs of another namespace if that was not mounted anew.
        assert!(owner.is_empty() || owner.trim() == "0", "{owner}");
        let queue = tap.queues()[0].as_raw_fd();
        // SAFETY: the request takes its argument by value.
        let kept = unsafe { libc::ioctl(queue, libc::TUNSETPERSIST, 1) };
        assert_eq!(kept, 0);
        // The descriptor stays with another program, too.
        let copy = nix::unistd::dup(&tap.queues()[0]).unwrap();
        drop((place, tap));
        wait_until("the tap is gone", || !interfaces().contains(&name));
        wait_until("the place is given up", || records() == 0);
        drop(copy);
        network("stop lab");
    });
}

#[test]
fn frames_of_users_are_filtered() {
    require_kvm!();
    require_taps!();
    with_users(|| {
        network(&format!("define lab --group {GROUP}"));
        network("start lab");
        let (one, two) = (place(1).unwrap(), place(2).unwrap());
        let send = |from: &(UserPlace, Tap), source: [u8; 6], mark: u8| {
            // An ARP request for nothing in particular.
            let address = from.0.address().unwrap().octets();
            let mut frame = vec![0; PACKET_HEADER_SIZE];
            frame.extend([0xff; 6]);
            frame.extend(source);
            frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
            frame.extend(source);
            frame.extend(address);
            frame.extend([0; 10]);
            frame.resize(PACKET_HEADER_SIZE + 59, 0);
            frame.push(mark);
            nix::unistd::write(&from.1.queues()[0], &frame).unwrap();
        };
        let hears = |to: &(UserPlace, Tap), mark: u8| {
            let deadline = Instant::now() + Duration::from_millis(300);
            let mut packet = [0; 2048];
            while Instant::now() < deadline {
                match nix::unistd::read(&to.1.queues()[0], &mut packet) {
                    Ok(size)
                        if packet[size - 1] == mark && packet[PACKET_HEADER_SIZE + 13] == 6 =>
                    {
                        return true;
                    }
                    Ok(_) => {}
                    Err(_) => thread::sleep(Duration::from_millis(2)),
                }
            }
            false
        };
        send(&one, [2, 0, 0, 0, 1, 1], 0xa1);
        assert!(hears(&two, 0xa1));
        send(&one, [2, 0, 0, 0, 1, 9], 0xa2);
        assert!(!hears(&two, 0xa2));
        // Also if the broker has been killed.
        send_signal(broker(), Signal::SIGKILL).unwrap();
        send(&one, [2, 0, 0, 0, 1, 1], 0xa3);
        assert!(hears(&two, 0xa3));
        send(&one, [2, 0, 0, 0, 1, 9], 0xa4);
        assert!(!hears(&two, 0xa4));
        drop((one, two));
        network("stop lab");
    });
}
