//! What the process of a machine has given up when its guest runs.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bantam_tests::{Bantam, Running, require_kvm};
use nix::unistd::Pid;

/// A machine that waits for its end, with a disk and a thread for it.
fn machine(disk: &Path) -> Bantam {
    fs::write(disk, vec![0; 1 << 20]).unwrap();
    Bantam::payload("hello")
        .append("finish=hang")
        .disk(disk, ",iothread=on")
}

fn running(bantam: Bantam) -> Running {
    let running = bantam.start();
    running.wait_for_output("hello");
    running
}

fn of_process(pid: Pid, file: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(file)
}

/// Returns what was read of a thread or descriptor, unless it has gone since it was listed.
fn unless_gone<T>(read: io::Result<T>) -> Option<T> {
    match read {
        // The read fails with ESRCH if a thread goes after the file was opened.
        Err(err)
            if err.kind() == io::ErrorKind::NotFound || err.raw_os_error() == Some(libc::ESRCH) =>
        {
            None
        }
        read => Some(read.unwrap()),
    }
}

/// Returns what the kernel says about each thread of a process: its name, and a line of its status. A
/// thread that ends meanwhile is left out.
fn threads(pid: Pid, key: &str) -> Vec<(String, String)> {
    let tasks = fs::read_dir(of_process(pid, "task")).unwrap();
    let threads = tasks.filter_map(|task| {
        let status = fs::read_to_string(task.unwrap().path().join("status"));
        let status = unless_gone(status)?;
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap().trim_start_matches(':').trim().to_owned()
        };
        Some((value("Name"), value(key)))
    });
    let threads: Vec<_> = threads.collect();
    assert!(!threads.is_empty(), "{pid} has ended");
    threads
}

#[test]
fn by_default_every_thread_has_filters_and_cannot_gain_privileges() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let running = running(machine(&folder.path().join("disk")));
    let filters = threads(running.pid(), "Seccomp_filters");
    let count = |name: &str| {
        let found = filters.iter().find(|(it, _)| it == name);
        let (_, count) = found.unwrap_or_else(|| panic!("no {name} in {filters:?}"));
        count.parse::<u32>().unwrap()
    };
    let program = count("bantam");
    assert!(program > 0);
    // Each of these has its own filter beside those of the program.
    for name in [
        "bantam-vcpu0",
        "bantam-devices",
        "bantam-io0",
        "console",
        "bantam-stderr",
    ] {
        assert!(count(name) > program, "{name}: {filters:?}");
    }
    for (name, value) in threads(running.pid(), "Seccomp") {
        assert_eq!(value, "2", "{name}");
    }
    for (name, value) in threads(running.pid(), "NoNewPrivs") {
        assert_eq!(value, "1", "{name}");
    }
}

#[test]
fn without_filters_there_are_none() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(&folder.path().join("disk")).option("--seccomp", "off");
    let running = running(machine);
    for (name, value) in threads(running.pid(), "Seccomp") {
        assert_eq!(value, "0", "{name}");
    }
}

#[test]
fn no_descriptor_is_passed_on_and_the_environment_is_cleared() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let secret = "BNTM_TEST_SECRET=of-the-user";
    let machine = machine(&folder.path().join("disk"));
    let running = running(machine.launcher(["env", secret]));
    let pid = running.pid();
    let descriptors = fs::read_dir(of_process(pid, "fdinfo")).unwrap();
    for descriptor in descriptors.map(|entry| entry.unwrap().path()) {
        let number: u32 = descriptor
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        let target = fs::read_link(of_process(pid, &format!("fd/{number}")));
        let (Some(info), Some(target)) = (
            unless_gone(fs::read_to_string(&descriptor)),
            unless_gone(target),
        ) else {
            continue;
        };
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .unwrap();
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        let closes = flags & libc::O_CLOEXEC != 0;
        // The event loop's library makes these for its own thread.
        let is_event = target == Path::new("anon_inode:[eventfd]");
        // Those that it has got from this process.
        let own = fs::read_link(format!("/proc/self/fd/{number}"));
        let is_inherited = own.is_ok_and(|own| own == target);
        assert!(
            closes || is_event || is_inherited || number <= 2,
            "{number}: {}",
            target.display()
        );
    }
    let environment = fs::read(of_process(pid, "environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment);
    assert!(!environment.contains("of-the-user"), "{environment:?}");
}

#[test]
fn there_is_no_core_dump_unless_it_is_wanted() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let limit = |pid| {
        let limits = fs::read_to_string(of_process(pid, "limits")).unwrap();
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"));
        let words: Vec<_> = line
            .unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        words[4..6].to_vec()
    };
    let hidden = running(machine(&folder.path().join("disk0")));
    assert_eq!(limit(hidden.pid()), ["0", "0"]);
    let machine = machine(&folder.path().join("disk1")).option("--coredump", "on");
    let shown = running(machine.launcher(["prlimit", "--core=4096:4096"]));
    assert_eq!(limit(shown.pid()), ["4096", "4096"]);
    // Guest memory is in none.
    let maps = fs::read_to_string(of_process(shown.pid(), "smaps")).unwrap();
    let mut size = 0;
    let largest = maps.lines().fold((0, String::new()), |largest, line| {
        if let Some(text) = line.strip_prefix("Size:") {
            size = text.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
        match line.strip_prefix("VmFlags:") {
            Some(flags) if size > largest.0 => (size, flags.to_owned()),
            _ => largest,
        }
    });
    assert!(
        largest.1.split_whitespace().any(|flag| flag == "dd"),
        "{largest:?}"
    );
}
