//! Network devices, driven by bare-metal guests, and the tap interfaces of the host.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bantam_tests::{
    Bantam, HostTap, Kernel, PacketSocket, RootFileSystem, accept, answer, first_difference,
    interface_exists, pattern, require_taps, tap_name, unprivileged,
};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// An EtherType reserved for experiments (IEEE 802), which nothing else sends.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

fn frame(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ETHERTYPE, payload].concat()
}

/// Sends frames to a guest that sends them back, through a tap that the monitor creates.
fn echo(words: &str) {
    let tap = tap_name();
    let machine = Bantam::payload("devices")
        .option("--net", format!("tap={tap},mac=52:54:00:12:34:56"))
        .append(format!("expect-devices=1,4 net-echo=24 {words}"))
        .start();
    machine.wait_for_output("net: ready to echo");
    let socket = PacketSocket::open(&tap);
    let mut echoed = 0;
    // Some of the frames that the guest waits for are the host's own announcements.
    for number in 0..24 {
        let payload = pattern(number, 0, 46 + number as usize * 62);
        if socket.send(&frame(GUEST_MAC, HOST_MAC, &payload)).is_err() {
            break;
        }
        let expected = frame(HOST_MAC, GUEST_MAC, &payload);
        let is_experiment = |frame: &[u8]| frame.get(12..14) == Some(&ETHERTYPE[..]);
        match socket.receive(Duration::from_secs(2), is_experiment) {
            Some(back) => assert!(back == expected, "frame {number} came back as {back:02x?}"),
            None => break,
        }
        echoed += 1;
    }
    let ended = machine.wait();
    ended.passed().printed("ok: net echoes 24 frames");
    assert!(echoed >= 8, "{echoed} frames came back\n{ended}");
    assert!(!interface_exists(&tap), "the tap has outlived its machine");
}

#[test]
fn frames_of_all_sizes_pass_in_both_directions() {
    require_taps!();
    echo("");
}

#[test]
fn frames_pass_with_offloads_negotiated() {
    require_taps!();
    echo("offloads");
}

#[test]
fn the_host_answers_arp_on_a_tap_that_exists_and_stays() {
    require_taps!();
    let tap = HostTap::new();
    let ended = Bantam::payload("devices")
        .option("--net", format!("tap={}", tap.name))
        .append(format!("net-arp={},{}", tap.guest, tap.host))
        .finish();
    ended
        .passed()
        .printed(&format!("ok: net resolves {},{}", tap.guest, tap.host))
        .printed("ok: net sends")
        .printed("ok: net interrupts");
    assert!(interface_exists(&tap.name));
}

#[test]
fn the_mtu_of_a_network_device_is_that_of_its_tap() {
    require_taps!();
    let tap = tap_name();
    let machine = Bantam::payload("hello")
        .option("--net", format!("tap={tap},mtu=1400"))
        .append("finish=hang")
        .start();
    machine.wait_for_output("PASS\n");
    let mtu = fs::read_to_string(format!("/sys/class/net/{tap}/mtu")).unwrap();
    assert_eq!(mtu.trim(), "1400");
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}

#[test]
fn a_tap_in_use_is_refused() {
    require_taps!();
    let net = format!("tap={}", tap_name());
    let machine = || Bantam::payload("hello").option("--net", &net);
    let first = machine().append("finish=hang").start();
    first.wait_for_output("PASS\n");
    let ended = machine().finish();
    let reason = ended.failed_with_one_line();
    assert!(reason.contains("in use by another machine"), "{reason}");
    first.signal(Signal::SIGTERM);
    first.wait().succeeded();
    machine().finish().passed();
}

/// The kernel closes the tap of a machine that was killed only after its io_uring.
#[test]
fn the_tap_of_a_killed_machine_is_there_for_the_next() {
    require_taps!();
    let tap = HostTap::new();
    for net in [
        format!("tap={}", tap.name),
        format!("tap={},queues=2", tap_name()),
    ] {
        let machine = || Bantam::payload("devices").option("--net", &net);
        for _ in 0..8 {
            let first = machine().append("finish=hang").start();
            first.wait_for_output("PASS\n");
            first.signal(Signal::SIGKILL);
            machine().finish().passed();
        }
    }
}

#[test]
fn only_taps_of_the_network_namespace_count() {
    require_taps!();
    let name = tap_name();
    let net = format!("tap={name},queues=2");
    let machine = || Bantam::payload("hello").option("--net", &net);
    let outside = machine().append("finish=hang").start();
    outside.wait_for_output("PASS\n");
    // Processes that this thread starts are in the namespace too; sysfs still shows the old one.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip(&format!("tuntap add dev {name} mode tap multi_queue"));
    let inside = machine().append("finish=hang").start();
    inside.wait_for_output("PASS\n");
    let ended = machine().finish();
    let reason = ended.failed_with_one_line();
    assert!(reason.contains("in use by another machine"), "{reason}");
    for machine in [inside, outside] {
        machine.signal(Signal::SIGTERM);
        machine.wait().succeeded();
    }
}

#[test]
fn a_tap_that_exists_has_its_mtu_back_afterwards() {
    require_taps!();
    let tap = HostTap::new();
    let machine = |payload: &str| {
        let net = format!("tap={},mtu=1400", tap.name);
        Bantam::payload(payload).option("--net", net)
    };
    machine("devices").finish().passed();
    assert_eq!(tap.mtu(), 1500);

    let running = machine("devices").append("finish=hang").start();
    running.wait_for_output("PASS\n");
    assert_eq!(tap.mtu(), 1400);
    running.signal(Signal::SIGTERM);
    running.wait().succeeded();
    assert_eq!(tap.mtu(), 1500);

    let ended = machine("hello")
        .option("--initrd", "/no/such/file")
        .finish();
    ended.failed_with_one_line();
    assert_eq!(tap.mtu(), 1500);
}

#[test]
fn a_tap_that_the_user_may_not_create_is_refused_with_a_remedy() {
    require_taps!();
    let tap = tap_name();
    let ended = Bantam::payload("hello")
        .launcher(unprivileged())
        .option("--net", format!("tap={tap}"))
        .finish();
    let reason = ended.failed_with_one_line();
    assert!(
        reason.starts_with(&format!("cannot create tap '{tap}': not permitted")),
        "{reason}"
    );
    assert!(reason.contains("ip tuntap add"), "{reason}");
}

#[test]
fn a_tap_with_a_single_queue_serves_two_vcpus_but_is_not_split() {
    require_taps!();
    let tap = HostTap::new();
    let machine = |suffix: &str| {
        Bantam::payload("hello")
            .option("--cpus", "2")
            .option("--net", format!("tap={}{suffix}", tap.name))
    };
    let ended = machine("").option("--log", "info").finish();
    ended.passed();
    assert!(
        ended.stderr.contains("was made with a single queue"),
        "{ended}"
    );
    let ended = machine(",queues=2").finish();
    let reason = ended.failed_with_one_line();
    assert!(reason.contains("mode tap multi_queue"), "{reason}");
}

#[test]
fn a_machine_outlives_its_tap() {
    require_taps!();
    let tap = tap_name();
    let machine = Bantam::payload("devices")
        .option("--net", format!("tap={tap},queues=2"))
        .append("finish=hang")
        .start();
    machine.wait_for_output("PASS\n");
    ip(&format!("link delete {tap}"));
    machine.wait_for_error("has been removed");
    let before = device_thread_ticks(machine.pid());
    sleep(Duration::from_millis(500));
    let ticks = device_thread_ticks(machine.pid()) - before;
    assert!(ticks <= 5, "the devices have taken {ticks} of 50 ticks");
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    ended.succeeded();
    assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
}

#[test]
fn a_guest_that_takes_no_frames_costs_nothing() {
    require_taps!();
    let tap = tap_name();
    let machine = Bantam::payload("devices")
        .option("--net", format!("tap={tap}"))
        .append("finish=hang")
        .start();
    machine.wait_for_output("PASS\n");
    let socket = PacketSocket::open(&tap);
    let frame = frame(GUEST_MAC, HOST_MAC, &pattern(1, 0, 1000));
    // More than the guest's buffers and the tap hold.
    let flood = || (0..3000).filter(|_| socket.send(&frame).is_ok()).count();
    assert!(flood() >= 256);
    let before = device_thread_ticks(machine.pid());
    let deadline = Instant::now() + Duration::from_millis(500);
    while Instant::now() < deadline {
        flood();
    }
    let ticks = device_thread_ticks(machine.pid()) - before;
    assert!(ticks <= 5, "the devices have taken {ticks} of 50 ticks");
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "ip {arguments}"
    );
}

/// Returns the processor time that the devices of the machine `pid` have taken, in ticks of 10 ms.
fn device_thread_ticks(pid: Pid) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the machine runs");
    for task in tasks.flatten() {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        if let Some((name, fields)) = stat.rsplit_once(") ")
            && name.ends_with("(bantam-devices")
        {
            let times = fields.split(' ').skip(11).take(2);
            return times.filter_map(|time| time.parse::<u64>().ok()).sum();
        }
    }
    panic!("{pid} has no thread for devices");
}

/// The driver of a real kernel uses the pairs of queues that it is offered, and data that goes
/// through them and back arrives intact.
#[test]
fn linux_on_two_vcpus_uses_two_pairs_of_queues() {
    const LENGTH: usize = 4 << 20;
    require_taps!();
    let tap = tap_name();
    let subnet = Ipv4Addr::new(198, 19, 0, 0).to_bits() + std::process::id() % (1 << 14) * 4;
    let (host, guest) = (Ipv4Addr::from(subnet + 1), Ipv4Addr::from(subnet + 2));
    let listen = || TcpListener::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let (sink, source) = (listen(), listen());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();

    let net = format!("net:eth0:{guest}/30:{host}");
    let send = format!("net-tcp-send:{host}:{}:{LENGTH}:31", port(&sink));
    let receive = format!("net-tcp-receive:{host}:{}:{LENGTH}:32", port(&source));
    let commands = [&net[..], &send, &receive].join(",");
    let machine = Bantam::linux(Kernel::Full)
        .option("--initrd", RootFileSystem::new().initrd)
        .option("--cpus", "2")
        .option("--net", format!("tap={tap}"))
        .append(format!("quiet bantam.mode=test bantam.test={commands}"))
        .start();
    wait_until("there is a tap", || interface_exists(&tap));
    ip(&format!("address add {host}/30 dev {tap}"));
    machine.wait_for_output(&format!("bantam: {net} ok"));
    let queues = fs::read_dir(format!("/sys/class/net/{tap}/queues")).unwrap();
    let names = queues.map(|queue| queue.unwrap().file_name());
    let transmit_queues = names.filter(|name| name.as_encoded_bytes().starts_with(b"tx-"));
    assert_eq!(transmit_queues.count(), 2);

    let mut received = Vec::new();
    accept(&sink).read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), LENGTH);
    assert_eq!(first_difference(31, 0, &received), None);
    accept(&source).write_all(&pattern(32, 0, LENGTH)).unwrap();

    let ended = machine.wait();
    let text = ended.succeeded().text();
    for command in [&send, &receive] {
        let answer = answer(&text, command);
        assert!(answer.contains(&format!("bytes={LENGTH}")), "{answer}");
    }
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        sleep(Duration::from_millis(10));
    }
}
