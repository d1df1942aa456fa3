//! The time that a Linux guest takes to start its first process.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bantam_tests::{Kernel, RootFileSystem};
use bantam_vmm::workarounds::guest_kernel_parameters;

use crate::monitors::{Disk, DiskAccess, Guest, Monitor, Monitors};
use crate::process::Process;
use crate::report::{Goal, Peer, Report, Row};

const RUNS: usize = 5;
/// Without hardware virtualization a boot takes a quarter of a minute on an idle host.
pub const LIMIT: Duration = Duration::from_secs(300);
/// How long a monitor may take to end.
pub const STOP_LIMIT: Duration = Duration::from_secs(30);
/// What the first process of the guest prints before anything else.
pub const FIRST_LINE: &str = "bantam: init";

/// Returns a small Linux with its root file system on a fresh disk. `mode` is that of its test
/// agent.
pub fn linux_guest(monitors: &Monitors, mode: &str) -> Guest {
    let disk = monitors.folder().join("root.img");
    copy(&RootFileSystem::new().ext4, &disk);
    Guest {
        kernel: Kernel::Small.vmlinux(),
        command_line: format!(
            "console=ttyS0 root=/dev/vda rw reboot=k panic=-1 quiet bantam.mode={mode}"
        ),
        memory_mib: 128,
        idle_disks: Vec::new(),
        disk: Some(Disk {
            image: disk,
            format: "raw",
            access: DiskAccess::Default,
            options: "",
        }),
        network: None,
        tracks_dirty_pages: false,
    }
}

fn copy(from: &Path, to: &Path) {
    // A new file, so that no data of the last guest is still being written back.
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
        // The guest waits for a command, which never comes.
        let guest = linux_guest(monitors, "shell");
        let mut process = Process::start(monitors.command(monitor, &guest));
        let wall = process.wait_for(FIRST_LINE, LIMIT);
        let cpu = process.cpu();
        process.stop(STOP_LIMIT);
        [wall, cpu].map(|time| time.as_secs_f64())
    };
    // The effect of Bantam's kernel parameters, if it adds any.
    let with_same_words = guest_kernel_parameters().is_some();
    let (mut bantam, mut qemu, mut qemu_with_same_words) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        bantam.push(run(Monitor::Bantam));
        qemu.push(run(Monitor::Qemu));
        if with_same_words {
            qemu_with_same_words.push(run(Monitor::QemuWithBantamsWords));
        }
    }

    let mut add = |name: &str, peer: &[[f64; 2]], time: usize, goal| {
        let all = |turns: &[[f64; 2]]| turns.iter().map(|times| times[time]).collect();
        report.add(Row {
            name: format!("boot: start to first line of init, {name}"),
            unit: "s",
            bantam: all(&bantam),
            peer: Some(Peer::monitor(all(peer))),
            goal,
        });
    };
    add("wall time", &qemu, 0, Goal::RatioAtMost(0.9));
    add("CPU time", &qemu, 1, Goal::None);
    if with_same_words {
        let name = "wall time, peer's kernel told the same";
        add(name, &qemu_with_same_words, 0, Goal::None);
    }
}
