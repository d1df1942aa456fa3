//! A hundred idle machines at the same time, first each in its own process, and then all in one
//! process; and what is left of them when they have ended.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{interface_exists, payload, tap_name};
use bantam_vmm::Controller;
use bantam_vmm::config::{MachineConfig, MemorySize, NetConfig, SerialConfig};
use bantam_vmm::host::{can_administer_network, open_tun};

use crate::memory::MonitorMemory;
use crate::monitors::{Guest, Monitor, Monitors, Network};
use crate::process::Process;
use crate::report::{Goal, Peer, Report, Row};
use crate::statistics::Samples;

const MACHINES: usize = 100;
/// How many of them have a network interface, if taps can be created.
const MACHINES_WITH_TAP: usize = 5;
const MEMORY_MIB: u64 = 32;
/// What the payload prints before it halts.
const READY: &str = "PASS";
const LIMIT: Duration = Duration::from_secs(60);
/// How long the kernel may take to forget a thread or an interface that has ended.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
const MIB: f64 = (1 << 20) as f64;

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let taps = taps();
    measure_processes(monitors, &taps, report);
    measure_library(&taps, report);
}

/// Returns names of taps for some machines; none if this process cannot create taps.
fn taps() -> Vec<String> {
    if can_administer_network() && open_tun().is_ok() {
        (0..MACHINES_WITH_TAP).map(|_| tap_name()).collect()
    } else {
        eprintln!("no machine has a network here: creating taps takes CAP_NET_ADMIN");
        Vec::new()
    }
}

fn measure_processes(monitors: &Monitors, taps: &[String], report: &mut Report) {
    let before = Resources::of_this_process();
    let bantam = run_processes(monitors, Monitor::Bantam, taps);
    let left = Resources::left_after(&before, taps);
    let qemu = run_processes(monitors, Monitor::Qemu, &[]);

    report.add(Row {
        name: format!("many: {MACHINES} processes, start to idle guest, each"),
        unit: "ms",
        bantam: bantam.times,
        peer: Some(Peer::monitor(qemu.times)),
        goal: Goal::None,
    });
    report.add(Row {
        name: format!("many: {MACHINES} processes, memory without guest memory, Pss, each"),
        unit: "MiB",
        bantam: bantam.memory,
        peer: Some(Peer::monitor(qemu.memory)),
        goal: Goal::None,
    });
    report.add(Row {
        name: leak_row_name("processes", taps),
        unit: "leaks",
        bantam: Samples::new(vec![left as f64]),
        peer: None,
        goal: Goal::AtMost(0.0),
    });
}

fn leak_row_name(what: &str, taps: &[String]) -> String {
    let taps = taps.len();
    format!("many: {MACHINES} {what}, {taps} taps: descriptors, threads, taps left")
}

/// The cost of each process.
struct ProcessCosts {
    /// Milliseconds from the start of the process to the guest being idle.
    times: Samples,
    /// MiB beside guest memory, with all machines alive.
    memory: Samples,
}

fn run_processes(monitors: &Monitors, monitor: Monitor, taps: &[String]) -> ProcessCosts {
    let mut taps_left = taps.iter();
    let mut times = Vec::new();
    let mut processes = Vec::new();
    for _ in 0..MACHINES {
        let guest = Guest {
            kernel: payload("hello"),
            command_line: "finish=hang".to_owned(),
            memory_mib: MEMORY_MIB,
            disk: None,
            idle_disks: Vec::new(),
            network: taps_left.next().cloned().map(Network::Tap),
            tracks_dirty_pages: false,
        };
        let mut process = Process::start(monitors.command(monitor, &guest));
        times.push(process.wait_for(READY, LIMIT).as_secs_f64() * 1000.0);
        processes.push(process);
    }
    assert_taps_exist(taps);
    let memory = processes
        .iter()
        .map(|process| MonitorMemory::of(process.pid(), MEMORY_MIB << 20).proportional as f64 / MIB)
        .collect();
    for process in processes {
        process.stop(LIMIT);
    }
    ProcessCosts {
        times: Samples::new(times),
        memory,
    }
}

fn measure_library(taps: &[String], report: &mut Report) {
    let before = Resources::of_this_process();
    let mut taps_left = taps.iter();
    let mut start_times = Vec::new();
    let mut machines = Vec::new();
    for _ in 0..MACHINES {
        let config = idle_machine(taps_left.next());
        let started = Instant::now();
        let machine = Controller::new()
            .and_then(|machine| {
                machine.configure(config)?;
                machine.start()?;
                Ok(machine)
            })
            .unwrap_or_else(|error| panic!("cannot start a machine: {error}"));
        start_times.push(started.elapsed().as_secs_f64() * 1000.0);
        machines.push(machine);
    }
    assert_taps_exist(taps);
    let stop_times = machines.into_iter().map(|machine| {
        let started = Instant::now();
        machine.stop();
        machine
            .wait()
            .unwrap_or_else(|error| panic!("a machine failed: {error}"));
        started.elapsed().as_secs_f64() * 1000.0
    });
    let stop_times: Samples = stop_times.collect();
    let left = Resources::left_after(&before, taps);

    let mut add = |name, unit, bantam, goal| {
        report.add(Row {
            name,
            unit,
            bantam,
            peer: None,
            goal,
        });
    };
    add(
        format!("many: {MACHINES} machines in one process, start, each"),
        "ms",
        Samples::new(start_times),
        Goal::None,
    );
    add(
        format!("many: {MACHINES} machines in one process, stop, each"),
        "ms",
        stop_times,
        Goal::None,
    );
    add(
        leak_row_name("machines in one process", taps),
        "leaks",
        Samples::new(vec![left as f64]),
        Goal::AtMost(0.0),
    );
}

fn idle_machine(tap: Option<&String>) -> MachineConfig {
    let mut config = MachineConfig::new(payload("hello"));
    config.cmdline = Some("finish=hang".to_owned());
    config.memory = format!("{MEMORY_MIB}M")
        .parse::<MemorySize>()
        .expect("it is a size of memory");
    config.serial = SerialConfig::None;
    config.rng = None;
    config.nets = tap
        .map(|tap| {
            format!("tap={tap}")
                .parse::<NetConfig>()
                .expect("it is a network device")
        })
        .into_iter()
        .collect();
    config
}

fn assert_taps_exist(taps: &[String]) {
    for tap in taps {
        assert!(
            interface_exists(tap),
            "a machine runs without its tap '{tap}'"
        );
    }
}

/// The resources of this process.
#[derive(Debug, PartialEq, Eq)]
struct Resources {
    descriptors: usize,
    threads: usize,
}

impl Resources {
    fn of_this_process() -> Self {
        let count = |folder| fs::read_dir(folder).expect("/proc is there").count();
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
        }
    }

    /// Returns the number of descriptors and threads in excess of `before`, plus the taps that
    /// still exist.
    fn left_after(before: &Self, taps: &[String]) -> usize {
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let now = Self::of_this_process();
            let left = now.descriptors.saturating_sub(before.descriptors)
                + now.threads.saturating_sub(before.threads)
                + taps.iter().filter(|tap| interface_exists(tap)).count();
            if left == 0 || Instant::now() > deadline {
                return left;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
