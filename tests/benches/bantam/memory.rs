//! The memory that the monitor takes beside the guest's.

use std::fs;
use std::thread;
use std::time::Duration;

use nix::unistd::Pid;

use crate::boot::{FIRST_LINE, LIMIT, STOP_LIMIT, linux_guest};
use crate::monitors::{Monitor, Monitors};
use crate::process::Process;
use crate::report::{Goal, Peer, Report, Row};

const RUNS: usize = 3;
const MIB: f64 = (1 << 20) as f64;
/// How long the guest waits for input before its monitor's memory is measured.
const SETTLE_TIME: Duration = Duration::from_secs(1);
/// Most bytes that can lie beside guest memory in one mapping: the kernel joins mappings of the
/// same kind that happen to touch.
const MAX_NEIGHBOUR_SIZE: u64 = 8 << 20;

/// Memory of a monitor beside guest memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct MonitorMemory {
    /// Resident memory (Rss): all pages in memory, including those of programs and libraries that
    /// other processes use as well.
    pub resident: u64,
    /// Proportional share of resident memory (Pss): a page that several processes use counts in
    /// parts.
    pub proportional: u64,
}

impl MonitorMemory {
    /// Measures a process that runs a guest with `guest_memory` bytes: all mappings of
    /// `/proc/PID/smaps` count except guest memory, which is the only writable anonymous mapping
    /// that is large enough for it. If that mapping is larger, the rest counts as if it were all
    /// resident.
    ///
    /// # Panics
    ///
    /// If there is not exactly one such mapping.
    pub fn of(process: Pid, guest_memory: u64) -> Self {
        let text = fs::read_to_string(format!("/proc/{process}/smaps"))
            .unwrap_or_else(|error| panic!("cannot read the mappings of a monitor: {error}"));
        let mappings = parse_mappings(&text);
        let (guest, own): (Vec<_>, Vec<_>) = mappings.iter().partition(|mapping| {
            let sizes = guest_memory..=guest_memory + MAX_NEIGHBOUR_SIZE;
            mapping.writable_anonymous && sizes.contains(&mapping.size)
        });
        let [guest] = guest[..] else {
            panic!(
                "there are {} mappings like guest memory:\n{text}",
                guest.len()
            );
        };
        let beyond_guest = guest.size - guest_memory;
        Self {
            resident: beyond_guest + own.iter().map(|mapping| mapping.resident).sum::<u64>(),
            proportional: beyond_guest
                + own.iter().map(|mapping| mapping.proportional).sum::<u64>(),
        }
    }
}

/// One mapping of a process. Sizes are in bytes.
#[derive(Debug, Default)]
struct Mapping {
    writable_anonymous: bool,
    size: u64,
    resident: u64,
    proportional: u64,
}

/// Reads the format of `/proc/PID/smaps` (proc_pid_smaps(5)): for each mapping a line
/// `FIRST-LAST PERMISSIONS OFFSET DEVICE INODE [PATH]`, then lines `NAME: SIZE kB`.
fn parse_mappings(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.as_slice(), mappings.last_mut()) {
            ([name, size, "kB"], Some(mapping)) => {
                let size = size.parse::<u64>().expect("sizes are numbers") << 10;
                match *name {
                    "Size:" => mapping.size = size,
                    "Rss:" => mapping.resident = size,
                    "Pss:" => mapping.proportional = size,
                    _ => {}
                }
            }
            ([range, permissions, _, _, inode, path @ ..], _) if range.contains('-') => {
                mappings.push(Mapping {
                    writable_anonymous: permissions.starts_with("rw")
                        && *inode == "0"
                        && path.is_empty(),
                    ..Mapping::default()
                });
            }
            _ => {}
        }
    }
    mappings
}

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let run = |monitor| {
        // The guest waits for a command, which never comes.
        let guest = linux_guest(monitors, "shell");
        let mut process = Process::start(monitors.command(monitor, &guest));
        process.wait_for(FIRST_LINE, LIMIT);
        thread::sleep(SETTLE_TIME);
        let memory = MonitorMemory::of(process.pid(), guest.memory_mib << 20);
        process.stop(STOP_LIMIT);
        memory
    };
    let turns: Vec<[MonitorMemory; 2]> = (0..RUNS).map(|_| Monitor::BOTH.map(run)).collect();

    let mut add = |name: &str, of: fn(&MonitorMemory) -> u64, goal| {
        let mib = |memory| of(memory) as f64 / MIB;
        report.add(Row {
            name: name.to_owned(),
            unit: "MiB",
            bantam: turns.iter().map(|[bantam, _]| mib(bantam)).collect(),
            peer: Some(Peer::monitor(
                turns.iter().map(|[_, qemu]| mib(qemu)).collect(),
            )),
            goal,
        });
    };
    add(
        "memory: monitor with a Linux guest, without guest memory, Rss",
        |memory| memory.resident,
        Goal::AtMost(3.9),
    );
    add(
        "memory: monitor with a Linux guest, without guest memory, Pss",
        |memory| memory.proportional,
        Goal::None,
    );
}
