//! Devices, driven by bare-metal guests.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use bantam_tests::{Bantam, Ended, fnv1a, pattern, require_kvm};
use nix::fcntl::{FcntlArg, fcntl};

/// Bytes at the start of a disk that the payload `devices` writes to.
const WRITTEN: usize = 1 << 20;

#[test]
fn the_guest_finds_the_devices_in_their_order() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let two_disks = || {
        Bantam::payload("devices")
            .disk(&disk, ",ro")
            .disk(&disk, ",ro")
    };
    two_disks()
        .append("expect-devices=2,2,4")
        .finish()
        .passed()
        .printed("the devices are 2,2,4");
    two_disks()
        .option("--rng", "off")
        .append("expect-devices=2,2")
        .finish()
        .passed();
}

#[test]
fn the_interval_timer_counts_from_the_first_access_on() {
    require_kvm!();
    for first in ["control", "system-control"] {
        Bantam::payload("timer")
            .append(format!("first={first}"))
            .finish()
            .passed();
    }
}

#[test]
fn a_machine_can_have_eighteen_devices() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let mut bantam = Bantam::payload("devices");
    for _ in 0..17 {
        bantam = bantam.disk(&disk, ",ro");
    }
    let ended = bantam.finish();
    ended.passed();
    // Each has its own interrupt.
    let working = ended.text().matches("ok: block interrupts").count();
    assert_eq!(working, 17, "{ended}");
}

#[test]
fn a_disk_is_read_written_flushed_zeroed_and_discarded() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let before = pattern(1, 0, 3 * WRITTEN);
    fs::write(&disk, &before).unwrap();
    let blocks_before = allocated_bytes(&disk);

    let ended = Bantam::payload("devices")
        .disk(&disk, ",id=scratch")
        .append("block-test=write expect-devices=2,4")
        .finish();
    ended
        .passed()
        .printed(&format!("block: {} sectors", 3 * WRITTEN / 512))
        .printed("block: id 'scratch'");
    for check in [
        "block reads its first and last sector",
        "block refuses what is outside it",
        "block refuses unknown requests",
        "block interrupts",
        "block keeps what is written",
        "block does many requests at a time",
        "block flushes",
        "block writes zeroes",
        "block discards",
    ] {
        ended.printed(&format!("ok: {check}\n"));
    }
    // At the end, the guest discards all blocks that it wrote to.
    let after = fs::read(&disk).unwrap();
    assert_eq!(after.len(), before.len());
    assert!(after[..WRITTEN].iter().all(|&byte| byte == 0), "{ended}");
    assert!(after[WRITTEN..] == before[WRITTEN..], "{ended}");
    assert!(allocated_bytes(&disk) < blocks_before, "{ended}");
}

fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("it exists").blocks() * 512
}

#[test]
fn a_disk_without_an_id_is_named_by_its_place() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let mut bantam = Bantam::payload("devices");
    for name in ["first", "second"] {
        let disk = folder.path().join(name);
        fs::write(&disk, [0; 512]).unwrap();
        bantam = bantam.disk(&disk, "");
    }
    let ended = bantam.finish();
    ended
        .passed()
        .printed("block: id 'disk0'")
        .printed("block: id 'disk1'");
}

#[test]
fn a_read_only_disk_refuses_writes() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let before = pattern(2, 0, 1 << 16);
    fs::write(&disk, &before).unwrap();
    let ended = Bantam::payload("devices")
        .disk(&disk, ",ro")
        .append("block-test=write")
        .finish();
    ended
        .passed()
        .printed("ok: block is read-only and refuses a write");
    assert!(fs::read(&disk).unwrap() == before);
}

#[test]
fn the_entropy_device_gives_random_bytes() {
    require_kvm!();
    let ended = Bantam::payload("devices")
        .append("expect-devices=4")
        .finish();
    ended
        .passed()
        .printed("ok: rng gives random bytes")
        .printed("ok: rng interrupts");
}

/// Sends all values of a byte through the serial port and back.
fn echo(mode: &str) -> Ended {
    let sent: Vec<u8> = (0..=255).cycle().take(2048).collect();
    let mut machine = Bantam::payload("serial")
        .stdin(Stdio::piped())
        .append(format!("bytes={} mode={mode}", sent.len()))
        .start();
    machine.wait_for_output("ready\n");
    for part in sent.chunks(200) {
        // The guest must run out of input, and sleep, for interrupts to matter.
        thread::sleep(Duration::from_millis(10));
        machine.send(part);
    }
    let ended = machine.wait();
    ended
        .passed()
        .printed(&format!("checksum {:#018x}\n", fnv1a(&sent)));
    let start = "ready\n".len();
    let echoed = ended.stdout.get(start..start + sent.len());
    assert!(echoed == Some(&sent[..]), "{ended}");
    ended
}

#[test]
fn serial_input_arrives_with_interrupts() {
    require_kvm!();
    echo("interrupt").printed(" interrupts\n");
}

#[test]
fn serial_input_arrives_without_interrupts() {
    require_kvm!();
    echo("polled");
}

#[test]
fn serial_output_waits_for_a_slow_reader_and_nothing_is_lost() {
    require_kvm!();
    const LINE: &str = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+\n";
    const KIB: usize = 150;
    let (mut reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let machine = Bantam::payload("serial")
        .append(format!("print-kib={KIB}"))
        .stdout(writer)
        .start();
    // Longer than the guest needs to fill the buffers on the way and to end, and longer than the
    // machine waits for a reader at its end.
    thread::sleep(Duration::from_millis(4500));
    let mut output = Vec::new();
    let mut chunk = [0; 1000];
    loop {
        match reader.read(&mut chunk).unwrap() {
            0 => break,
            count => output.extend_from_slice(&chunk[..count]),
        }
        thread::sleep(Duration::from_millis(2));
    }
    machine.wait().succeeded();
    let expected = LINE.repeat(KIB * 1024 / LINE.len());
    assert!(output.starts_with(expected.as_bytes()));
    let rest = String::from_utf8_lossy(&output[expected.len()..]);
    assert!(rest.ends_with("PASS\n"), "{rest}");
}
