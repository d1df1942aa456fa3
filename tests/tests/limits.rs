//! Named machines that are limited by control groups of this host, in whichever version it has mounted them.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{Machines, payload, require_kvm, require_namespaces, unprivileged, with_mounts};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Defines a machine with these keys of `[cgroup]`.
fn define(machines: &Machines, name: &str, payload_name: &str, keys: &str) {
    let file = machines.folder().join(format!("{name}.toml"));
    let text = format!(
        "kernel = '{}'\nappend = 'finish=hang'\nmemory = '32M'\nseccomp = 'kill'\n[cgroup]\n{keys}\n",
        payload(payload_name).display()
    );
    fs::write(&file, text).unwrap();
    machines.done(&["define", file.to_str().unwrap()]);
}

/// Returns the folders of the control groups that were made for a process.
fn groups(process: Pid) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    let own = groups.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        let name = group.rsplit('/').next()?;
        name.starts_with("bantam-").then_some((controllers, group))
    });
    own.map(|(controllers, group)| {
        let mount = mounts.lines().find_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let is_it = match controllers {
                "" => kind.starts_with("cgroup2 "),
                names => kind.starts_with("cgroup ") && kind.ends_with(names),
            };
            is_it.then(|| place.split(' ').nth(4)).flatten()
        });
        Path::new(mount.unwrap()).join(group.trim_start_matches('/'))
    })
    .collect()
}

/// Reads a file of a group: the first of these that one of the groups has.
fn value(groups: &[PathBuf], names: [&str; 2]) -> String {
    let files = groups
        .iter()
        .flat_map(|group| names.map(|name| group.join(name)));
    let text = files
        .filter_map(|file| fs::read_to_string(file).ok())
        .next();
    text.unwrap_or_else(|| panic!("{groups:?} have neither of {names:?}"))
        .trim()
        .to_owned()
}

#[test]
fn a_machine_has_a_group_as_long_as_it_has_a_process() {
    require_kvm!();
    let machines = Machines::new();
    let keys = "cpu-shares = 512\ncpu-quota = 150000\nmemory-max = '1G'\nmemory-high = '512M'";
    define(&machines, "web", "hello", keys);
    let start = || {
        machines.done(&["start", "web"]);
        let groups = groups(machines.process("web"));
        assert!(!groups.is_empty());
        groups
    };
    let found = start();
    let shares = value(&found, ["cpu.shares", "cpu.weight"]);
    assert!(["512", "50"].contains(&shares.as_str()), "{shares}");
    let quota = value(&found, ["cpu.cfs_quota_us", "cpu.max"]);
    assert!(
        ["150000", "150000 100000"].contains(&quota.as_str()),
        "{quota}"
    );
    let max = value(&found, ["memory.limit_in_bytes", "memory.max"]);
    assert_eq!(max, "1073741824");
    let high = value(&found, ["memory.soft_limit_in_bytes", "memory.high"]);
    assert_eq!(high, "536870912");
    let process = machines.process("web").to_string();
    for group in &found {
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert!(processes.lines().any(|it| it == process), "{group:?}");
    }
    let are_gone = || found.iter().all(|group| !group.exists());
    machines.done(&["destroy", "web"]);
    assert!(are_gone());

    // That of a process which was killed is removed by the next command.
    for next in [&["start", "web"][..], &["undefine", "web"]] {
        assert_eq!(start(), found);
        kill(machines.process("web"), Signal::SIGKILL).unwrap();
        machines.wait_for_state("web", "shut off (killed)");
        assert!(!are_gone());
        machines.done(next);
        match next[0] {
            "start" => machines.done(&["destroy", "web"]),
            _ => String::new(),
        };
        assert!(are_gone());
    }
}

#[test]
fn a_quota_slows_a_guest_that_computes() {
    require_kvm!();
    let machines = Machines::new();
    define(&machines, "web", "count", "cpu-quota = 20000");
    machines.done(&["start", "web"]);
    let used = || {
        let usage = machines.json(&["domstats", "web"]);
        let time = &usage["usage"]["cpu-time"];
        let part = |name: &str| time[name].as_f64().unwrap();
        Duration::from_secs_f64(part("secs") + part("nanos") / 1e9)
    };
    // What the start has used is over.
    thread::sleep(Duration::from_millis(500));
    let (begin, before) = (Instant::now(), used());
    thread::sleep(Duration::from_secs(3));
    let share = (used() - before).as_secs_f64() / begin.elapsed().as_secs_f64();
    assert!((0.05..0.3).contains(&share), "{share}");
    machines.done(&["destroy", "web"]);
}

#[test]
fn a_limit_that_cannot_be_set_is_said_in_a_line_and_nothing_runs() {
    require_namespaces!();
    let machines = Machines::new();
    define(
        &machines,
        "web",
        "hello",
        "memory-max = '1G'\ncpu-shares = 100",
    );
    let start = || machines.bantam(&["start", "web"]);
    let variable = format!("BANTAM_STATE_DIR={}", machines.folder().display());
    let without = |setup: &str| {
        let launcher = with_mounts(setup).into_iter();
        start().launcher(launcher.chain(["env".to_owned(), variable.clone()]))
    };
    let nowhere = without("umount -a -l -t cgroup,cgroup2").finish();
    let line = nowhere.failed_with_one_line();
    assert!(
        line.starts_with(
            "cannot start machine 'web': the host has no control groups with the controller 'cpu'"
        ),
        "{line}"
    );
    let read_only = "for it in $(awk '$3 ~ /^cgroup/ { print $2 }' /proc/mounts); do mount -o remount,bind,ro $it; done";
    let read_only = without(read_only).finish();
    let line = read_only.failed_with_one_line();
    assert!(line.contains("cannot make a control group in '"), "{line}");
    assert!(line.contains("Read-only file system"), "{line}");
    let run = bantam_tests::Bantam::new(["run", "--config"])
        .argument(machines.folder().join("web.toml"))
        .launcher(unprivileged())
        .finish();
    assert!(run.failed_with_one_line().contains("limits named machines"));
    assert_eq!(machines.state("web"), "shut off (host error)");
    assert!(!machines.runtime("web").exists());
}
