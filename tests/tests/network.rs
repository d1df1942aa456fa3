//! Network devices, driven by bare-metal guests, and the tap interfaces of the host.

use std::time::Duration;

use bantam_tests::{
    Bantam, HostTap, PacketSocket, interface_exists, pattern, require_taps, tap_name, unprivileged,
};
use nix::sys::signal::Signal;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// An EtherType set apart for experiments (IEEE 802), which nothing else sends.
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
    // Some of the frames that the guest waits for are the host's own greetings.
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
    let mtu = std::fs::read_to_string(format!("/sys/class/net/{tap}/mtu")).unwrap();
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
