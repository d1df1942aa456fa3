//! Disks in every cache mode and by every engine.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use bantam_tests::{Bantam, require_kvm};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const DISK_SIZE: usize = 4 << 20;

/// A disk image in a folder of its own, on the file system of the tests.
fn image() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let path = folder.path().join("disk.img");
    fs::write(&path, vec![0x5a; DISK_SIZE]).expect("there is room");
    (folder, path)
}

#[test]
fn every_engine_does_all_requests_in_every_cache_mode() {
    require_kvm!();
    for kind in all_kinds() {
        let (_folder, path) = image();
        let ended = Bantam::payload("devices")
            .disk(&path, &kind)
            .append("block-test=write")
            .finish();
        ended.passed();
        // The lock is gone with the machine.
        Bantam::payload("hello").disk(&path, "").finish().passed();
    }
}

/// Every combination of engine and cache mode, as it follows the path of a disk.
fn all_kinds() -> impl Iterator<Item = String> {
    ["auto", "io_uring", "sync"].iter().flat_map(|engine| {
        ["writeback", "writethrough", "none", "unsafe"]
            .iter()
            .map(move |cache| format!(",engine={engine},cache={cache}"))
    })
}

#[test]
fn no_data_is_mixed_up() {
    require_kvm!();
    let blocks = DISK_SIZE / 4096;
    for kind in all_kinds() {
        let (_folder, path) = image();
        for words in [
            format!("mode=write pattern=seq operations={blocks}"),
            "mode=mixed pattern=random operations=1000".into(),
        ] {
            let ended = Bantam::payload("load")
                .disk(&path, &kind)
                .append(format!("test=block verify seed=3 depth=64 {words}"))
                .finish();
            ended.passed();
        }
    }
}

#[test]
fn what_was_acknowledged_survives_a_monitor_that_is_killed() {
    require_kvm!();
    let blocks = DISK_SIZE / 4096;
    for kind in all_kinds() {
        let (_folder, path) = image();
        let load = |words: &str| {
            Bantam::payload("load").disk(&path, &kind).append(format!(
                "test=block verify seed=5 depth=32 pattern=seq {words}"
            ))
        };
        let machine = load(&format!("mode=write operations={blocks} finish=hang")).start();
        machine.wait_for_output("PASS");
        machine.signal(Signal::SIGKILL);
        machine.wait();
        // Whose lock is free at once.
        load(&format!("mode=read operations={blocks}"))
            .finish()
            .passed();

        let machine = load("mode=write seconds=60").start();
        machine.wait_for_output("load: ready");
        thread::sleep(Duration::from_millis(20));
        machine.signal(Signal::SIGKILL);
        machine.wait();
        Bantam::payload("hello").disk(&path, "").finish().passed();
    }
}

#[test]
fn disks_have_threads_and_queues_of_their_own() {
    require_kvm!();
    let ((_folder, first), (_other_folder, second)) = (image(), image());
    let ended = Bantam::payload("devices")
        .disk(&first, ",iothread=on,poll=on,queues=8")
        .disk(
            &second,
            ",queues=3,operations-per-second=1000,bytes-per-second=4M",
        )
        .append("block-test=write")
        .finish();
    ended.passed();
}
