//! Disks in every cache mode and by every engine.

use std::fs;
use std::path::PathBuf;

use bantam_tests::{Bantam, require_kvm};
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
    for engine in ["auto", "io_uring", "sync"] {
        for cache in ["writeback", "writethrough", "none", "unsafe"] {
            let (_folder, path) = image();
            let ended = Bantam::payload("devices")
                .disk(&path, &format!(",engine={engine},cache={cache}"))
                .append("block-test=write")
                .finish();
            ended.passed();
            // The lock is gone with the machine.
            Bantam::payload("hello").disk(&path, "").finish().passed();
        }
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
