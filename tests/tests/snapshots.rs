//! Snapshots of machines, and machines that go on from them.

use std::path::{Path, PathBuf};
use std::thread;

use bantam_tests::counting::{
    Counters, STOP, config, configured, counting, random_time, read_on, wait_until_gone_on,
};
use bantam_tests::require_kvm;
use bantam_vmm::config::MachineConfig;
use bantam_vmm::{
    Controller, ExitReason, Snapshot, SnapshotDisks, SnapshotFiles, SnapshotOptions, State,
};

const ROUNDS: usize = 20;

fn options(directory: &Path) -> SnapshotOptions {
    SnapshotOptions {
        files: SnapshotFiles::in_directory(directory),
        base: None,
        disks: SnapshotDisks::Overlays,
        stop: false,
    }
}

/// Returns a machine that goes on from the snapshot in `directory`, paused, and what its guest prints.
fn restored(directory: &Path) -> (Controller, std::io::PipeReader) {
    let snapshot = Snapshot::open(directory).unwrap_or_else(|error| panic!("{error}"));
    let (machine, reader) = configured(snapshot.config());
    machine
        .restore(&snapshot)
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(machine.state(), State::Paused);
    (machine, reader)
}

fn ends_well(machine: &Controller, reader: &mut std::io::PipeReader, counters: Counters) {
    counters.set(&machine.memory().expect("it runs"), STOP);
    let reason = machine.wait().unwrap_or_else(|error| panic!("{error}"));
    let mut text = String::new();
    read_on(reader, &mut text);
    assert_eq!(reason, ExitReason::PowerOff, "{text}");
    assert!(text.ends_with("PASS\n"), "{text}");
}

/// Lets a machine count, another go on from its snapshot, and so on. Each snapshot is based on the one before if the
/// machine logs its writes.
fn go_on_from_snapshot_to_snapshot(config: &MachineConfig) {
    let directory = tempfile::tempdir().expect("there is room");
    let path = |round: usize| -> PathBuf {
        let path = directory.path().join(round.to_string());
        std::fs::create_dir_all(&path).expect("there is room");
        path
    };
    let (mut machine, mut reader, counters) = counting(config);
    let cpus = u64::from(config.cpus.get());
    for round in 0..ROUNDS {
        let memory = machine.memory().expect("it runs");
        let before = counters.processors(&memory, cpus);
        wait_until_gone_on(counters, &memory, &before);
        thread::sleep(random_time());
        let taken = machine.snapshot(options(&path(round)));
        let taken = taken.unwrap_or_else(|error| panic!("round {round}: {error}"));
        println!("{taken:?}");
        assert_eq!(machine.state(), State::Running);
        // The first machine has not noticed.
        let before = counters.processors(&memory, cpus);
        wait_until_gone_on(counters, &memory, &before);
        drop(machine);

        (machine, reader) = restored(&path(round));
        let memory = machine.memory().expect("it is paused");
        let before = counters.processors(&memory, cpus);
        machine.resume().unwrap_or_else(|error| panic!("{error}"));
        wait_until_gone_on(counters, &memory, &before);
    }
    ends_well(&machine, &mut reader, counters);
}

#[test]
fn a_machine_goes_on_from_its_snapshot() {
    require_kvm!();
    go_on_from_snapshot_to_snapshot(&config(1, "timer=deadline"));
}
