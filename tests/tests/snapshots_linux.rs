//! A Linux guest goes from machine to machine by snapshots, while it works on a disk with four processors and four queues.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Kernel, RootFileSystem, after_random_work, check_image, configured, linux_slot, pattern,
    qemu_img, require_kvm,
};
use bantam_vmm::config::{DiskConfig, MachineConfig, SerialConfig};
use bantam_vmm::{
    Console, Controller, Snapshot, SnapshotDisks, SnapshotFiles, SnapshotOptions, State,
};

const SIZE: usize = 24 << 20;
const SEED: u64 = 7;
/// Steps of each of the guest's threads.
const OPERATIONS: u32 = 600;
/// How long the guest may take.
const LIMIT: Duration = Duration::from_secs(400);
/// How long the guest works between two snapshots.
const WORK_TIME: Duration = Duration::from_millis(1500);
/// What Linux says about a processor or a task that has not gone on.
const COMPLAINTS: [&str; 6] = [
    "lockup",
    "stall",
    "blocked for more than",
    "Marking clocksource",
    "I/O error",
    "Call Trace",
];

/// Goes on from the snapshot in `directory` on another machine, whose serial port leads to `log`.
fn go_on(directory: &Path, log: &Path) -> Controller {
    let snapshot = Snapshot::open(directory).unwrap_or_else(|error| panic!("{error}"));
    let mut config = snapshot.config().clone();
    config.serial = SerialConfig::File(log.to_path_buf());
    let machine = configured(config, Console::default());
    machine
        .restore(&snapshot)
        .unwrap_or_else(|error| panic!("{error}"));
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    machine
}

#[test]
fn a_busy_linux_goes_from_machine_to_machine() {
    require_kvm!();
    let _slot = linux_slot();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let place = |name: &str| folder.path().join(name);
    let (raw, image) = (place("raw"), place("disk.qcow2"));
    fs::write(&raw, pattern(SEED, 0, SIZE)).expect("there is room");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&raw, &image]);

    let log = |round: usize| place(&format!("log{round}"));
    let mut config = MachineConfig::new(Kernel::Full.vmlinux());
    config.initrd = Some(RootFileSystem::new().initrd);
    config.cpus = 4.try_into().expect("it is not zero");
    let work = format!("disk-verify-random:vda:{SEED}:{OPERATIONS}");
    // The guest is there until the test ends it.
    config.append = Some(format!("bantam.mode=test bantam.test={work},sleep:600000"));
    config.serial = SerialConfig::File(log(0));
    let option = format!("{},queues=4", image.display());
    config.disks = vec![option.parse::<DiskConfig>().expect("it is a disk")];
    let mut machine = configured(config, Console::default());
    machine.start().unwrap_or_else(|error| panic!("{error}"));

    let started = Instant::now();
    let mut round = 0;
    let text = |round: usize| fs::read_to_string(log(round)).unwrap_or_default();
    let has_said = |round: usize, words: &str| text(round).contains(words);
    while !has_said(0, "bantam: disks are open") {
        assert!(started.elapsed() < LIMIT, "the guest does not begin");
        thread::sleep(Duration::from_millis(10));
    }
    let started = Instant::now();
    let mut longest = Duration::ZERO;
    loop {
        let next = Instant::now() + WORK_TIME;
        let has_ended = || has_said(round, &format!("bantam: {work} "));
        while !has_ended() && Instant::now() < next {
            assert_eq!(machine.state(), State::Running, "{}", text(round));
            thread::sleep(Duration::from_millis(10));
        }
        if has_ended() {
            break;
        }
        assert!(started.elapsed() < LIMIT, "the guest does not end");
        let directory = place(&format!("snapshot{round}"));
        fs::create_dir(&directory).expect("there is room");
        let taken = machine.snapshot(SnapshotOptions {
            files: SnapshotFiles::in_directory(&directory),
            base: None,
            disks: SnapshotDisks::Overlays,
            stop: true,
            note: None,
        });
        let taken = taken.unwrap_or_else(|error| panic!("{error}"));
        longest = longest.max(taken.paused_for);
        assert_eq!(machine.state(), State::Stopped);
        round += 1;
        machine = go_on(&directory, &log(round));
        fs::remove_dir_all(&directory).expect("it is there");
    }
    println!(
        "{round} machines in {:?}, read in at most {longest:?}",
        started.elapsed()
    );
    assert!(round >= 5, "only {round} machines");
    machine.stop();
    machine.wait().expect("the disk is flushed");
    drop(machine);

    let said: String = (0..=round).map(text).collect();
    assert!(said.contains(&format!("bantam: {work} ok")), "{said}");
    for complaint in COMPLAINTS {
        assert!(!said.contains(complaint), "{complaint}:\n{said}");
    }
    check_image(&image, false);
    let result = place("result");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[&image, &result]);
    let found = fs::read(&result).expect("it was made");
    // The guest has seen blocks of 512 bytes.
    let expected = after_random_work(SEED, OPERATIONS, 512, SIZE);
    assert_eq!(found.len(), expected.len());
    let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the byte there");
}
