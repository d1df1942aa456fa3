//! Snapshots of machines, and machines that go on from them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;

use bantam_tests::counting::{
    Counters, STOP, config, configured, counting, random_time, read_on, rounds, wait_until_gone_on,
};
use bantam_tests::{Traveller, memory_folder, payload, require_kvm};
use bantam_vmm::config::{MachineConfig, SerialConfig, VsockConfig};
use bantam_vmm::{
    Controller, ExitReason, Snapshot, SnapshotBase, SnapshotDisks, SnapshotFiles, SnapshotOptions,
    SnapshotTaken, State, merge_snapshots,
};
use vm_memory::{Bytes, GuestAddress};

fn options(directory: &Path) -> SnapshotOptions {
    SnapshotOptions {
        files: SnapshotFiles::in_directory(directory),
        base: None,
        disks: SnapshotDisks::Overlays,
        stop: false,
        note: None,
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

/// A directory with snapshots.
struct Snapshots(tempfile::TempDir);

impl Snapshots {
    fn new() -> Snapshots {
        Snapshots(memory_folder())
    }

    /// Returns a directory for one snapshot.
    fn path(&self, name: impl ToString) -> PathBuf {
        let path = self.0.path().join(name.to_string());
        fs::create_dir_all(&path).expect("there is room");
        path
    }

    fn files(&self, name: impl ToString) -> SnapshotFiles {
        SnapshotFiles::in_directory(&self.path(name))
    }

    /// Takes a snapshot, of what has changed since `base` if that is given.
    fn take(
        &self,
        machine: &Controller,
        name: impl ToString,
        base: Option<SnapshotFiles>,
    ) -> SnapshotTaken {
        let options = SnapshotOptions {
            base: base.map(SnapshotBase::Files),
            ..options(&self.path(name))
        };
        let taken = machine.snapshot(options);
        taken.unwrap_or_else(|error| panic!("{error}"))
    }

    fn memory(&self, name: impl ToString) -> Vec<u8> {
        let mut bytes = fs::read(self.files(name).memory).expect("it was written");
        // The last page has the snapshot's id.
        bytes.truncate(bytes.len() - 4096);
        bytes
    }
}

/// Waits until the guest has counted from now on.
fn wait_until_counting(machine: &Controller, counters: Counters, cpus: u64) {
    let memory = machine.memory().expect("it runs");
    let before = counters.processors(&memory, cpus);
    wait_until_gone_on(counters, &memory, &before);
}

/// Lets a machine count, another go on from its snapshot, and so on.
fn go_on_from_snapshot_to_snapshot(config: &MachineConfig) {
    let snapshots = Snapshots::new();
    let (mut machine, mut reader, counters) = counting(config);
    let cpus = u64::from(config.cpus.get());
    for round in 0..rounds() {
        wait_until_counting(&machine, counters, cpus);
        thread::sleep(random_time());
        snapshots.take(&machine, round, None);
        assert_eq!(machine.state(), State::Running);
        // This machine has not noticed.
        wait_until_counting(&machine, counters, cpus);
        drop(machine);

        (machine, reader) = restored(&snapshots.path(round));
        // The machine keeps the memory file, which has no name any more.
        fs::remove_dir_all(snapshots.path(round)).expect("it is there");
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

#[test]
fn a_machine_with_four_processors_goes_on_from_its_snapshot() {
    require_kvm!();
    go_on_from_snapshot_to_snapshot(&config(4, "timer=local second=at-once others=3"));
}

/// Takes a chain of differential snapshots of `machine`, and checks that together they are what a full one is.
fn check_chain(machine: &Controller, counters: Counters, snapshots: &Snapshots, first: bool) {
    const LENGTH: usize = 10;
    if first {
        snapshots.take(machine, 0, None);
    }
    for index in 1..=LENGTH {
        wait_until_counting(machine, counters, 1);
        if index == LENGTH {
            machine.pause().unwrap_or_else(|error| panic!("{error}"));
        }
        let taken = snapshots.take(machine, index, Some(snapshots.files(index - 1)));
        assert!(taken.pages < 200, "{taken:?}");
    }
    let chain: Vec<_> = (1..=LENGTH).map(|index| snapshots.files(index)).collect();
    let merged = snapshots.files("merged");
    merge_snapshots(&snapshots.files(0), &chain, &merged).unwrap_or_else(|error| panic!("{error}"));
    snapshots.take(machine, "full", None);
    assert!(snapshots.memory("merged") == snapshots.memory("full"));
    let (machine, mut reader) = restored(&snapshots.path("merged"));
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    wait_until_counting(&machine, counters, 1);
    ends_well(&machine, &mut reader, counters);
}

#[test]
fn a_chain_of_changes_is_a_full_snapshot() {
    require_kvm!();
    let mut config = config(1, "timer=deadline");
    config.track_dirty_pages = true;
    let snapshots = Snapshots::new();
    let (machine, _reader, counters) = counting(&config);
    check_chain(&machine, counters, &snapshots, true);
    drop(machine);

    // A machine that goes on from a snapshot goes on with the chain.
    let (machine, _reader) = restored(&snapshots.path("full"));
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    fs::rename(snapshots.path("full"), snapshots.path("first")).expect("the folder is empty");
    fs::remove_dir_all(snapshots.path(0)).expect("it is there");
    fs::rename(snapshots.path("first"), snapshots.path(0)).expect("the folder is empty");
    check_chain(&machine, counters, &snapshots, false);
}

#[test]
fn changes_are_found_without_a_log() {
    require_kvm!();
    let snapshots = Snapshots::new();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline"));
    let base = Some(snapshots.files("base"));
    let check = |machine: &Controller, name: &str| {
        wait_until_counting(machine, counters, 1);
        machine.pause().unwrap_or_else(|error| panic!("{error}"));
        let taken = snapshots.take(machine, name, base.clone());
        assert!(taken.pages < 200, "{taken:?}");
        snapshots.take(machine, "full", None);
        let merged = snapshots.files("merged");
        merge_snapshots(&snapshots.files("base"), &[snapshots.files(name)], &merged)
            .unwrap_or_else(|error| panic!("{error}"));
        assert!(snapshots.memory("merged") == snapshots.memory("full"));
    };
    snapshots.take(&machine, "base", None);
    // By comparison.
    check(&machine, "compared");
    drop(machine);
    // By what is not the file's any more.
    let (machine, _reader) = restored(&snapshots.path("base"));
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    check(&machine, "mapped");
    // A differential snapshot cannot be compared with.
    let error = machine
        .snapshot(SnapshotOptions {
            base: Some(SnapshotBase::Files(snapshots.files("mapped"))),
            ..options(&snapshots.path("more"))
        })
        .expect_err("it has not all pages");
    assert!(
        error.to_string().contains("bantam snapshot merge"),
        "{error}"
    );
    assert_eq!(machine.state(), State::Paused);
}

#[test]
fn a_fork_leaves_the_log_of_changes_as_it_was() {
    require_kvm!();
    let mut config = config(1, "timer=deadline pages=100");
    config.track_dirty_pages = true;
    let snapshots = Snapshots::new();
    let (machine, _reader, counters) = counting(&config);
    snapshots.take(&machine, "base", None);
    for _ in 0..3 {
        wait_until_counting(&machine, counters, 1);
        let forked = machine.fork(&SnapshotDisks::Overlays);
        forked.unwrap_or_else(|error| panic!("{error}"));
    }
    wait_until_counting(&machine, counters, 1);
    machine.pause().unwrap_or_else(|error| panic!("{error}"));
    let taken = snapshots.take(&machine, "next", Some(snapshots.files("base")));
    assert!(taken.pages < 300, "{taken:?}");
    let merged = snapshots.files("merged");
    merge_snapshots(
        &snapshots.files("base"),
        &[snapshots.files("next")],
        &merged,
    )
    .unwrap_or_else(|error| panic!("{error}"));
    snapshots.take(&machine, "full", None);
    assert!(snapshots.memory("merged") == snapshots.memory("full"));
}

#[test]
fn forks_while_snapshots_are_written_lose_no_change() {
    require_kvm!();
    const FORKS: u64 = 40;
    /// The guest does not use the pages from here on.
    const PAGES: u64 = 0xa0_0000;
    let mut config = config(1, "timer=deadline");
    config.track_dirty_pages = true;
    let snapshots = Snapshots::new();
    let (machine, _reader, _) = counting(&config);
    snapshots.take(&machine, 0, None);
    let mut last = 0;
    let take_next = |last: &mut usize| {
        snapshots.take(&machine, *last + 1, Some(snapshots.files(*last)));
        *last += 1;
    };
    thread::scope(|scope| {
        let forks = scope.spawn(|| {
            let memory = machine.memory().expect("it runs");
            for page in 0..FORKS {
                // Nothing writes to it again, so no later snapshot would have it by chance.
                let written = memory.write_obj(1_u8, GuestAddress(PAGES + page * 4096));
                written.expect("the machine has so much memory");
                let forked = machine.fork(&SnapshotDisks::Overlays);
                forked.unwrap_or_else(|error| panic!("{error}"));
            }
        });
        while !forks.is_finished() {
            take_next(&mut last);
        }
    });
    machine.pause().unwrap_or_else(|error| panic!("{error}"));
    take_next(&mut last);
    let chain: Vec<_> = (1..=last).map(|index| snapshots.files(index)).collect();
    let merged = snapshots.files("merged");
    merge_snapshots(&snapshots.files(0), &chain, &merged).unwrap_or_else(|error| panic!("{error}"));
    snapshots.take(&machine, "full", None);
    assert!(snapshots.memory("merged") == snapshots.memory("full"));
}

/// Returns the configuration of a machine that runs `kernel`, with a disk of this size in `folder`.
fn with_disk(kernel: &str, words: &str, folder: &Path, size: u64, option: &str) -> MachineConfig {
    let image = folder.join("disk");
    let made = File::create(&image).and_then(|file| file.set_len(size));
    made.expect("there is room");
    let mut config = MachineConfig::new(payload(kernel));
    config.memory = "32M".parse().expect("this is a size");
    config.append = Some(format!("{words} finish=poweroff"));
    let disk = format!("{}{option}", image.display());
    config.disks = vec![disk.parse().expect("it is a disk")];
    config
}

/// Lets a guest go from machine to machine, at random moments.
fn travel(traveller: &mut Traveller) {
    while traveller.moves() < rounds() && traveller.move_on() {
        thread::sleep(random_time());
    }
}

#[test]
fn requests_to_a_disk_by_the_hundred_are_neither_lost_nor_repeated() {
    require_kvm!();
    for option in ["", ",engine=io_uring", ",cache=none"] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("there is room");
        let operations = rounds() * 1500;
        let words = format!(
            "test=block mode=mixed pattern=random verify seed=7 depth=256 operations={operations}"
        );
        let config = with_disk("load", &words, folder.path(), 4 << 20, option);
        let mut traveller = Traveller::start(config, folder.path());
        travel(&mut traveller);
        let moves = traveller.moves();
        println!("{moves} moves with '{option}'");
        assert!(moves > 2, "{moves}");
        let text = traveller.passed();
        assert!(text.contains("\"errors\":0"), "{text}");
    }
}

#[test]
fn a_driver_of_each_device_goes_on_from_snapshots_at_any_moment() {
    require_kvm!();
    let folder = memory_folder();
    let words = format!("rounds={} block-test=write", rounds().div_ceil(2));
    let mut config = with_disk("devices", &words, folder.path(), 1 << 20, "");
    config.console = SerialConfig::File(folder.path().join("console"));
    config.vsock = Some(VsockConfig {
        cid: 3.try_into().expect("a guest can have it"),
        socket: folder.path().join("vsock"),
    });
    config.balloon = Some("size=1M".parse().expect("it is a balloon"));
    let mut traveller = Traveller::start(config, folder.path());
    travel(&mut traveller);
    let moves = traveller.moves();
    println!("{moves} moves");
    assert!(moves > 2, "{moves}");
    traveller.passed();
}
