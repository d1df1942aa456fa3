//! A guest that attacks the devices.

use std::fs;

use bantam_tests::{Bantam, pattern, require_kvm, require_taps, tap_name};

/// A device logs 24 lines in its first minute, about the guest's mistakes and the host's failures,
/// and a machine here has up to five: disk, console, channels, entropy, serial port. Little else is
/// logged.
const MAX_LOG_LINES: usize = 5 * 25;

/// Attacks all devices of a machine, with random numbers from `seed`.
fn attack(seed: u32, mut bantam: Bantam) {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let disk = folder.path().join("disk");
    let before = pattern(u64::from(seed), 0, 1 << 20);
    fs::write(&disk, &before).expect("it can be written to");
    bantam = bantam.disk(&disk, "").append(format!("seed={seed}"));
    let ended = bantam.finish();
    ended.passed();
    assert!(!ended.stderr.contains("panicked"), "{ended}");
    // The log must not grow with the attacks.
    assert!(ended.stderr.lines().count() <= MAX_LOG_LINES, "{ended}");
    // The guest only ever asks for reads of the disk.
    assert!(
        fs::read(&disk).is_ok_and(|after| after == before),
        "{ended}"
    );
}

#[test]
fn the_monitor_withstands_a_guest_that_misuses_its_devices() {
    require_kvm!();
    for seed in 1..=4 {
        attack(seed, Bantam::payload("hostile"));
    }
}

#[test]
fn the_monitor_withstands_a_guest_that_misuses_a_network_device() {
    require_taps!();
    for seed in 5..=6 {
        let net = format!("tap={}", tap_name());
        attack(seed, Bantam::payload("hostile").option("--net", net));
    }
}

#[test]
fn the_monitor_withstands_a_guest_that_misuses_a_balloon() {
    require_kvm!();
    for seed in 8..=9 {
        let options = "size=1M,deflate-on-oom=on,reporting=on,statistics=1";
        attack(
            seed,
            Bantam::payload("hostile").option("--balloon", options),
        );
    }
}

#[test]
fn the_monitor_withstands_a_guest_that_misuses_a_socket_device() {
    require_kvm!();
    for seed in 8..=9 {
        let folder = tempfile::tempdir().unwrap();
        let vsock = format!("cid=3,socket={}", folder.path().join("v").display());
        attack(seed, Bantam::payload("hostile").option("--vsock", vsock));
    }
}

#[test]
fn the_monitor_withstands_a_guest_that_misuses_consoles() {
    require_kvm!();
    for seed in 10..=11 {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| format!("file={}", folder.path().join(name).display());
        let bantam = Bantam::payload("hostile")
            .option("--console", file("console"))
            .option("--channel", format!("name=a,{}", file("a")))
            .option("--channel", "name=b,pty");
        attack(seed, bantam);
    }
}

#[test]
fn the_monitor_withstands_an_attack_with_several_vcpus_and_little_memory() {
    require_kvm!();
    let bantam = Bantam::payload("hostile")
        .option("--cpus", "2")
        .option("--memory", "16M");
    attack(7, bantam);
}
