//! Forks: machines that go on from where another is, in the same process and in others.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs::{self, File};
use std::io::PipeReader;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use bantam_control::ControlClient;
use bantam_tests::counting::{
    Counters, STOP, config, configured, counting, random_time, read_on, rounds, wait_until,
    wait_until_gone_on,
};
use bantam_tests::{Bantam, Running, require_kvm};
use bantam_vmm::{Command, Controller, ExitReason, Snapshot, SnapshotDisks, SnapshotFiles};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

fn forked(machine: &Controller) -> Snapshot {
    let forked = machine.fork(&SnapshotDisks::Overlays);
    forked.unwrap_or_else(|error| panic!("{error}")).0
}

/// Returns a machine that goes on from `snapshot` and is paused.
fn child(snapshot: &Snapshot) -> (Controller, PipeReader) {
    let (machine, reader) = configured(snapshot.config());
    let restored = machine.restore(snapshot);
    restored.unwrap_or_else(|error| panic!("{error}"));
    (machine, reader)
}

fn resume(machine: &Controller) {
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
}

fn ends_well((machine, mut reader): (Controller, PipeReader), counters: Counters) {
    counters.set(&machine.memory().unwrap(), STOP);
    let reason = machine.wait().unwrap_or_else(|error| panic!("{error}"));
    let mut text = String::new();
    read_on(&mut reader, &mut text);
    assert_eq!(reason, ExitReason::PowerOff, "{text}");
    assert!(text.ends_with("PASS\n"), "{text}");
}

/// Waits until the guest has counted from now on.
fn wait_until_counting(machine: &Controller, counters: Counters, cpus: u64) {
    let memory = machine.memory().unwrap();
    let before = counters.processors(&memory, cpus);
    wait_until_gone_on(counters, &memory, &before);
}

#[test]
fn a_machine_has_forks_and_they_have_forks() {
    require_kvm!();
    const GENERATIONS: usize = 4;
    let (machine, reader, counters) = counting(&config(2, "timer=deadline second=at-once"));
    let mut parent = (machine, reader);
    for _ in 0..GENERATIONS {
        wait_until_counting(&parent.0, counters, 2);
        let before = counters.processors(&parent.0.memory().unwrap(), 2);
        let snapshot = forked(&parent.0);
        let [one, other] = [child(&snapshot), child(&snapshot)];
        drop(snapshot);
        for (child, _) in [&one, &other] {
            let now = counters.processors(&child.memory().unwrap(), 2);
            for (now, before) in now.iter().zip(&before) {
                assert!(now.is_at_or_after(before), "{before:?}, then {now:?}");
            }
            resume(child);
        }
        // Each goes on, and none sees what another counts.
        for (machine, _) in [&parent, &one, &other] {
            wait_until_counting(machine, counters, 2);
        }
        ends_well(other, counters);
        ends_well(parent, counters);
        parent = one;
    }
    ends_well(parent, counters);
}

#[test]
fn a_fork_has_the_memory_of_one_moment_while_four_processors_write() {
    require_kvm!();
    let (machine, reader, counters) =
        counting(&config(4, "timer=local second=at-once others=3 pages=256"));
    for _ in 0..rounds() {
        wait_until_counting(&machine, counters, 4);
        thread::sleep(random_time());
        let snapshot = forked(&machine);
        let child = child(&snapshot);
        resume(&child.0);
        // A page of another moment would be a fault.
        wait_until_counting(&child.0, counters, 4);
        ends_well(child, counters);
    }
    ends_well((machine, reader), counters);
}

#[test]
fn neither_side_sees_what_the_other_writes() {
    require_kvm!();
    const PAGES: [u64; 3] = [0xa0_0000, 0xa0_1000, 0xef_f000];
    let (parent, _reader, _) = counting(&config(1, "timer=local"));
    parent.pause().unwrap();
    let write = |machine: &Controller, value: u64| {
        let memory = machine.memory().unwrap();
        for page in PAGES {
            memory.write_obj(value, GuestAddress(page)).unwrap();
        }
    };
    let read = |machine: &Controller| {
        let memory = machine.memory().unwrap();
        PAGES.map(|page| memory.read_obj::<u64>(GuestAddress(page)).unwrap())
    };
    write(&parent, 1);
    let first = forked(&parent);
    write(&parent, 2);
    let second = forked(&parent);
    write(&parent, 3);
    let (one, _one) = child(&first);
    write(&one, 4);
    let (other, _other) = child(&first);
    let (last, _last) = child(&second);
    assert_eq!(read(&parent), [3; 3]);
    assert_eq!(read(&one), [4; 3]);
    assert_eq!(read(&other), [1; 3]);
    assert_eq!(read(&last), [2; 3]);
}

#[test]
fn a_fork_passes_to_another_process_by_descriptors() {
    require_kvm!();
    let (parent, _reader, counters) = counting(&config(2, "timer=local second=at-once"));
    wait_until_counting(&parent, counters, 2);
    let snapshot = forked(&parent);
    let descriptors = snapshot.descriptors().unwrap();
    // Nobody who has them can change what others go on from.
    for descriptor in &descriptors {
        let file = File::from(descriptor.try_clone().unwrap());
        file.write_all_at(b"other", 0).unwrap_err();
        file.set_len(0).unwrap_err();
    }
    let copies = |count: usize| -> Vec<OwnedFd> {
        let descriptors = descriptors.iter().take(count);
        descriptors.map(|it| it.try_clone().unwrap()).collect()
    };
    for missing in 1..=descriptors.len() {
        let error = Snapshot::from_descriptors(copies(descriptors.len() - missing)).unwrap_err();
        assert!(error.to_string().contains("missing") || error.to_string().contains("no state"));
    }
    let received = Snapshot::from_descriptors(copies(usize::MAX)).unwrap();
    drop((snapshot, parent));
    let child = child(&received);
    resume(&child.0);
    wait_until_counting(&child.0, counters, 2);
    // It has descriptors that it cannot write to, and forks from there.
    let grandchild = self::child(&forked(&child.0));
    resume(&grandchild.0);
    wait_until_counting(&grandchild.0, counters, 2);
    ends_well(child, counters);
    ends_well(grandchild, counters);
}

#[test]
fn a_snapshot_in_files_has_no_descriptors() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let (machine, _reader, _) = counting(&config(1, "timer=local"));
    let files = SnapshotFiles::in_directory(folder.path());
    machine
        .snapshot(bantam_vmm::SnapshotOptions::new(files))
        .unwrap();
    let snapshot = Snapshot::open(folder.path()).unwrap();
    let error = snapshot.descriptors().unwrap_err().to_string();
    assert!(error.contains("by their names"), "{error}");
}

/// A machine in a process of its own, and a folder for its children.
struct Parent {
    running: Running,
    folder: TempDir,
}

impl Parent {
    fn start(bantam: Bantam, text: &str) -> Parent {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("parent.sock");
        let running = bantam.option("--control", &socket).start();
        running.wait_for_output(text);
        Parent { running, folder }
    }

    fn fork(&self, directory: &Path, count: usize) -> Bantam {
        Bantam::new(["fork"])
            .argument(self.folder.path().join("parent.sock"))
            .argument(directory)
            .option("--count", count.to_string())
    }

    fn children(&self) -> PathBuf {
        self.folder.path().join("children")
    }
}

impl Drop for Parent {
    /// Ends all children.
    fn drop(&mut self) {
        for child in fs::read_dir(self.children())
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Ok(mut client) = ControlClient::connect(&child.path().join("control.sock")) {
                let _ = client.execute(Command::Stop);
            }
        }
    }
}

#[test]
fn children_in_other_processes_go_on_when_their_parent_is_killed() {
    require_kvm!();
    const COUNT: usize = 5;
    let parent = Bantam::payload("generation").option("--memory", "512M");
    let parent = Parent::start(parent, "generation ");
    let children = parent.children();
    let ended = parent.fork(&children, COUNT).finish();
    ended.has_status(0);
    parent.running.signal(Signal::SIGKILL);
    let mut ids = Vec::new();
    for number in 1..=COUNT {
        let folder = children.join(number.to_string());
        let output = || fs::read_to_string(folder.join("serial.log")).unwrap_or_default();
        wait_until("the child ends", || output().ends_with("PASS\n"));
        let id = output().lines().next().map(str::to_owned);
        ids.push(id.unwrap());
        let log = fs::read_to_string(folder.join("log")).unwrap();
        assert_eq!(log, "", "child {number}");
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), COUNT, "each has an id of its own: {ids:?}");
    // Their folders are in the way of others.
    let error = parent.fork(&children, 1).finish();
    assert!(error.failed_with_one_line().contains("a child"));
}

#[test]
fn if_a_child_cannot_be_started_none_is_left() {
    require_kvm!();
    let parent = Bantam::payload("hello").append("finish=hang");
    let parent = Parent::start(parent, "PASS\n");
    // The path of a socket has at most 107 bytes, which is enough for nine children.
    let base = parent.folder.path().as_os_str().len();
    let name = "c".repeat(107 - base - "//1/control.sock".len());
    let children = parent.folder.path().join(name);
    let ended = parent.fork(&children, 12).finish();
    assert_eq!(ended.status.code(), Some(1), "{ended}");
    let error = ended.stderr.lines().last().unwrap_or_default();
    assert!(
        error.starts_with("error: cannot start all children"),
        "{ended}"
    );
    assert!(error.contains("child 10"), "{ended}");
    assert_eq!(fs::read_dir(&children).unwrap().count(), 0, "{ended}");
    for line in ended
        .stderr
        .lines()
        .filter(|line| line.starts_with("child "))
    {
        let process = line
            .split_whitespace()
            .nth(3)
            .unwrap()
            .trim_end_matches(',');
        assert!(!Path::new("/proc").join(process).exists(), "{line}");
    }
    // The machine goes on, and can be forked again.
    let ended = parent.fork(&parent.children(), 2).finish();
    ended.has_status(0);
}
