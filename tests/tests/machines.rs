//! Named machines: `bantam create`, `start`, `list` and the others.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Bantam, Kernel, Machines, RootFileSystem, Running, files_below, linux_slot, payload,
    read_until, require_kvm, require_namespaces, with_mounts,
};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

/// How long something may take that needs milliseconds, on a busy host.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a Linux guest may take.
const LINUX_LIMIT: Duration = Duration::from_secs(250);

#[test]
fn a_machine_lives_from_create_to_undefine() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    assert_eq!(machines.done(&["list"]), "NAME   STATE\n");
    assert_eq!(
        machines.done(&["list", "--all"]),
        "NAME   STATE\nweb    shut off\n"
    );
    assert_eq!(machines.state("web"), "shut off");

    machines.done(&["start", "web"]);
    assert_eq!(machines.state("web"), "running (booted)");
    assert_eq!(machines.done(&["list", "--name"]), "web\n");
    // It does not belong to whoever has started it.
    let process = machines.process("web");
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let session = stat.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap();
    assert_eq!(session, process.to_string());
    for (socket, mode) in [("control.sock", 0o600), ("", 0o700)] {
        let path = machines.runtime("web").join(socket);
        let found = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{socket}");
    }

    machines.done(&["suspend", "web"]);
    assert_eq!(machines.state("web"), "paused (user)");
    machines.done(&["resume", "web"]);
    let info = machines.json(&["dominfo", "web"]);
    assert_eq!(info["state"], "running");
    assert_eq!(info["memory-kib"], 32 << 10);
    // Commands of the control socket take the name too.
    assert_eq!(machines.done(&["control", "web", "query"]), "running\n");
    assert!(
        machines
            .refused(&["undefine", "web"])
            .contains("it is running")
    );
    assert!(
        machines
            .refused(&["rename", "web", "db"])
            .contains("it is running")
    );
    assert!(
        machines
            .refused(&["start", "web"])
            .contains("it is running")
    );

    machines.done(&["destroy", "web"]);
    assert_eq!(machines.state("web"), "shut off (destroyed)");
    assert!(
        machines
            .refused(&["destroy", "web"])
            .contains("not running")
    );
    assert!(
        machines
            .refused(&["suspend", "web"])
            .contains("not running")
    );
    machines.done(&["rename", "web", "db"]);
    assert!(
        machines
            .refused(&["domstate", "web"])
            .contains("no machine 'web'")
    );
    machines.done(&["undefine", "db"]);
    assert_eq!(machines.done(&["list", "--all"]), "NAME   STATE\n");
    let left = files_below(&machines.folder().join("machines"));
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn a_machine_keeps_nothing_of_whoever_starts_it() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    // A shell that passes on a pipe: its reader waits until all have closed it.
    let script = "exec 7>&1; exec \"$@\"";
    let variable = format!("BANTAM_STATE_DIR={}", machines.folder().display());
    let launcher = ["env", &variable, "sh", "-c", script, "sh"].map(str::to_owned);
    let ended = Bantam::new(["start", "web"]).launcher(launcher).finish();
    ended.has_status(0);
    assert_eq!(machines.state("web"), "running (booted)");
}

#[test]
fn start_says_why_a_guest_does_not_run() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    let kernel = payload("hello");
    let text = machines.machine_file("web");
    let path = machines.of_machine("web").join("machine.toml");

    fs::write(
        &path,
        text.replace(kernel.to_str().unwrap(), "/absent/kernel"),
    )
    .unwrap();
    let reason = machines.refused(&["start", "web"]);
    assert!(
        reason.starts_with("cannot start machine 'web': "),
        "{reason}"
    );
    assert!(reason.contains("/absent/kernel"), "{reason}");
    assert_eq!(machines.state("web"), "shut off (host error)");
    assert!(!machines.runtime("web").exists());

    fs::write(&path, "kernel = \"/k\"\ncups = 2\n").unwrap();
    let reason = machines.refused(&["start", "web"]);
    assert!(reason.contains("machine.toml:2: "), "{reason}");
    // The others are not affected, and neither is the list.
    machines.create_idle("db");
    assert!(machines.done(&["list", "--all"]).contains("web"));

    fs::write(&path, &text).unwrap();
    machines.done(&["start", "web"]);
}

#[test]
fn names_that_are_not_names_are_refused() {
    let machines = Machines::new();
    let long = "x".repeat(200);
    for name in ["a/b", "..", "two words", ".hidden", "", &long] {
        let ended = machines.run(&["create", name, "--kernel", "/dev/null"]);
        assert_eq!(ended.status.code(), Some(1), "{name}: {ended}");
        assert_eq!(ended.stderr.lines().count(), 1, "{name}: {ended}");
    }
    assert!(!machines.folder().join("machines").exists());
    let kernel = payload("hello");
    let create = |name| machines.run(&["create", name, "--kernel", kernel.to_str().unwrap()]);
    create("Web").has_status(0);
    let ended = create("wEB");
    assert!(ended.failed().contains("'Web' already"), "{ended}");
}

#[test]
fn of_several_starts_at_once_one_wins() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    for _ in 0..5 {
        let starts: Vec<_> = (0..4)
            .map(|_| machines.bantam(&["start", "web"]).start())
            .collect();
        let ended: Vec<_> = starts.into_iter().map(Running::wait).collect();
        let (won, lost): (Vec<_>, Vec<_>) = ended.iter().partition(|it| it.status.success());
        assert_eq!(won.len(), 1);
        for lost in lost {
            let reason = lost.failed();
            let says_why = reason.contains("at work on it") || reason.contains("is running");
            assert!(says_why, "{reason}");
        }
        machines.done(&["destroy", "web"]);
    }
}

#[test]
fn a_hundred_starts_leave_nothing() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    machines.done(&["start", "web"]);
    machines.done(&["destroy", "web"]);
    let before = files_below(machines.folder());
    for _ in 0..100 {
        machines.done(&["start", "web"]);
        machines.done(&["destroy", "web"]);
    }
    assert_eq!(files_below(machines.folder()), before);
    assert!(!has_process(&machines));
}

/// Whether a process has a file in the folder of the machines open.
fn has_process(machines: &Machines) -> bool {
    let folder = fs::canonicalize(machines.folder()).unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let descriptors = processes
        .filter_map(|process| fs::read_dir(process.path().join("fd")).ok())
        .flatten()
        .flatten();
    let mut files = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
    files.any(|file| file.starts_with(&folder))
}

#[test]
fn a_machine_whose_process_is_killed_is_shut_off_and_starts_again() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    for _ in 0..3 {
        machines.done(&["start", "web"]);
        kill(machines.process("web"), Signal::SIGKILL).unwrap();
        machines.wait_for_state("web", "shut off (killed)");
        // The sockets are still there.
        assert!(machines.runtime("web").join("control.sock").exists());
        assert!(
            machines
                .refused(&["console", "web"])
                .contains("not running")
        );
    }
    machines.done(&["start", "web"]);
    machines.done(&["destroy", "web"]);
    assert!(!machines.runtime("web").exists());
}

#[test]
fn a_machine_that_does_not_answer_is_destroyed() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    machines.done(&["start", "web"]);
    kill(machines.process("web"), Signal::SIGSTOP).unwrap();
    assert_eq!(machines.done(&["list"]), "NAME   STATE\nweb    no answer\n");
    machines.done(&["destroy", "web"]);
    assert_eq!(machines.state("web"), "shut off (killed)");
}

#[test]
fn a_create_that_is_killed_leaves_a_machine_or_nothing() {
    let machines = Machines::new();
    let kernel = payload("hello");
    let kernel = kernel.to_str().unwrap();
    for round in 0..30 {
        let create = machines
            .bantam(&["create", "web", "--kernel", kernel])
            .start();
        thread::sleep(Duration::from_micros(round * 400));
        create.signal(Signal::SIGKILL);
        create.wait();
        // It can be used, or made.
        let exists = machines.done(&["list", "--all", "--name"]) == "web\n";
        if !exists {
            machines.done(&["create", "web", "--kernel", kernel]);
        }
        machines.done(&["dominfo", "web"]);
        machines.done(&["undefine", "web"]);
        let left = files_below(&machines.folder().join("machines"));
        assert_eq!(left.len(), 1, "{left:?}");
    }
}

#[test]
fn a_state_folder_that_cannot_be_written_to_is_an_error_of_one_line() {
    require_namespaces!();
    let kernel = payload("hello");
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().display();
    for options in ["ro", "size=4k,nr_inodes=3"] {
        let mut launcher = with_mounts(&format!("mount -t tmpfs -o {options} tmpfs {state}"));
        launcher.extend(["env".to_owned(), format!("BANTAM_STATE_DIR={state}")]);
        let ended = Bantam::new(["create", "web", "--kernel"])
            .argument(&kernel)
            .launcher(launcher)
            .finish();
        let reason = ended.failed_with_one_line();
        assert!(reason.contains(&*state.to_string()), "{reason}");
    }
}

#[test]
fn a_console_has_several_clients_who_see_what_was_printed_before() {
    require_kvm!();
    let machines = Machines::new();
    machines.create("echo", "serial", "bytes=6 finish=hang", &[]);
    machines.done(&["start", "echo"]);
    let (mut first, _) = machines.console_until("echo", "ready");
    let (mut second, _) = machines.console_until("echo", "ready");
    first.write_all(b"abcdef").unwrap();
    read_until(&mut first, "abcdef");
    read_until(&mut second, "abcdef");
    // The command shows the same, and goes when the machine does.
    let console = machines.bantam(&["console", "echo"]).start();
    console.wait_for_output("abcdef");
    machines.done(&["destroy", "echo"]);
    let ended = console.wait();
    ended.has_status(0);
    assert!(ended.stderr.contains("machine 'echo' has ended"), "{ended}");
}

#[test]
fn shutdown_presses_the_power_button_and_waits() {
    require_kvm!();
    let machines = Machines::new();
    machines.create("web", "button", "finish=poweroff", &[]);
    machines.done(&["start", "web"]);
    machines.console_until("web", "ready");
    machines.done(&["shutdown", "web", "--wait", "--timeout", "20s"]);
    assert_eq!(machines.state("web"), "shut off (powered off)");
    let run = &machines.json(&["domstate", "web"])["last-run"];
    assert!(run["end"]["time"].as_u64() >= run["started"].as_u64());

    // A guest that does not listen to the keyboard reboots by the power button.
    machines.done(&["start", "web"]);
    machines.console_until("web", "ready");
    let process = machines.process("web");
    machines.done(&["reboot", "web"]);
    assert_ne!(machines.process("web"), process);
    machines.console_until("web", "ready");
    let process = machines.process("web");
    machines.done(&["reset", "web"]);
    assert_ne!(machines.process("web"), process);
}

#[test]
fn top_shows_who_uses_the_processors() {
    require_kvm!();
    let machines = Machines::new();
    machines.create("busy", "count", "", &[]);
    machines.create("idle", "button", "finish=poweroff", &[]);
    machines.create("off", "button", "", &[]);
    for name in ["idle", "busy"] {
        machines.done(&["start", name]);
    }
    let text = machines.done(&["top", "--count", "2", "--delay", "1"]);
    let tables: Vec<_> = text.split("\n\n").filter(|it| !it.is_empty()).collect();
    assert_eq!(tables.len(), 2, "{text}");
    for table in tables {
        let names = table.lines().filter_map(|line| line.split(' ').next());
        let names: Vec<_> = names.collect();
        assert_eq!(names, ["NAME", "busy", "idle"], "{text}");
    }
    let lines = machines.json(&["top", "--count", "1", "--sort", "name"]);
    assert_eq!(lines[0]["name"], "busy");
    assert!(lines[0]["cpu-percent"].as_f64() > lines[1]["cpu-percent"].as_f64());
    assert!(lines[1]["resident"].as_u64() > Some(1 << 20));
}

#[test]
fn a_guest_that_cannot_be_asked_to_shut_down_goes_on() {
    require_kvm!();
    let machines = Machines::new();
    machines.create("deaf", "serial", "bytes=1", &["--restart", "always"]);
    machines.done(&["start", "deaf"]);
    let (mut console, _) = machines.console_until("deaf", "ready");
    let line = machines.refused(&["shutdown", "deaf", "--wait"]);
    assert!(line.contains("cannot be asked to shut down"), "{line}");
    assert!(line.contains("bantam destroy deaf"), "{line}");
    machines.done(&["suspend", "deaf"]);
    let line = machines.refused(&["shutdown", "deaf"]);
    assert!(line.contains("it is paused"), "{line}");
    let line = machines.refused(&["reboot", "deaf"]);
    assert!(line.contains("bantam reset deaf"), "{line}");
    machines.done(&["resume", "deaf"]);
    // The request has changed nothing: its end is followed by another start.
    let process = machines.process("deaf");
    console.write_all(b"a").unwrap();
    read_until(&mut console, "PASS");
    let begin = Instant::now();
    while machines.json(&["domstate", "deaf"])["last-run"]["restarts"] != 1 {
        assert!(begin.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    machines.wait_for_state("deaf", "running (booted)");
    assert_eq!(machines.process("deaf"), process);
    machines.done(&["shutdown", "deaf", "--wait", "--timeout", "20s"]);
    assert_eq!(machines.state("deaf"), "shut off (destroyed)");
}

#[test]
fn a_guest_that_fails_is_started_again_as_its_policy_says() {
    require_kvm!();
    let machines = Machines::new();
    let limit = ["--restart-limit", "2"];
    for (name, words, policy, reason, restarts) in [
        ("a", "finish=panic-word", "never", "crashed", 0),
        ("b", "finish=panic-word", "on-failure", "crashed", 2),
        ("c", "finish=poweroff", "on-failure", "powered off", 0),
        ("d", "finish=poweroff", "always", "powered off", 2),
        // A reboot is a reboot.
        ("e", "finish=reset", "never", "rebooted", 2),
    ] {
        let more = [&limit[..], &["--restart", policy][..]].concat();
        machines.create(name, "hello", words, &more);
        machines.done(&["start", name]);
        machines.wait_for_state(name, &format!("shut off ({reason})"));
        let run = &machines.json(&["domstate", name])["last-run"];
        assert_eq!(run["restarts"], restarts, "{name}: {run}");
    }
    // Nobody restarts what its user has ended.
    machines.create("f", "hello", "finish=hang", &["--restart", "always"]);
    machines.done(&["start", "f"]);
    machines.done(&["destroy", "f"]);
    assert_eq!(machines.state("f"), "shut off (destroyed)");
}

#[test]
fn a_machine_file_is_defined_edited_and_printed() {
    require_kvm!();
    let machines = Machines::new();
    let file = machines.folder().join("web.toml");
    let kernel = payload("hello");
    let text = format!(
        "kernel = \"{}\"\nappend = \"finish=hang\"\n",
        kernel.display()
    );
    fs::write(&file, text).unwrap();
    machines.done(&["define", file.to_str().unwrap()]);
    assert!(machines.done(&["dumpcfg", "web"]).contains("finish=hang"));

    let edit = |script: &str| {
        let variable = format!("BANTAM_STATE_DIR={}", machines.folder().display());
        let editor = format!("EDITOR=sed -i {script}");
        let launcher = ["env", "-u", "VISUAL", &variable, &editor].map(str::to_owned);
        Bantam::new(["edit", "web"]).launcher(launcher).finish()
    };
    let before = machines.machine_file("web");
    let ended = edit("s/kernel/kernle/");
    assert!(ended.failed().contains("kernle"), "{ended}");
    assert_eq!(machines.machine_file("web"), before);
    edit("'1i cpus = 2'").has_status(0);
    assert_eq!(machines.json(&["dominfo", "web"])["vcpus"], 2);
    machines.done(&["start", "web"]);
    let ended = edit("s/cpus.*/cpus=1/");
    ended.has_status(0);
    assert!(ended.stderr.contains("started again"), "{ended}");
    assert!(
        machines
            .done(&["dumpcfg", "web", "--live"])
            .contains("cpus = 2")
    );
    machines.done(&["setvcpus", "web", "3"]);
    machines.done(&["reset", "web"]);
    assert!(
        machines
            .done(&["dumpcfg", "web", "--live"])
            .contains("cpus = 3")
    );
    let left = fs::read_dir(machines.of_machine("web")).unwrap();
    let names: Vec<_> = left.map(|it| it.unwrap().file_name()).collect();
    assert!(
        !names
            .iter()
            .any(|it| it.to_string_lossy().starts_with("edit"))
    );
}

#[test]
fn events_of_machines_are_followed_from_before_their_start() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    let events = machines.bantam(&["events", "--output", "json"]).start();
    // It watches once the folder of the sockets is there.
    let begin = Instant::now();
    while !machines.folder().join("run").exists() {
        assert!(begin.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(100));
    for _ in 0..2 {
        machines.done(&["start", "web"]);
        machines.done(&["suspend", "web"]);
        machines.done(&["destroy", "web"]);
    }
    let text = events.wait_for_output("\"paused\"");
    let event: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(event["machine"], "web");
    assert!(event["time"].as_f64() > Some(0.0), "{event}");
    events.wait_for_output("\"stopped\"");
    events.signal(Signal::SIGKILL);
    events.wait();
}

/// Returns how often the guest has left its vCPU for a device.
fn exits(machines: &Machines, name: &str) -> u64 {
    let counters = machines.done(&["control", name, "json", "\"metrics\""]);
    let counters: Value = serde_json::from_str(&counters).unwrap();
    let vcpu = &counters["metrics"]["vcpus"][0];
    let kinds = [
        "exit_io_in",
        "exit_io_out",
        "exit_mmio_read",
        "exit_mmio_write",
    ];
    kinds.iter().filter_map(|kind| vcpu[kind].as_u64()).sum()
}

#[track_caller]
fn wait_until_it_works(machines: &Machines, name: &str) {
    let begin = Instant::now();
    while exits(machines, name) == 0 {
        assert!(begin.elapsed() < PATIENCE);
    }
}

#[test]
fn a_saved_machine_goes_on_where_it_was() {
    require_kvm!();
    let machines = Machines::new();
    machines.create("count", "count", "", &[]);
    machines.done(&["start", "count"]);
    machines.console_until("count", "counting at");
    machines.done(&["managedsave", "count"]);
    assert_eq!(machines.state("count"), "shut off (saved)");
    assert!(
        machines
            .refused(&["undefine", "count"])
            .contains("--managed-save")
    );
    machines.done(&["start", "count"]);
    assert_eq!(machines.state("count"), "running (restored)");
    // A guest that had booted again would print where its counters are.
    wait_until_it_works(&machines, "count");
    let mut stream = UnixStream::connect(machines.runtime("count").join("console.sock")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut output = [0; 64];
    assert!(stream.read(&mut output).is_err(), "{output:?}");

    let saved = machines.folder().join("saved");
    let saved = saved.to_str().unwrap();
    machines.done(&["save", "count", saved]);
    machines.done(&["restore", saved]);
    assert_eq!(machines.state("count"), "running (restored)");
    assert!(machines.refused(&["restore", saved]).contains("is running"));
    machines.done(&["managedsave", "count"]);
    machines.done(&["start", "count", "--force-boot"]);
    machines.console_until("count", "counting at");
}

#[test]
fn snapshots_keep_disks_and_memory_and_are_gone_back_to() {
    require_kvm!();
    let machines = Machines::new();
    let disk = machines.folder().join("disk.img");
    let content = vec![7; 1 << 20];
    fs::write(&disk, &content).unwrap();
    let disk = disk.to_str().unwrap();
    machines.create("count", "count", "", &["--disk", disk]);
    machines.done(&["snapshot", "create", "count", "cold"]);
    let first = machines.json(&["domblklist", "count"])[0]["source"].clone();
    assert_ne!(first, disk);

    machines.done(&["start", "count"]);
    machines.console_until("count", "counting at");
    machines.done(&[
        "snapshot",
        "create",
        "count",
        "warm",
        "--description",
        "it counts",
    ]);
    let list = machines.json(&["snapshot", "list", "count"]);
    assert_eq!(list[0]["name"], "cold");
    assert_eq!(list[0]["memory"], false);
    assert_eq!(list[1]["memory"], true);
    assert_eq!(list[1]["parent"], "cold");
    assert_eq!(
        machines.done(&["snapshot", "tree", "count"]),
        "cold\n  warm (current)\n"
    );
    // The machine file names what the machine goes on with.
    let live = machines.json(&["domblklist", "count"])[0]["source"].clone();
    assert_ne!(live, first);
    assert!(
        machines
            .machine_file("count")
            .contains(live.as_str().unwrap())
    );

    machines.done(&["snapshot", "revert", "count", "warm"]);
    assert_eq!(machines.state("count"), "running (from snapshot)");
    wait_until_it_works(&machines, "count");
    machines.done(&["snapshot", "revert", "count", "cold"]);
    assert_eq!(machines.state("count"), "shut off (reverted)");
    // The overlays of what was given up are gone, those of the snapshots stay.
    let overlays = fs::read_dir(machines.of_machine("count").join("disks")).unwrap();
    assert_eq!(overlays.count(), 2);
    machines.done(&["start", "count"]);
    machines.console_until("count", "counting at");

    let reason = machines.refused(&["undefine", "count"]);
    assert!(reason.contains("it is running"), "{reason}");
    machines.done(&["destroy", "count"]);
    assert!(
        machines
            .refused(&["undefine", "count"])
            .contains("--snapshots")
    );
    machines.done(&["snapshot", "delete", "count", "cold"]);
    assert_eq!(
        machines.done(&["snapshot", "list", "count", "--name"]),
        "warm\n"
    );
    machines.done(&["snapshot", "revert", "count", "warm"]);
    machines.done(&["destroy", "count"]);
    machines.done(&["snapshot", "delete", "count", "warm"]);
    machines.done(&["undefine", "count"]);
    assert_eq!(fs::read(disk).unwrap(), content);
}

#[test]
fn a_guest_that_reboots_after_a_snapshot_keeps_its_overlays() {
    require_kvm!();
    let machines = Machines::new();
    let disk = machines.folder().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let disk = disk.to_str().unwrap();
    machines.create("web", "button", "finish=reset", &["--disk", disk]);
    machines.done(&["start", "web"]);
    machines.console_until("web", "ready");
    machines.done(&["snapshot", "create", "web", "before"]);
    machines.done(&["control", "web", "power-button"]);
    let begin = Instant::now();
    while machines.json(&["domstate", "web"])["last-run"]["restarts"] != 1 {
        assert!(begin.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    machines.wait_for_state("web", "running (booted)");
    let source = machines.json(&["domblklist", "web"])[0]["source"].clone();
    assert_ne!(source, disk);
    assert!(
        machines
            .machine_file("web")
            .contains(source.as_str().unwrap())
    );
}

#[test]
fn a_snapshot_that_is_killed_counts_or_leaves_nothing() {
    require_kvm!();
    let machines = Machines::new();
    let disk = machines.folder().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    machines.create("count", "count", "", &["--disk", disk.to_str().unwrap()]);
    machines.done(&["start", "count"]);
    machines.console_until("count", "counting at");
    for round in 0..15 {
        let name = format!("s{round}");
        let take = machines
            .bantam(&["snapshot", "create", "count", &name])
            .start();
        thread::sleep(Duration::from_millis(round * 3));
        take.signal(Signal::SIGKILL);
        take.wait();
        // The next command finishes or takes back what it has left, once the machine is done with it.
        let begin = Instant::now();
        let next = format!("n{round}");
        while !machines
            .run(&["snapshot", "create", "count", &next])
            .status
            .success()
        {
            assert!(begin.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(20));
        }
        let live = machines.done(&["dumpcfg", "count", "--live"]);
        let kept = machines.machine_file("count");
        let path = |text: &str| {
            let line = text.lines().find(|line| line.starts_with("path")).unwrap();
            line.to_owned()
        };
        assert_eq!(path(&live), path(&kept));
        let folder = machines.of_machine("count").join("snapshots");
        let names = fs::read_dir(folder).unwrap();
        let names: Vec<_> = names.map(|it| it.unwrap().file_name()).collect();
        let half_made = names.iter().any(|it| it.to_string_lossy().starts_with('.'));
        assert!(!half_made, "{names:?}");
        for name in machines
            .done(&["snapshot", "list", "count", "--name"])
            .lines()
        {
            machines.done(&["snapshot", "delete", "count", name]);
        }
    }
}

#[test]
fn storage_that_another_machine_uses_is_kept() {
    let machines = Machines::new();
    let image = |name: &str| {
        let path = machines.folder().join(name);
        fs::write(&path, vec![0; 1 << 16]).unwrap();
        path
    };
    let (own, shared, read) = (image("own"), image("shared"), image("read"));
    let read_option = format!("{},ro", read.display());
    let disks = |paths: &[&str]| -> Vec<String> {
        let options = paths.iter().flat_map(|path| ["--disk", path]);
        options.map(str::to_owned).collect()
    };
    let (own_text, shared_text) = (own.to_str().unwrap(), shared.to_str().unwrap());
    let first = disks(&[own_text, shared_text, &read_option]);
    let first: Vec<_> = first.iter().map(String::as_str).collect();
    machines.create("a", "hello", "", &first);
    machines.create("b", "hello", "", &["--disk", shared_text]);
    let ended = machines.run(&["undefine", "a", "--remove-all-storage"]);
    ended.has_status(0);
    assert!(ended.stderr.contains("another machine uses it"), "{ended}");
    assert!(!own.exists());
    assert!(shared.exists() && read.exists());
}

/// Defines and starts a Linux guest with a root file system of its own.
fn start_linux(machines: &Machines, name: &str, kernel: Kernel, words: &str) {
    let root = machines.folder().join("root.img");
    fs::copy(RootFileSystem::new().ext4, &root).unwrap();
    let kernel = kernel.vmlinux();
    let kernel = kernel.to_str().unwrap();
    let root = root.to_str().unwrap();
    let options = ["--kernel", kernel, "--disk", root, "--append", words];
    let arguments = [&["create", name, "--start"], &options[..]].concat();
    machines.done(&arguments);
}

#[test]
fn a_shell_of_linux_goes_on_after_a_managed_save() {
    require_kvm!();
    let _slot = linux_slot();
    let machines = Machines::new();
    start_linux(&machines, "linux", Kernel::Small, "bantam.mode=shell quiet");
    let mut console = LinuxConsole::attach(&machines, "linux");
    console.command("kept=before; echo got-$kept", "got-before");
    drop(console);
    machines.done(&["managedsave", "linux"]);
    machines.done(&["start", "linux"]);
    let mut console = LinuxConsole::attach(&machines, "linux");
    console.command("echo still-$kept", "still-before");
}

#[test]
fn linux_shuts_itself_down_by_the_power_button() {
    require_kvm!();
    let _slot = linux_slot();
    let machines = Machines::new();
    let words = "bantam.mode=test bantam.test=power-button quiet";
    start_linux(&machines, "linux", Kernel::Full, words);
    let mut console = LinuxConsole::attach(&machines, "linux");
    console.read_until("bantam: power-button waiting");
    let shutdown = ["shutdown", "linux", "--wait", "--timeout", "200s"];
    let shutdown = machines.bantam(&shutdown).limit(LINUX_LIMIT).finish();
    shutdown.has_status(0);
    assert_eq!(machines.state("linux"), "shut off (powered off)");
}

/// The shell at the console of a Linux guest.
struct LinuxConsole(UnixStream);

impl LinuxConsole {
    fn attach(machines: &Machines, name: &str) -> LinuxConsole {
        let path = machines.runtime(name).join("console.sock");
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        LinuxConsole(stream)
    }

    /// Types a command again and again until its output is there, as the shell may not have started yet.
    #[track_caller]
    fn command(&mut self, command: &str, awaited: &str) {
        self.await_output(Some(command), awaited);
    }

    #[track_caller]
    fn read_until(&mut self, awaited: &str) {
        self.await_output(None, awaited);
    }

    #[track_caller]
    fn await_output(&mut self, command: Option<&str>, awaited: &str) {
        let begin = Instant::now();
        let mut output = String::new();
        let mut chunk = [0; 4096];
        let mut typed = None::<Instant>;
        while !output.contains(awaited) {
            assert!(begin.elapsed() < LINUX_LIMIT, "no '{awaited}' in\n{output}");
            if let Some(command) = command
                && typed.is_none_or(|typed| typed.elapsed() > Duration::from_secs(20))
            {
                self.0.write_all(format!("{command}\n").as_bytes()).unwrap();
                typed = Some(Instant::now());
            }
            if let Ok(count) = self.0.read(&mut chunk) {
                assert!(count > 0, "the machine has ended\n{output}");
                output.push_str(&String::from_utf8_lossy(&chunk[..count]));
            }
        }
    }
}
