//! Runs of the payload `load`, which drives a device at full speed from inside a guest.

use std::time::Duration;

use serde::Deserialize;

use crate::monitors::{Guest, Monitor, Monitors};
use crate::process::Process;
use crate::statistics::Samples;
use bantam_tests::payload;

/// How often each load is run under each monitor.
pub const RUNS: usize = 5;
/// What the payload prints before the first operation.
const READY: &str = "load: ready";
/// What the payload prints at its end, after its line of JSON.
const DONE: &str = "\nPASS";
/// Time limit for a load of a second.
const LIMIT: Duration = Duration::from_secs(20);
/// How long a monitor's threads wait for a CPU at most, in a second, on an otherwise idle host.
const MAX_CPU_WAIT: Duration = Duration::from_millis(100);
const MEMORY_MIB: u64 = 128;

/// The result of a load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Operations.
    pub operations: f64,
    /// Operations a second.
    pub operations_per_second: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Median latency of an operation in nanoseconds, if it is known.
    pub median_latency: Option<f64>,
    /// CPU time of the monitor's threads that serve devices.
    pub device_cpu: Duration,
    /// How long threads of the monitor waited for a CPU.
    cpu_wait: Duration,
}

/// The fields of the payload's line that are used here.
#[derive(Deserialize)]
struct Line {
    operations: f64,
    operations_per_second: f64,
    bytes_per_second: f64,
    p50_ns: Option<f64>,
}

/// Returns a guest with these `arguments`, without the device that it will drive.
pub fn guest(arguments: &str) -> Guest {
    Guest {
        kernel: payload("load"),
        // The process exists until its CPU time has been read.
        command_line: format!("{arguments} seconds=1 finish=hang"),
        memory_mib: MEMORY_MIB,
        ..Guest::default()
    }
}

/// Runs a guest.
///
/// # Panics
///
/// If the guest finds a fault.
pub fn run(monitors: &Monitors, monitor: Monitor, guest: &Guest) -> Load {
    let mut process = Process::start(monitors.command(monitor, guest));
    process.wait_for(READY, LIMIT);
    let cpu_before = process.threads_cpu(serves_devices);
    let wait_before = process.threads_cpu_wait();
    process.wait_for(DONE, LIMIT);
    let device_cpu = process.threads_cpu(serves_devices);
    let cpu_wait = process.threads_cpu_wait();
    let text = process.text();
    process.stop(LIMIT);
    let line = text.lines().find(|line| line.starts_with('{'));
    let line: Line = line
        .and_then(|line| serde_json::from_str(line).ok())
        .unwrap_or_else(|| panic!("the payload did not say what it did:\n{text}"));
    Load {
        operations: line.operations,
        operations_per_second: line.operations_per_second,
        bytes_per_second: line.bytes_per_second,
        median_latency: line.p50_ns,
        device_cpu: device_cpu.saturating_sub(cpu_before),
        cpu_wait: cpu_wait.saturating_sub(wait_before),
    }
}

/// Returns whether the thread of a monitor with this name serves devices: Bantam's event loop,
/// QEMU's I/O thread, and the kernel's threads for their io_uring.
fn serves_devices(name: &str) -> bool {
    name.starts_with("bantam-devices")
        || name.starts_with("bantam-disk")
        || name.starts_with("bantam-io")
        || name.starts_with("bantam-net")
        || name.starts_with("IO ")
        || name.starts_with("iou-")
}

/// Warns if the host had too few free CPUs for the runs of a load, as the figures then mean little.
pub fn warn_of_too_few_cpus(name: &str, loads: &[Load]) {
    let disturbed = loads.iter().filter(|load| load.cpu_wait > MAX_CPU_WAIT);
    let disturbed = disturbed.count();
    if disturbed > 0 {
        eprintln!(
            "{name}: in {disturbed} of {} runs the monitor waited more than {MAX_CPU_WAIT:?} for a \
             CPU: the host has too few to spare",
            loads.len()
        );
    }
}

/// Returns one number of each run.
pub fn samples(loads: &[Load], of: impl Fn(&Load) -> f64) -> Samples {
    loads.iter().map(of).collect()
}

/// Checks whether a monitor runs a guest at all.
///
/// # Errors
///
/// The first line that the monitor printed, if it ended at once.
pub fn try_out(monitors: &Monitors, monitor: Monitor, guest: &Guest) -> Result<(), String> {
    let mut process = Process::start(monitors.command(monitor, guest));
    if process.prints(READY, LIMIT) {
        process.stop(LIMIT);
        return Ok(());
    }
    Err(process.text().lines().next().unwrap_or_default().to_owned())
}
