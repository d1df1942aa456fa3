//! Snapshots: how long it takes to write one, to go on from one, and to fork a machine.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::counting::{Counters, config, configured, counting};
use bantam_tests::payload;
use bantam_vmm::{
    Controller, Snapshot, SnapshotBase, SnapshotDisks, SnapshotFiles, SnapshotOptions,
    SnapshotTaken,
};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vm_memory::{Bytes, GuestAddress, MmapRegion};

use crate::monitors::{Guest, Monitor, Monitors};
use crate::process::Process;
use crate::report::{Goal, Peer, Report, Row};
use crate::statistics::Samples;

const RUNS: usize = 11;
const LIMIT: Duration = Duration::from_secs(30);
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Memory above the guest itself.
const FREE: u64 = 16 * MIB;
/// Size of a machine whose snapshots are timed.
const MEMORY: u64 = 128 * MIB;
/// Pages of a differential snapshot.
const CHANGED_PAGES: u64 = 1000;
/// Size of a machine that is forked, and how much of it is touched.
const FORKED: u64 = 512 * MIB;
const TOUCHED: u64 = 50 * MIB;
const FORKS: usize = 100;
const MANY_FORKS: usize = 1000;

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    restore(monitors, report);
    let folder = monitors.folder().join("snapshot");
    fs::create_dir_all(&folder).expect("the folder can be written to");
    write(&folder, report);
    fork(report);
    fork_into_processes(monitors, report);
    fs::remove_dir_all(&folder).expect("it was made above");
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn add(report: &mut Report, name: String, samples: Samples, peer: Option<Peer>, goal: Goal) {
    report.add(Row {
        name,
        unit: "ms",
        bantam: samples,
        peer,
        goal,
    });
}

/// From the start of the process until the guest has written a first byte.
fn restore(monitors: &Monitors, report: &mut Report) {
    for memory_mib in [128, 4096] {
        let folder = monitors.folder().join("restored");
        let socket = monitors.folder().join("restored.sock");
        let guest = Guest {
            kernel: payload("generation"),
            memory_mib,
            ..Guest::default()
        };
        let mut command = monitors.command(Monitor::Bantam, &guest);
        command.arg("--control").arg(&socket);
        let mut process = Process::start(command);
        process.wait_for("generation ", LIMIT);
        let taken = Command::new(monitors.bantam())
            .arg("snapshot")
            .args([&socket, &folder])
            .arg("--stop")
            .output();
        assert!(taken.is_ok_and(|it| it.status.success()), "no snapshot");
        process.wait(LIMIT);
        let time = |_| {
            let mut command = Command::new(monitors.bantam());
            command.arg("restore").arg(&folder);
            let mut process = Process::start(command);
            let time = process.wait_for("g", LIMIT);
            process.wait_for("generation ", LIMIT);
            process.wait(LIMIT);
            milliseconds(time)
        };
        let samples: Samples = (0..RUNS).map(time).collect();
        fs::remove_dir_all(&folder).expect("it was made above");
        let peer = Peer::named("bare KVM", bare_kvm_times(memory_mib * MIB));
        let name = format!(
            "restore: from the start of the process to the guest's first byte, {memory_mib} MiB; beside the \
             bare calls to KVM"
        );
        add(report, name, samples, Some(peer), Goal::AtMost(6.0));
    }
}

/// A machine with `memory` bytes, of which `touched` are not zero.
fn machine(memory: u64, touched: u64, logs: bool) -> (Controller, Counters) {
    let mut config = config(1, "timer=local");
    config.memory = format!("{}M", memory / MIB).parse().expect("it is a size");
    config.track_dirty_pages = logs;
    let (machine, _reader, counters) = counting(&config);
    touch(&machine, (0..touched / PAGE).map(|page| FREE + page * PAGE));
    (machine, counters)
}

/// Writes to the pages at these addresses.
fn touch(machine: &Controller, pages: impl Iterator<Item = u64>) {
    let memory = machine.memory().expect("it runs");
    for page in pages {
        let bytes = [page as u8 | 1; PAGE as usize];
        let written = memory.write_slice(&bytes, GuestAddress(page));
        written.expect("the machine has so much memory");
    }
}

fn take(machine: &Controller, folder: &Path, base: Option<&Path>) -> (SnapshotTaken, Duration) {
    fs::create_dir_all(folder).expect("the folder can be written to");
    let options = SnapshotOptions {
        base: base.map(|base| SnapshotBase::Files(SnapshotFiles::in_directory(base))),
        ..SnapshotOptions::new(SnapshotFiles::in_directory(folder))
    };
    let started = Instant::now();
    let taken = machine.snapshot(options);
    let taken = taken.unwrap_or_else(|error| panic!("{error}"));
    (taken, started.elapsed())
}

/// Full and differential snapshots.
fn write(folder: &Path, report: &mut Report) {
    let (machine, _) = machine(MEMORY, MEMORY - FREE, true);
    let (mut full, mut copies, mut changes, mut pauses) = (vec![], vec![], vec![], vec![]);
    let place = |name: &str| folder.join(name);
    for _ in 0..RUNS {
        let copy = place("copy");
        let started = Instant::now();
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=1M", "conv=fdatasync", "status=none"]);
        dd.arg(format!("count={}", MEMORY / MIB));
        let status = dd.arg(format!("of={}", copy.display())).status();
        assert!(status.is_ok_and(|status| status.success()), "dd fails");
        copies.push(milliseconds(started.elapsed()) / 2.0 + 20.0);
        fs::remove_file(&copy).expect("dd has made it");
        // Neither does a snapshot have to wait until the file system has freed those of the round before.
        for name in ["base", "next"] {
            let _ = fs::remove_dir_all(place(name));
        }

        let (_, time) = take(&machine, &place("base"), None);
        full.push(milliseconds(time));
        let stride = (MEMORY - FREE) / PAGE / CHANGED_PAGES;
        touch(
            &machine,
            (0..CHANGED_PAGES).map(|page| FREE + page * stride * PAGE),
        );
        let (taken, time) = take(&machine, &place("next"), Some(&place("base")));
        assert!(taken.pages >= CHANGED_PAGES && taken.pages < 2 * CHANGED_PAGES);
        changes.push(milliseconds(time));
        pauses.push(milliseconds(taken.paused_for));
    }
    let peer = Peer::named("half of dd's time and 20 ms", Samples::new(copies));
    let name = "snapshot: full, 128 MiB".to_owned();
    let goal = Goal::RatioAtMost(1.0);
    add(report, name, Samples::new(full), Some(peer), goal);
    let name = "snapshot: differential, 1,000 pages".to_owned();
    add(
        report,
        name,
        Samples::new(changes),
        None,
        Goal::AtMost(25.0),
    );
    let name = "snapshot: differential, 1,000 pages, pause of the guest".to_owned();
    add(report, name, Samples::new(pauses), None, Goal::AtMost(10.0));
}

/// The calls to KVM for a virtual machine with a vCPU, interrupt controllers and a memory slot.
fn bare_kvm(kvm: &Kvm, memory: u64, size: u64) -> (kvm_ioctls::VmFd, kvm_ioctls::VcpuFd) {
    let vm = kvm.create_vm().expect("KVM makes a virtual machine");
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: size,
        userspace_addr: memory,
    };
    // SAFETY: the caller keeps the memory mapped, and no vCPU runs.
    unsafe { vm.set_user_memory_region(slot) }.expect("KVM takes memory");
    vm.create_irq_chip()
        .expect("KVM makes interrupt controllers");
    let vcpu = vm.create_vcpu(0).expect("KVM makes a vCPU");
    (vm, vcpu)
}

/// Returns the milliseconds that these calls take for a machine with `size` bytes of memory.
fn bare_kvm_times(size: u64) -> Samples {
    let kvm = Kvm::new().expect("there is KVM");
    let memory = MmapRegion::<()>::new(size as usize).expect("the host maps memory");
    let time = |_| {
        let started = Instant::now();
        let _machine = bare_kvm(&kvm, memory.as_ptr() as u64, size);
        milliseconds(started.elapsed())
    };
    (0..RUNS).map(time).collect()
}

/// Makes children beside those that there are, and as many bare machines in turns, as both take longer the more machines a
/// process has. `memory` is mapped in this process, as large as theirs. Adds a row.
fn forks_beside_bare_kvm(
    snapshot: &Snapshot,
    memory: u64,
    children: &mut Vec<Controller>,
    name: String,
    report: &mut Report,
) {
    let kvm = Kvm::new().expect("there is KVM");
    let (mut machines, mut times, mut limits) = (vec![], vec![], vec![]);
    for _ in 0..FORKS {
        let started = Instant::now();
        machines.push(bare_kvm(&kvm, memory, FORKED));
        limits.push(1.5 * milliseconds(started.elapsed()) + 0.3);
        let started = Instant::now();
        children.push(child(snapshot));
        times.push(milliseconds(started.elapsed()));
    }
    let peer = Peer::named("1.5 of bare KVM's and 0.3 ms", Samples::new(limits));
    let goal = Goal::RatioAtMost(1.0);
    add(report, name, Samples::new(times), Some(peer), goal);
}

/// Host memory of children, and of as many bare machines.
fn memory_of_forks(snapshot: &Snapshot, memory: u64, report: &mut Report) {
    // The host takes its time to have the memory of earlier machines back.
    thread::sleep(Duration::from_millis(500));
    let kvm = Kvm::new().expect("there is KVM");
    let before = available_memory();
    let machines: Vec<_> = (0..FORKS).map(|_| bare_kvm(&kvm, memory, FORKED)).collect();
    let between = available_memory();
    let children: Vec<_> = (0..FORKS).map(|_| child(snapshot)).collect();
    let after = available_memory();
    drop((machines, children));
    let each = |kib: f64| Samples::new(vec![kib / FORKS as f64]);
    report.add(Row {
        name: "fork: host memory of a child that is paused, 512 MiB; beside the bare calls to KVM"
            .to_owned(),
        unit: "KiB",
        bantam: each(between - after),
        peer: Some(Peer::named("bare KVM", each(before - between))),
        goal: Goal::AtMost(350.0),
    });
}

fn available_memory() -> f64 {
    let text = fs::read_to_string("/proc/meminfo").expect("the host says what it has");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.and_then(|kib| kib.parse().ok())
        .expect("it is a number")
}

/// Forks of a machine in its own process.
fn fork(report: &mut Report) {
    let (parent, _) = machine(FORKED, TOUCHED, false);
    let fork = || {
        let forked = parent.fork(&SnapshotDisks::Unprotected);
        forked.unwrap_or_else(|error| panic!("{error}"))
    };
    let (snapshot, first_pause) = fork();
    let mut pauses = Vec::new();
    for _ in 0..RUNS {
        touch(
            &parent,
            (0..CHANGED_PAGES).map(|page| FREE + page * 3 * PAGE),
        );
        pauses.push(milliseconds(fork().1));
    }
    parent.pause().unwrap_or_else(|error| panic!("{error}"));

    let mapping = parent.memory().expect("it is paused");
    let region = mapping.regions().next().expect("it has memory");
    let (memory, mut children) = (region.host_address, vec![]);
    let name = "fork: a child in the process of its parent, 512 MiB".to_owned();
    forks_beside_bare_kvm(&snapshot, memory, &mut children, name, report);
    children.resize_with(MANY_FORKS - FORKS, || child(&snapshot));
    let name =
        format!("fork: the last of {MANY_FORKS} children in the process of their parent, 512 MiB");
    forks_beside_bare_kvm(&snapshot, memory, &mut children, name, report);
    children.clear();
    memory_of_forks(&snapshot, memory, report);
    let first = Samples::new(vec![milliseconds(first_pause)]);
    let name = "fork: first pause of the parent, 50 MiB touched".to_owned();
    add(report, name, first, None, Goal::AtMost(10.0));
    let name = "fork: later pauses of the parent, 1,000 pages written".to_owned();
    add(report, name, Samples::new(pauses), None, Goal::AtMost(10.0));
}

/// Forks in processes of their own, whose guests are idle.
fn fork_into_processes(monitors: &Monitors, report: &mut Report) {
    let socket = monitors.folder().join("parent.sock");
    let children = monitors.folder().join("children");
    let guest = Guest {
        kernel: payload("hello"),
        memory_mib: FORKED / MIB,
        command_line: "finish=hang".to_owned(),
        ..Guest::default()
    };
    let mut command = monitors.command(Monitor::Bantam, &guest);
    command.arg("--control").arg(&socket);
    let mut parent = Process::start(command);
    parent.wait_for("PASS", LIMIT);
    let started = Instant::now();
    let output = Command::new(monitors.bantam())
        .arg("fork")
        .args([&socket, &children])
        .args(["--count", &FORKS.to_string()])
        .output()
        .expect("the monitor can be started");
    let time = milliseconds(started.elapsed()) / FORKS as f64;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    let process = |line: &str| -> i32 {
        let words = line.split("process ").nth(1);
        let number = words.and_then(|words| words.split(',').next());
        number
            .and_then(|number| number.parse().ok())
            .expect("a line has the process of a child")
    };
    let processes: Vec<_> = text.lines().map(process).collect();
    let memory = |process: &i32| {
        let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"));
        let text = text.expect("the child runs");
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib: Option<f64> = line
            .and_then(|line| line.split_whitespace().next())
            .and_then(|kib| kib.parse().ok());
        kib.expect("it is a number") / 1024.0
    };
    let memory: Samples = processes.iter().map(memory).collect();
    for process in processes {
        kill(Pid::from_raw(process), Signal::SIGKILL).expect("the child runs");
    }
    parent.stop(LIMIT);
    fs::remove_dir_all(&children).expect("it was made above");
    let name = format!("fork: a child in a process of its own, 512 MiB, of {FORKS}");
    add(
        report,
        name,
        vec![time].into_iter().collect(),
        None,
        Goal::AtMost(8.0),
    );
    report.add(Row {
        name: format!("fork: memory of a child in a process of its own, Pss, of {FORKS}"),
        unit: "MiB",
        bantam: memory,
        peer: None,
        goal: Goal::AtMost(1.5),
    });
}

/// A machine that goes on from `snapshot` and is paused.
fn child(snapshot: &Snapshot) -> Controller {
    let (machine, _reader) = configured(snapshot.config());
    machine
        .restore(snapshot)
        .unwrap_or_else(|error| panic!("{error}"));
    machine
}
