//! How long a Linux guest takes to its first process.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bantam_tests::{Kernel, RootFileSystem};

use crate::monitors::{Guest, Monitor, Monitors};
use crate::process::Process;
use crate::report::{Goal, Report, Row};

const RUNS: usize = 5;
/// Without hardware virtualization a boot takes a quarter of a minute on an idle host.
pub const LIMIT: Duration = Duration::from_secs(300);
/// What the first process of the guest prints before anything else.
pub const FIRST_LINE: &str = "bantam: init";

/// A small Linux with its root file system on a fresh disk. `mode` is what its test agent does.
pub fn linux_guest(monitors: &Monitors, mode: &str) -> Guest {
    let disk = monitors.folder().join("root.img");
    copy(&RootFileSystem::new().ext4, &disk);
    Guest {
        kernel: Kernel::Small.vmlinux(),
        command_line: format!(
            "console=ttyS0 root=/dev/vda rw reboot=k panic=-1 quiet bantam.mode={mode}"
        ),
        memory_mib: 128,
        disk: Some(disk),
        tap: None,
    }
}

fn copy(from: &Path, to: &Path) {
    // A new file, so that nothing of the last guest's is still being written back.
    let _ = fs::remove_file(to);
    fs::copy(from, to).unwrap_or_else(|error| {
        panic!(
            "cannot copy '{}' to '{}': {error}",
            from.display(),
            to.display()
        )
    });
}

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let run = |monitor| {
        let guest = linux_guest(monitors, "report");
        let mut process = Process::start(monitors.command(monitor, &guest));
        let wall = process.wait_for(FIRST_LINE, LIMIT);
        let cpu = process.cpu();
        process.wait(LIMIT);
        (wall, cpu)
    };
    let turns: Vec<[(Duration, Duration); 2]> = (0..RUNS).map(|_| Monitor::BOTH.map(run)).collect();

    let mut add = |name: &str, of: fn(&(Duration, Duration)) -> Duration, goal| {
        let seconds = |times| of(times).as_secs_f64();
        report.add(Row {
            name: name.to_owned(),
            unit: "s",
            bantam: turns.iter().map(|[bantam, _]| seconds(bantam)).collect(),
            peer: Some(turns.iter().map(|[_, qemu]| seconds(qemu)).collect()),
            goal,
        });
    };
    add(
        "boot: start to first line of init, wall time",
        |times| times.0,
        Goal::RatioAtMost(0.9),
    );
    add(
        "boot: start to first line of init, CPU time",
        |times| times.1,
        Goal::None,
    );
}
