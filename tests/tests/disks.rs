//! Disks in every cache mode and with every engine.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use bantam_tests::{
    Bantam, Ended, LoopDevice, require_kvm, require_loop_devices, require_namespaces,
    with_file_size_limit, with_mounts,
};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const DISK_SIZE: usize = 4 << 20;

/// A disk image in its own folder, on the file system of the tests.
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

/// Every combination of engine and cache mode, as options after the path of a disk.
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

/// Makes an image of [`DISK_SIZE`] over two others, the lowest of which is raw.
fn qcow2_image() -> (TempDir, PathBuf) {
    let (folder, base) = image();
    for arguments in [
        ["-F", "raw", "-b", "disk.img", "middle.qcow2"],
        ["-F", "qcow2", "-b", "middle.qcow2", "top.qcow2"],
    ] {
        let mut command = Command::new("qemu-img");
        command
            .args(["create", "-q", "-f", "qcow2"])
            .args(arguments);
        let status = command.current_dir(folder.path()).status();
        assert!(status.expect("qemu-img is installed").success());
    }
    let top = base.with_file_name("top.qcow2");
    (folder, top)
}

#[test]
fn a_qcow2_image_is_a_disk_like_any_other() {
    require_kvm!();
    let blocks = DISK_SIZE / 4096;
    for kind in all_kinds() {
        let (folder, path) = qcow2_image();
        let base = folder.path().join("disk.img");
        Bantam::payload("devices")
            .disk(&path, &kind)
            .append("block-test=write")
            .finish()
            .passed();
        for words in [
            format!("mode=write pattern=seq operations={blocks}"),
            "mode=mixed pattern=random operations=1000".into(),
        ] {
            Bantam::payload("load")
                .disk(&path, &kind)
                .append(format!("test=block verify seed=3 depth=64 {words}"))
                .finish()
                .passed();
        }
        let mut check = Command::new("qemu-img");
        let check = check.args(["check", "-q", "-f", "qcow2"]).arg(&path);
        assert!(check.status().expect("it is installed").success(), "{kind}");
        let bytes = fs::read(base).expect("it is there");
        assert!(bytes.iter().all(|&byte| byte == 0x5a));
    }
}

#[test]
fn a_qcow2_image_with_a_backing_file_is_refused_if_that_is_not_wanted() {
    require_kvm!();
    let (_folder, path) = qcow2_image();
    let ended = Bantam::payload("hello")
        .disk(&path, ",backing=off")
        .finish();
    let line = ended.failed_with_one_line();
    assert!(line.contains("it has the backing file"), "{line}");
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
        // Its lock is free at once.
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

// --- Failures of the host -------------------------------------------------------------------------

/// Blocks of a disk that the payload `load` reads or writes at a time.
const BLOCKS: usize = DISK_SIZE / 4096;

/// Checks that a machine has survived failed requests: each was reported to the payload, and the
/// reason once to the user. Returns their number.
#[track_caller]
fn failed_requests(ended: &Ended, reason: &str) -> usize {
    let warnings: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(warnings.len(), 1, "{ended}");
    let warning = format!("a request failed, and the guest was told so: {reason}");
    assert!(warnings[0].contains(&warning), "{ended}");
    let text = ended.succeeded().text();
    text.lines()
        .find_map(|line| {
            let (_, errors) = line.strip_prefix("FAIL: ")?.split_once(": ")?;
            let count = errors.strip_suffix(" errors, the first: request status 1")?;
            count.parse().ok()
        })
        .unwrap_or_else(|| panic!("no I/O errors in\n{ended}"))
}

#[test]
fn writes_that_the_host_refuses_fail_and_all_else_works() {
    const LIMIT: usize = DISK_SIZE / 2;
    require_kvm!();
    for kind in all_kinds() {
        let (_folder, path) = image();
        let load = |words: &str| {
            Bantam::payload("load")
                .disk(&path, &kind)
                .append(format!("test=block seed=9 depth=32 {words}"))
        };
        // A partial write has failed as well.
        let limited = |words, limit| {
            load(words)
                .launcher(with_file_size_limit(limit as u64))
                .finish()
        };
        let write = format!("mode=write pattern=seq verify operations={BLOCKS}");
        let ended = limited(&write, LIMIT + 1024);
        let failed = failed_requests(&ended, "File too large");
        assert_eq!(failed, BLOCKS / 2, "{kind}: {ended}");
        let content = fs::read(&path).unwrap();
        assert_eq!(content.len(), DISK_SIZE);
        let refused = &content[LIMIT + 1024..];
        assert!(refused.iter().all(|&byte| byte == 0x5a), "{kind}");

        let read = format!("mode=read verify span={LIMIT} operations={BLOCKS}");
        load(&read).finish().passed();
        let ended = limited("mode=mixed operations=2000", LIMIT);
        let failed = failed_requests(&ended, "File too large");
        // Of a thousand writes, about half.
        assert!((400..600).contains(&failed), "{kind}: {ended}");
    }
}

#[test]
fn a_full_file_system_fails_the_writes_that_need_room() {
    require_kvm!();
    require_namespaces!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let setup = format!(
        "mount -t tmpfs -o size={} tmpfs '{}' && truncate --size={DISK_SIZE} '{}'",
        DISK_SIZE / 2,
        folder.path().display(),
        path.display()
    );
    // Not every host has O_DIRECT there.
    for kind in all_kinds().filter(|kind| !kind.ends_with("none")) {
        let ended = Bantam::payload("load")
            .disk(&path, &kind)
            .append("test=block mode=mixed seed=9 depth=32 operations=4000")
            .launcher(with_mounts(&setup))
            .finish();
        let failed = failed_requests(&ended, "No space left on device");
        // Of two thousand writes, a quarter fills the file system, and then every other one needs
        // more room.
        assert!((500..1000).contains(&failed), "{kind}: {ended}");
    }
}

/// With and without the page cache: the other modes only affect writes.
fn kinds_that_read_differently() -> impl Iterator<Item = String> {
    all_kinds().filter(|kind| kind.ends_with("=writeback") || kind.ends_with("=none"))
}

#[test]
fn storage_that_fails_fails_the_requests_to_it() {
    require_loop_devices!();
    for kind in kinds_that_read_differently() {
        let (_folder, path) = image();
        let device = LoopDevice::new(&path);
        // The missing part cannot be read, though the device still has its size.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(DISK_SIZE as u64 / 2).unwrap();
        let ended = Bantam::payload("load")
            .disk(&device.path, &kind)
            .append(format!(
                "test=block mode=read pattern=seq depth=32 operations={BLOCKS}"
            ))
            .finish();
        let failed = failed_requests(&ended, "Input/output error");
        assert_eq!(failed, BLOCKS / 2, "{kind}: {ended}");
    }
}

#[test]
fn a_file_made_shorter_under_a_machine_fails_reads_beyond_its_end() {
    require_kvm!();
    let run = |kind: &str| {
        let (_folder, path) = image();
        // The limit leaves time before the requests reach the part that will be missing.
        let machine = Bantam::payload("load")
            .disk(&path, &format!("{kind},operations-per-second=1000"))
            .append(format!(
                "test=block mode=read pattern=seq completion=interrupt operations={BLOCKS}"
            ))
            .start();
        machine.wait_for_output("load: ready");
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(DISK_SIZE as u64 / 2).unwrap();
        let ended = machine.wait();
        let failed = failed_requests(&ended, "unexpected end of file");
        assert!((1..=BLOCKS / 2).contains(&failed), "{kind}: {ended}");
    };
    // At the same time, as they mostly wait.
    thread::scope(|scope| {
        for kind in kinds_that_read_differently() {
            scope.spawn(move || run(&kind));
        }
    });
}
