//! The files of snapshots: what a monitor that is killed leaves of them, a full disk, damage, and several machines that go
//! on from the same ones.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Bantam, Ended, Running, memory_folder, monitor, require_kvm, require_namespaces, with_mounts,
};
use bantam_vmm::{Snapshot, SnapshotDescription, SnapshotFiles};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const PAGE: usize = 4096;
/// What the guest fills before it waits for input, in MiB.
const FILLED_MIB: u64 = 32;
/// Pages that differ between two machines that have filled their memory: those of their stacks, clocks and devices.
const OTHER_PAGES: usize = 200;
/// How often a monitor is killed, at as many moments of a snapshot.
const KILLS: u32 = 12;

/// How long a machine may take to go on.
const PATIENCE: Duration = Duration::from_secs(20);

/// A folder with a folder for a snapshot.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(memory_folder());
        fs::create_dir(folder.snapshot()).expect("there is room");
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn snapshot(&self) -> PathBuf {
        self.path("snapshot")
    }

    fn control(&self) -> PathBuf {
        self.path("control.sock")
    }

    /// Starts `machine`, whose guest fills memory and then waits for input.
    fn filled(&self, machine: Bantam) -> Running {
        let machine = machine
            .option("--memory", "64M")
            .option("--balloon", format!("size={FILLED_MIB}M"))
            .option("--control", self.control())
            .stdin(Stdio::piped())
            .start();
        machine.wait_for_output("filled");
        machine
    }

    fn balloon(&self) -> Running {
        self.filled(Bantam::payload("balloon"))
    }

    /// Begins `bantam snapshot` of the machine with the control socket.
    fn take(&self, directory: &Path, options: &[&str]) -> std::process::Child {
        let mut command = Command::new(monitor());
        command.arg("snapshot").arg(self.control()).arg(directory);
        command.args(options);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the program starts")
    }

    fn taken(&self, directory: &Path, options: &[&str]) -> Output {
        let output = self.take(directory, options).wait_with_output();
        output.expect("it is a child")
    }

    /// Takes a snapshot of a machine into the folder for it.
    fn taken_well(&self, options: &[&str]) {
        let output = self.taken(&self.snapshot(), options);
        assert!(output.status.success(), "{output:?}");
    }

    fn memory(&self) -> Vec<u8> {
        fs::read(SnapshotFiles::in_directory(&self.snapshot()).memory).expect("it is there")
    }
}

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("it is there");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("it can be read").file_name();
    let mut names: Vec<_> = entries
        .map(|entry| name(entry).to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
}

/// Lets the guest take its remaining steps; it then has found its memory as it had filled it.
fn ends_well(mut machine: Running, steps: &[&str]) {
    for step in steps {
        machine.wait_for_output(step);
        machine.send(b"\n");
    }
    machine.wait().passed();
}

const ALL_STEPS: [&str; 4] = ["filled", "inflated", "refilled", "reported"];

fn restore(directory: &Path) -> Bantam {
    Bantam::new(["restore"]).argument(directory)
}

#[test]
fn a_monitor_that_is_killed_leaves_a_complete_snapshot_or_none() {
    require_kvm!();
    let folder = Folder::new();
    let directory = folder.snapshot();
    let machine = folder.balloon();
    let started = Instant::now();
    folder.taken_well(&[]);
    let time = started.elapsed();
    drop(machine);
    let mut expected = folder.memory();
    let id = || {
        SnapshotDescription::read(&SnapshotFiles::in_directory(&directory))
            .map(|it| it.facts.id)
            .expect("a state file is always complete")
    };
    let (mut kept, mut replaced) = (0, 0);
    for sample in 0..KILLS {
        let before = id();
        let machine = folder.balloon();
        let mut client = folder.take(&directory, &[]);
        if sample == KILLS - 1 {
            client.wait().expect("it is a child");
        } else {
            thread::sleep(time * sample * 3 / 2 / KILLS);
        }
        machine.signal(Signal::SIGKILL);
        drop(machine);
        let output = client.wait_with_output().expect("it is a child");
        match Snapshot::open(&directory) {
            Ok(snapshot) if snapshot.facts().id == before => {
                assert!(!output.status.success(), "{output:?}");
                assert!(folder.memory() == expected, "the earlier one has changed");
                kept += 1;
            }
            Ok(_) => {
                let found = folder.memory();
                let pages = found.chunks(PAGE).zip(expected.chunks(PAGE));
                let others = pages.filter(|(found, expected)| found != expected).count();
                assert!(others < OTHER_PAGES, "{others} pages are others");
                expected = found;
                replaced += 1;
            }
            // It was killed after one of the files was put in its place.
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("it is that of another snapshot"), "{error}");
                let _machine = folder.balloon();
                folder.taken_well(&[]);
                expected = folder.memory();
            }
        }
    }
    println!("{kept} of {KILLS} kept, {replaced} replaced");
    assert!(kept > 0 && replaced > 0, "{kept} kept, {replaced} replaced");

    // The next one removes what is left of one that was killed.
    let machine = folder.balloon();
    fs::write(directory.join("memory.new"), "x").expect("there is room");
    folder.taken_well(&["--stop"]);
    drop(machine);
    assert_eq!(names(&directory), ["memory", "state"]);
    let machine = restore(&directory).stdin(Stdio::piped()).start();
    continue_from_filled(machine);
}

/// Lets a guest go on that waits after it has filled its memory.
fn continue_from_filled(mut machine: Running) {
    machine.send(b"\n");
    ends_well(machine, &ALL_STEPS[1..]);
}

#[test]
fn a_full_disk_fails_a_snapshot_and_nothing_else() {
    require_kvm!();
    require_namespaces!();
    let folder = Folder::new();
    let directory = folder.snapshot();
    // Room for one snapshot, and not for another before the first is removed.
    let mount = format!("mount -t tmpfs -o size=50M tmpfs {}", directory.display());
    let machine = folder.filled(Bantam::payload("balloon").launcher(with_mounts(&mount)));
    folder.taken_well(&[]);
    let root = PathBuf::from(format!("/proc/{}/root", machine.pid()));
    let inside = root.join(directory.strip_prefix("/").expect("it is absolute"));
    let id = |directory: &Path| {
        let snapshot = Snapshot::open(directory).unwrap_or_else(|error| panic!("{error}"));
        snapshot.facts().id
    };
    let before = id(&inside);
    let memory = fs::read(inside.join("memory")).expect("it is there");
    for _ in 0..2 {
        let output = folder.taken(&directory, &[]);
        assert!(!output.status.success(), "{output:?}");
        let reason = String::from_utf8(output.stderr).expect("it is text");
        assert_eq!(reason.lines().count(), 1, "{reason}");
        assert!(reason.starts_with("error: cannot write '"), "{reason}");
        assert!(reason.contains("No space left on device"), "{reason}");
        assert_eq!(names(&inside), ["memory", "state"]);
        assert_eq!(id(&inside), before);
        assert!(fs::read(inside.join("memory")).expect("it is there") == memory);
    }
    // With room again, the machine that went on can be saved.
    fs::remove_file(inside.join("memory")).expect("it is there");
    folder.taken_well(&[]);
    assert_ne!(id(&inside), before);
    ends_well(machine, &ALL_STEPS);
}

/// Writes a copy of `bytes` that `change` has changed to the file `name` of the snapshot, and returns why it is refused.
fn refused(
    directory: &Path,
    name: &str,
    bytes: &[u8],
    change: impl FnOnce(&mut Vec<u8>),
) -> String {
    let mut changed = bytes.to_vec();
    change(&mut changed);
    let path = directory.join(name);
    fs::write(&path, &changed).expect("there is room");
    let ended: Ended = restore(directory).finish();
    fs::write(&path, bytes).expect("there is room");
    ended.failed_with_one_line().to_owned()
}

#[test]
fn damaged_files_are_refused_in_one_line() {
    require_kvm!();
    let folder = Folder::new();
    let directory = folder.snapshot();
    let machine = Bantam::payload("generation")
        .append("changes=1 finish=poweroff")
        .option("--memory", "16M")
        .option("--control", folder.control())
        .start();
    machine.wait_for_output("generation ");
    folder.taken_well(&["--stop"]);
    drop(machine);

    let state = fs::read(directory.join("state")).expect("it is there");
    let refused_state =
        |change: &dyn Fn(&mut Vec<u8>)| refused(&directory, "state", &state, change);
    for len in [0, 4, 8, 11, 12, 40, state.len() / 2, state.len() - 1] {
        let reason = refused_state(&|bytes| bytes.truncate(len));
        assert!(reason.contains("/state'"), "{len} bytes: {reason}");
    }
    for index in 0..12 {
        let position = index * state.len() / 12;
        let reason = refused_state(&|bytes| bytes[position] ^= 1 << (index % 8));
        assert!(reason.contains("/state'"), "byte {position}: {reason}");
    }
    let reason = refused_state(&|bytes| bytes[8] += 1);
    assert!(reason.contains("use the program that wrote it"), "{reason}");

    let memory = fs::read(directory.join("memory")).expect("it is there");
    let refused_memory =
        |change: &dyn Fn(&mut Vec<u8>)| refused(&directory, "memory", &memory, change);
    let reason = refused_memory(&|bytes| bytes.truncate(memory.len() - 1));
    assert!(reason.contains("bytes instead of"), "{reason}");
    let reason = refused_memory(&|bytes| bytes[memory.len() - PAGE] ^= 1);
    assert!(reason.contains("its seal is missing"), "{reason}");
    let reason = refused_memory(&|bytes| bytes[memory.len() - PAGE + 12] ^= 1);
    assert!(
        reason.contains("it is that of another snapshot"),
        "{reason}"
    );

    fs::remove_file(directory.join("memory")).expect("it is there");
    let ended = restore(&directory).finish();
    let reason = ended.failed_with_one_line();
    assert!(reason.contains("No such file or directory"), "{reason}");
    fs::write(directory.join("memory"), &memory).expect("there is room");
    // It was the damage that was refused.
    let ended = restore(&directory).finish();
    ended.passed();
}

/// What a process has of the memory file that it maps, in KiB: shared and its own.
fn mapped(machine: &Running, file: &Path) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{}/smaps", machine.pid())).expect("it runs");
    let file = file.to_str().expect("the test has chosen the name");
    let (mut shared, mut private, mut is_it) = (0, 0, false);
    for line in text.lines() {
        let is_field = line
            .split_once(' ')
            .is_some_and(|(name, _)| name.ends_with(':'));
        if !is_field {
            is_it = line.ends_with(file);
            continue;
        }
        let value = |name: &str| -> u64 {
            let rest = line.strip_prefix(name).filter(|_| is_it);
            rest.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
                .unwrap_or(0)
        };
        // Those of a file in memory are always dirty.
        shared += value("Shared_Clean:") + value("Shared_Dirty:");
        private += value("Private_Dirty:");
    }
    (shared, private)
}

#[test]
fn two_processes_go_on_from_a_snapshot_with_one_memory_and_disks_of_their_own() {
    require_kvm!();
    let folder = Folder::new();
    let directory = folder.snapshot();
    let image = folder.path("disk.img");
    fs::File::create(&image)
        .and_then(|file| file.write_all_at(&[1; 1 << 20], 0))
        .expect("there is room");
    let machine = folder.filled(Bantam::payload("balloon").disk(&image, ""));
    folder.taken_well(&["--stop"]);
    drop(machine);

    let machine = |number: u32| {
        let socket = folder.path(&format!("{number}.sock"));
        let started = restore(&directory)
            .option("--control", &socket)
            .stdin(Stdio::piped());
        (started, socket)
    };
    let wait_until_it_runs = |socket: &Path| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut query = Command::new(monitor());
            let output = query.arg("control").arg(socket).arg("query").output();
            let output = output.expect("the program starts");
            if String::from_utf8_lossy(&output.stdout).contains("running") {
                return;
            }
            assert!(Instant::now() < deadline, "{output:?}");
            thread::sleep(Duration::from_millis(20));
        }
    };
    let (first, socket) = machine(1);
    let first = first.start();
    wait_until_it_runs(&socket);
    let second = restore(&directory).finish();
    let reason = second.failed_with_one_line();
    assert!(reason.contains("disk.img"), "{reason}");
    drop(first);

    let machines = [1, 2].map(|number| {
        let (machine, socket) = machine(number);
        let overlays = folder.path(&format!("overlays{number}"));
        let machine = machine.option("--overlays", overlays).start();
        wait_until_it_runs(&socket);
        machine
    });
    let memory = directory.join("memory");
    for machine in &machines {
        let deadline = Instant::now() + PATIENCE;
        // A page is shared once both guests have touched it.
        while mapped(machine, &memory).0 == 0 {
            assert!(Instant::now() < deadline, "no memory is shared");
            thread::sleep(Duration::from_millis(20));
        }
        let (_, private) = mapped(machine, &memory);
        assert!(private < 4 << 10, "{private} KiB of its own");
    }
    machines.into_iter().for_each(continue_from_filled);
}
