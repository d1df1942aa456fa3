//! Named machines that move between two state folders, as between two hosts.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bantam_tests::counting::wait_until;
use bantam_tests::two_hosts::{Hosts, relay, relay_each};
use bantam_tests::{Machines, monitor, require_kvm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const WORDS: &str = "timer=deadline pages=16 finish=poweroff";

fn list(machines: &Machines) -> String {
    machines.done(&["list", "--all", "--name"])
}

#[test]
fn a_named_machine_moves_with_its_name() {
    require_kvm!();
    let hosts = Hosts::new();
    let (source, there) = (&hosts.source, &hosts.receiver);
    hosts.start("web");
    let dry = hosts.receive(there, "dry.sock", &[]);
    let asked = source.done(&["migrate", "--dry-run", "web", &hosts.address("dry.sock")]);
    assert_eq!(asked, "the machine could run there\n");
    assert_eq!(there.folders(), <[&str; 0]>::default());
    hosts.migrate(source, "web", "dry.sock").has_status(0);
    let arrived = dry.wait();
    assert!(
        arrived.text().contains("machine 'web' has arrived"),
        "{arrived}"
    );
    source.wait_for_state("web", "shut off (migrated)");
    assert_eq!(there.state("web"), "running (migrated)");
    assert_eq!(there.done(&["list", "--name"]).trim(), "web");
    assert_eq!(there.folders(), ["web"]);
    let (before, after) = (
        source.json(&["dominfo", "web"]),
        there.json(&["dominfo", "web"]),
    );
    for key in ["id", "restart"] {
        assert_eq!(before[key], after[key]);
    }
    // It is a machine as any other: control, log, console, another start.
    there.done(&["suspend", "web"]);
    assert_eq!(there.state("web").split(' ').next(), Some("paused"));
    there.done(&["resume", "web"]);
    there
        .bantam(&["control", "web", "query"])
        .finish()
        .succeeded();
    assert!(there.of_machine("web").join("log").exists());
    UnixStream::connect(there.runtime("web").join("console.sock")).expect("there is a console");
    let refused = there.refused(&["start", "web"]);
    assert!(refused.contains("running"), "{refused}");
    there.done(&["destroy", "web"]);
    there.wait_for_state("web", "shut off (destroyed)");
    there.done(&["start", "web"]);
    there.console_until("web", "counting at ");

    // Back, where there is one of that name, and then with another.
    let back = hosts.receive(source, "back.sock", &[]);
    let error = hosts.migrate(there, "web", "back.sock");
    let error = error.failed_with_one_line();
    assert!(
        error.contains("there is a machine 'web' already"),
        "{error}"
    );
    back.wait().failed_with_one_line();
    assert_eq!(there.state("web").split(' ').next(), Some("running"));
    let back = hosts.receive(source, "named.sock", &["--name", "other"]);
    there.done(&[
        "migrate",
        "--undefine-source",
        "web",
        &hosts.address("named.sock"),
    ]);
    back.wait().has_status(0);
    assert_eq!(list(there).trim(), "");
    assert_eq!(source.state("other"), "running (migrated)");
    assert!(hosts.path("disk").exists());
    assert_eq!(source.folders(), ["other", "web"]);
}

#[test]
fn a_machine_that_has_no_name_can_get_one_where_it_arrives() {
    require_kvm!();
    let hosts = Hosts::new();
    let socket = hosts.path("control.sock");
    let running = bantam_tests::Bantam::payload("count")
        .append(WORDS)
        .option("--control", &socket)
        .start();
    running.wait_for_output("counting at ");
    let receiver = hosts.receive(&hosts.receiver, "move.sock", &["--name", "new"]);
    let moved = bantam_tests::Bantam::new(["migrate"])
        .argument(&socket)
        .argument(hosts.address("move.sock"))
        .finish();
    moved.has_status(0);
    receiver.wait().has_status(0);
    running.wait().has_status(0);
    assert_eq!(hosts.receiver.state("new"), "running (migrated)");
    let console = hosts.receiver.runtime("new").join("console.sock");
    UnixStream::connect(console).expect("there is a console");
}

#[test]
fn a_source_is_not_undefined_if_something_of_it_would_be_lost() {
    require_kvm!();
    let hosts = Hosts::new();
    let source = &hosts.source;
    hosts.start("web");
    source.done(&["snapshot", "create", "web", "--disk-only"]);
    let address = hosts.address("nobody.sock");
    let error = source.refused(&["migrate", "--undefine-source", "web", &address]);
    assert!(error.contains("snapshots"), "{error}");
    assert_eq!(source.state("web").split(' ').next(), Some("running"));
}

/// Returns the processes of machines that are kept in `machines`.
fn processes(machines: &Machines) -> Vec<Pid> {
    let folder = machines.folder().join("machines").display().to_string();
    let is_one = |number: &i32| {
        let line = fs::read(Path::new("/proc").join(number.to_string()).join("cmdline"));
        let line = String::from_utf8_lossy(&line.unwrap_or_default()).into_owned();
        line.contains("machine-process") && line.contains(&folder)
    };
    let entries = fs::read_dir("/proc").expect("there are processes");
    let numbers = entries
        .flatten()
        .filter_map(|it| it.file_name().to_str()?.parse().ok());
    numbers.filter(is_one).map(Pid::from_raw).collect()
}

#[test]
fn nothing_is_left_of_a_machine_that_does_not_arrive() {
    require_kvm!();
    let hosts = Hosts::new();
    let (source, there) = (&hosts.source, &hosts.receiver);
    hosts.start("web");
    let receiver = hosts.receive(there, "refused.sock", &["--disk", "disk0=/nowhere/disk"]);
    let error = hosts.migrate(source, "web", "refused.sock");
    let error = error.failed_with_one_line();
    assert!(
        error.contains("cannot find disk '/nowhere/disk'"),
        "{error}"
    );
    let ended = receiver.wait();
    let error = ended.failed_with_one_line();
    assert!(
        error.contains("cannot find disk '/nowhere/disk'"),
        "{error}"
    );
    assert_eq!(there.folders(), <[&str; 0]>::default());

    // The process of the machine is killed, and then it and the command that has started it.
    for (number, kills_command) in [false, true].into_iter().enumerate() {
        let (slow, socket) = (format!("slow{number}.sock"), format!("kill{number}.sock"));
        let receiver = hosts.receive(there, &socket, &[]);
        let pause = Duration::from_millis(20);
        let passed = relay(
            &hosts.path(&slow),
            &hosts.path(&socket),
            [usize::MAX; 2],
            pause,
        );
        let address = hosts.address(&slow);
        let moving = source.bantam(&["migrate", "web", &address]).start();
        let mut found = Vec::new();
        wait_until("memory is on its way", || {
            found = processes(there);
            !found.is_empty() && passed[0].load(Ordering::SeqCst) > 100 << 10
        });
        // Nobody sees it before it is there.
        assert_eq!(list(there).trim(), "");
        assert_eq!(there.folders(), [".new-web"]);
        if kills_command {
            receiver.signal(Signal::SIGKILL);
        }
        for process in found {
            kill(process, Signal::SIGKILL).expect("it is there");
        }
        moving.wait().failed_with_one_line();
        assert_eq!(source.state("web").split(' ').next(), Some("running"));
        if kills_command {
            drop(receiver);
            assert_eq!(list(there).trim(), "");
        } else {
            receiver.wait().failed_with_one_line();
            assert_eq!(there.folders(), <[&str; 0]>::default());
        }
    }
    there.create_idle("web");
    assert_eq!(there.folders(), ["web"]);
}

/// Moves a machine over a connection that is cut. Returns how many bytes have passed in each direction.
fn move_over_cut(limits: [usize; 2]) -> [usize; 2] {
    let hosts = Hosts::new();
    let (source, there) = (&hosts.source, &hosts.receiver);
    hosts.start("web");
    let receiver = hosts.receive(there, "move.sock", &[]);
    let (cut, end) = (hosts.path("cut.sock"), hosts.path("move.sock"));
    let passed = relay(&cut, &end, limits, Duration::ZERO);
    let moved = hosts.migrate(source, "web", "cut.sock");
    let arrived = receiver.wait();
    hosts.one_runs(&moved, &arrived);
    [0, 1].map(|it| passed[it].load(Ordering::SeqCst))
}

#[test]
fn wherever_the_connection_is_cut_exactly_one_named_machine_runs() {
    require_kvm!();
    let all = move_over_cut([usize::MAX; 2]);
    for limit in (0..all[1]).step_by(5) {
        move_over_cut([usize::MAX, limit]);
    }
    // The last message of the source has 9 bytes.
    let points = (0..8).map(|part| all[0] * part / 8);
    for limit in points.chain([all[0] - 10, all[0] - 4, all[0] - 1]) {
        move_over_cut([limit, usize::MAX]);
    }
}

/// Makes a folder for `PATH` with an `ssh` whose other hosts are this one with the machines of `there`. Returns the variable.
fn with_ssh(folder: &Path, there: &Machines) -> String {
    fs::create_dir(folder).expect("there is room");
    std::os::unix::fs::symlink(monitor(), folder.join("bantam")).expect("there is room");
    let script = format!(
        "#!/bin/sh\n\
         echo \"$@\" >> '{log}'\n\
         while [ \"$1\" != -T ]; do shift; done\n\
         [ \"$2\" = nowhere ] && {{ echo 'ssh: nowhere is nowhere' >&2; exit 255; }}\n\
         shift 2\n\
         BANTAM_STATE_DIR='{state}' exec \"$@\"\n",
        log = folder.join("log").display(),
        state = there.folder().display(),
    );
    let ssh = folder.join("ssh");
    fs::write(&ssh, script).expect("there is room");
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let path = std::env::var("PATH").expect("it is set");
    format!("PATH={}:{path}", folder.display())
}

#[test]
fn a_machine_moves_over_several_connections_with_compressed_pages() {
    require_kvm!();
    let hosts = Hosts::new();
    hosts.start_with("web", &["--seccomp", "kill", "--landlock", "on"]);
    let receiver = hosts.receive(&hosts.receiver, "move.sock", &[]);
    let address = hosts.address("move.sock");
    let options = ["--connections", "4", "--compress", "zstd"];
    let asked = [&["migrate", "--dry-run", "web", &address], &options[..]].concat();
    assert_eq!(hosts.source.done(&asked), "the machine could run there\n");
    let moved = [&["migrate", "web", &address], &options[..]].concat();
    let moved = hosts.source.run(&moved);
    moved.has_status(0);
    hosts.one_runs(&moved, receiver.wait().has_status(0));

    // A source whose other connections do not come.
    let receiver = hosts.receive(&hosts.source, "lonely.sock", &["--name", "lonely"]);
    let mut source = UnixStream::connect(hosts.path("lonely.sock")).expect("it listens");
    let others = [
        &b"BANTAMMG\x03\0\0\0"[..],
        &[13, 0, 0, 0, 17, 0, 0, 0, 1],
        &[0; 16],
        &[11, 0, 0, 0, 0, 0, 0, 0],
    ];
    source.write_all(&others.concat()).expect("it reads");
    receiver.wait().failed_with_one_line();
    assert_eq!(hosts.source.folders(), ["web"]);
}

#[test]
fn wherever_one_of_two_connections_is_cut_exactly_one_machine_runs() {
    require_kvm!();
    let move_over_cut = |second, limit| {
        let hosts = Hosts::new();
        hosts.start("web");
        let receiver = hosts.receive(&hosts.receiver, "move.sock", &[]);
        let limits = match second {
            false => [[limit, usize::MAX], [usize::MAX; 2]],
            true => [[usize::MAX; 2], [limit, usize::MAX]],
        };
        let passed = relay_each(&hosts.path("cut.sock"), &hosts.path("move.sock"), limits);
        let address = hosts.address("cut.sock");
        let moved = ["migrate", "web", &address, "--connections", "2"];
        let moved = hosts.source.run(&moved);
        hosts.one_runs(&moved, &receiver.wait());
        passed.map(|it| it[0].load(Ordering::SeqCst))
    };
    let all = move_over_cut(false, usize::MAX);
    for part in 1..5 {
        move_over_cut(false, all[0] * part / 5);
        move_over_cut(true, all[1] * part / 5);
    }
    for less in [1, 8, 9, 20] {
        move_over_cut(true, all[1] - less);
    }
}

#[test]
fn a_machine_moves_by_ssh() {
    require_kvm!();
    let hosts = Hosts::new();
    let (source, there) = (&hosts.source, &hosts.receiver);
    hosts.start("web");
    let ssh = hosts.path("ssh");
    let variables = [with_ssh(&ssh, there)];
    let migrate = |arguments: &[&str]| {
        let arguments = [&["migrate"], arguments].concat();
        source.bantam_with(&variables, &arguments).finish()
    };
    // What ssh says is on the terminal too, so this is not one line.
    let lost = migrate(&["web", "ssh://nowhere"]);
    lost.has_status(1);
    assert!(lost.stderr.contains("ssh: nowhere is nowhere"), "{lost}");
    assert!(lost.stderr.contains("exit status: 255"), "{lost}");
    assert_eq!(source.state("web").split(' ').next(), Some("running"));

    let several = migrate(&["web", "ssh://other", "--connections", "2"]);
    assert!(
        several.failed_with_one_line().contains("tls://"),
        "{several}"
    );
    let asked = migrate(&["--dry-run", "web", "ssh://other"]);
    assert_eq!(asked.succeeded().text(), "the machine could run there\n");
    assert_eq!(there.folders(), <[&str; 0]>::default());
    there.create_idle("taken");
    let refused = migrate(&["web", "ssh://other", "--name", "taken"]);
    refused.has_status(1);
    assert!(
        refused.stderr.contains("a machine 'taken' already"),
        "{refused}"
    );

    let moved = migrate(&["web", "ssh://root@other:2222"]);
    assert!(moved.succeeded().text().contains("moved in"), "{moved}");
    assert_eq!(there.state("web"), "running (migrated)");
    source.wait_for_state("web", "shut off (migrated)");
    let log = fs::read_to_string(ssh.join("log")).expect("it was written");
    let last = log.lines().last();
    assert_eq!(
        last,
        Some("-p 2222 -T root@other bantam migrate --receive stdio")
    );
    assert!(processes(there).len() == 1);

    // Back, as virsh says it.
    let variables = [with_ssh(&hosts.path("back"), source)];
    let words = "virsh migrate --live --undefinesource web qemu+ssh://host/system --dname back";
    let words: Vec<_> = words.split(' ').collect();
    there.bantam_with(&variables, &words).finish().succeeded();
    assert_eq!(source.state("back"), "running (migrated)");
    assert_eq!(list(there).trim(), "taken");
    let words = "virsh migrate taken qemu+tcp://host/system";
    let words: Vec<_> = words.split(' ').collect();
    there.bantam_with(&variables, &words).finish().failed();
}
