//! The control socket of a machine, and `bantam control`.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bantam_control::{ControlClient, ControlError};
use bantam_tests::{
    ApiMachine, Bantam, Running, STATUS_POWER_CUT, bare_metal_boot_source, require_kvm,
};
use bantam_vmm::{Answer, Command, Event, ShutDown, State};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a machine may take to end after a signal, on a busy host.
const PROMPT: Duration = Duration::from_secs(2);
/// How long an event may take to come.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine with a control socket.
struct Controlled {
    running: Running,
    folder: TempDir,
}

impl Controlled {
    /// Starts `bantam`, and waits until its guest has printed `text`.
    fn start(bantam: Bantam, text: &str) -> Controlled {
        let folder = tempfile::tempdir().expect("there is room for temporary files");
        let path = folder.path().join("control.sock");
        let running = bantam.option("--control", &path).start();
        running.wait_for_output(text);
        Controlled { running, folder }
    }

    /// Starts a machine whose guest does nothing.
    fn idle() -> Controlled {
        let bantam = Bantam::payload("hello").append("finish=hang");
        Controlled::start(bantam, "PASS\n")
    }

    /// Starts a machine whose guest reboots, and which is started again each time.
    fn restarting() -> Controlled {
        let bantam = Bantam::payload("hello").append("finish=reset");
        let bantam = bantam.option("--on-reboot", "restart");
        Controlled::start(bantam, "PASS\n")
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    fn client(&self) -> ControlClient {
        ControlClient::connect(&self.path()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Ends the machine by a signal and checks that this is prompt and that the socket goes.
    fn end(self, signal: Signal) {
        let asked = Instant::now();
        let path = self.path();
        self.running.signal(signal);
        let ended = self.running.wait();
        ended.has_status(STATUS_POWER_CUT);
        assert!(asked.elapsed() < PROMPT, "{:?}: {ended}", asked.elapsed());
        assert!(!path.exists());
    }
}

#[track_caller]
fn state(client: &mut ControlClient) -> State {
    match client.execute(Command::Query) {
        Ok(Answer::State(state)) => state,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn done(client: &mut ControlClient, command: Command) {
    match client.execute(command) {
        Ok(Answer::Done) => {}
        other => panic!("{other:?}"),
    }
}

/// Waits until the machine is in `awaited`, and returns the events before.
#[track_caller]
fn events_until(client: &mut ControlClient, awaited: State) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        match client.next_event(Some(PATIENCE)) {
            Ok(Some(Event::State { state })) if state == awaited => return events,
            Ok(Some(event)) => events.push(event),
            other => panic!("{other:?} after {events:?}"),
        }
    }
}

/// Runs `bantam control` and returns what it prints.
#[track_caller]
fn control(path: &Path, arguments: &[&str]) -> String {
    let ended = client(path, arguments).finish();
    ended.has_status(0);
    ended.text()
}

/// Runs `bantam control`, which has to fail, and returns the line with the reason.
#[track_caller]
fn refused(path: &Path, arguments: &[&str]) -> String {
    client(path, arguments).finish().failed().to_owned()
}

fn client(path: &Path, arguments: &[&str]) -> Bantam {
    let bantam = Bantam::new(["control"]).argument(path);
    arguments.iter().fold(bantam, Bantam::argument)
}

#[test]
fn a_machine_is_paused_asked_resumed_and_stopped() {
    require_kvm!();
    let machine = Controlled::idle();
    let mode = fs::metadata(machine.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = machine.client();
    client.subscribe().unwrap();
    assert_eq!(state(&mut client), State::Running);
    done(&mut client, Command::Pause);
    assert_eq!(state(&mut client), State::Paused);
    match client.execute(Command::Pause) {
        Err(ControlError::Refused(refusal)) => {
            assert!(refusal.message.contains("it is paused; resume it first"));
        }
        other => panic!("{other:?}"),
    }
    done(&mut client, Command::Resume);
    let Ok(Answer::Metrics(counters)) = client.execute(Command::Metrics) else {
        panic!("there are no counters");
    };
    assert_eq!(counters["vcpus"].as_array().unwrap().len(), 1);
    assert!(
        counters["vcpus"][0]["exit_io_out"].as_u64() > Some(0),
        "{counters}"
    );
    let Ok(Answer::Configuration(config)) = client.execute(Command::Configuration) else {
        panic!("there is no configuration");
    };
    assert_eq!(config.append.as_deref(), Some("finish=hang"));
    let events = events_until(&mut client, State::Running);
    assert!(
        events.contains(&Event::State {
            state: State::Paused
        }),
        "{events:?}"
    );

    let asked = Instant::now();
    done(&mut client, Command::Stop);
    events_until(&mut client, State::Stopped);
    let ended = machine.running.wait();
    assert!(asked.elapsed() < PROMPT, "{ended}");
    ended.has_status(STATUS_POWER_CUT);
    let last = loop {
        match client.next_event(Some(PATIENCE)) {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(last, Err(ControlError::Ended)), "{last:?}");
}

#[test]
fn a_shell_controls_a_machine() {
    require_kvm!();
    let machine = Controlled::idle();
    let path = machine.path();
    let followed = client(&path, &["events", "--output", "json"]).start();
    assert_eq!(control(&path, &["query"]), "running\n");
    assert_eq!(control(&path, &["pause"]), "done\n");
    followed.wait_for_output(r#""paused""#);
    assert_eq!(
        control(&path, &["--output", "json", "query"]),
        "{\"state\":\"paused\"}\n"
    );
    let line = refused(&path, &["pause"]);
    assert_eq!(
        line,
        "cannot pause the machine: it is paused; resume it first"
    );
    assert_eq!(control(&path, &["json", r#""resume""#]), "\"done\"\n");
    assert!(control(&path, &["metrics"]).contains("\nvcpus.0.exit_io_out "));
    let config = control(&path, &["config"]);
    assert!(config.contains("append = \"finish=hang\""), "{config}");
    let line = refused(
        &path,
        &["json", r#"{"device":{"name":"disk7","command":"job"}}"#],
    );
    assert_eq!(line, "the machine has no device 'disk7'");
    let line = refused(&path, &["ctrl-alt-del"]);
    assert!(line.starts_with("cannot press Ctrl-Alt-Del"), "{line}");
    // The guest listens to neither the button nor the keys.
    assert_eq!(control(&path, &["shutdown"]), "the power is cut\n");
    machine.running.wait().has_status(STATUS_POWER_CUT);
    let ended = followed.wait();
    ended.has_status(0);
    let last: Vec<Value> = ended
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        last.contains(&json!({"event": "state", "state": "stopped"})),
        "{ended}"
    );

    for (name, reason) in [
        ("control.sock", "there is no such socket"),
        ("file", "it is not a socket"),
        ("abandoned", "nobody listens there any more"),
    ] {
        let path = path.with_file_name(name);
        match name {
            "file" => fs::write(&path, "").unwrap(),
            "abandoned" => drop(std::os::unix::net::UnixListener::bind(&path).unwrap()),
            _ => {}
        }
        let line = refused(&path, &["query"]);
        let start = format!("cannot control a machine by '{}': {reason}", path.display());
        assert!(line.starts_with(&start), "{line}");
    }
}

#[test]
fn a_guest_is_asked_to_shut_down() {
    require_kvm!();
    let machine = Controlled::start(
        Bantam::payload("button").append("finish=poweroff"),
        "ready\n",
    );
    let mut client = machine.client();
    let timeout = Duration::from_secs(30);
    assert_eq!(
        client
            .execute(Command::ShutDown {
                timeout: Some(timeout)
            })
            .unwrap(),
        Answer::ShutDown(ShutDown::PowerButton)
    );
    machine.running.wait().passed().has_status(0);
}

#[test]
fn the_socket_is_for_one_machine_after_another() {
    require_kvm!();
    let machine = Controlled::restarting();
    let path = machine.path();
    let mut client = machine.client();
    client.subscribe().unwrap();
    for _ in 0..3 {
        events_until(&mut client, State::Stopped);
        events_until(&mut client, State::Running);
    }
    // It ends, whether it runs now or is about to be started again.
    let asked = Instant::now();
    done(&mut client, Command::Stop);
    let ended = machine.running.wait();
    assert!(asked.elapsed() < PROMPT, "{ended}");
    ended.has_status(STATUS_POWER_CUT);
    assert!(!path.exists());
}

#[test]
fn a_machine_that_waits_to_be_started_again_is_ended() {
    require_kvm!();
    let machine = Controlled::restarting();
    let path = machine.path();
    machine.running.wait_for_error("starting it again in 1.6 s");
    let asked = Instant::now();
    assert_eq!(control(&path, &["query"]), "stopped\n");
    assert_eq!(control(&path, &["stop"]), "done\n");
    let ended = machine.running.wait();
    assert!(asked.elapsed() < Duration::from_millis(1500), "{ended}");
    ended.has_status(STATUS_POWER_CUT);
}

#[test]
fn the_machine_of_the_api_has_a_control_socket() {
    require_kvm!();
    let machine =
        ApiMachine::with(|bantam, folder| bantam.option("--control", folder.join("control.sock")));
    let path = machine.path("control.sock");
    machine.api.get("/");
    assert_eq!(control(&path, &["query"]), "not configured\n");
    let boot_source = bare_metal_boot_source("hello", "finish=hang");
    machine.api.put("/boot-source", &boot_source);
    machine.api.act("InstanceStart");
    machine.running.wait_for_output("PASS\n");
    assert_eq!(control(&path, &["pause"]), "done\n");
    assert_eq!(machine.api.get("/")["state"], "Paused");
    assert_eq!(control(&path, &["stop"]), "done\n");
    machine.running.wait().has_status(0);
    assert!(!path.exists());
}

/// Connects, and reads the greeting.
fn raw(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).expect("the machine listens");
    let timeouts = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(Duration::from_millis(200))));
    timeouts.expect("sockets have timeouts");
    let mut greeting = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte).expect("it greets");
        greeting.extend(byte);
    }
    assert!(greeting.starts_with(b"{\"greeting\":{"));
    stream
}

#[test]
fn misbehaving_clients_hold_up_neither_others_nor_the_end() {
    require_kvm!();
    let machine = Controlled::idle();
    // One never receives, but asks for more and more.
    let mut stalled = raw(&machine.path());
    stalled
        .write_all(b"{\"id\":1,\"subscribe\":true}\n")
        .unwrap();
    let lines = b"{\"id\":1,\"command\":\"metrics\"}\n".repeat(1000);
    while stalled.write_all(&lines).is_ok() {}
    // One says nothing, one sends a part of a request, and one something that is not a request.
    let silent = raw(&machine.path());
    let mut partial = raw(&machine.path());
    partial.write_all(b"{\"id\":1,\"comm").unwrap();
    let mut garbage = raw(&machine.path());
    garbage.write_all(&[0xff; 100_000]).unwrap();
    garbage.write_all(b"\n").unwrap();
    let mut useful = machine.client();
    let begin = Instant::now();
    for _ in 0..20 {
        done(&mut useful, Command::Pause);
        done(&mut useful, Command::Resume);
        assert_eq!(state(&mut useful), State::Running);
    }
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    let _clients = (stalled, silent, partial, garbage);
    machine.end(Signal::SIGTERM);
}

#[test]
fn sixteen_clients_at_once_are_served() {
    require_kvm!();
    let machine = Controlled::idle();
    let mut clients: Vec<_> = (0..16).map(|_| machine.client()).collect();
    thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| {
                client.subscribe().unwrap();
                for _ in 0..10 {
                    // Another client may have paused or resumed it meanwhile.
                    for command in [Command::Pause, Command::Resume] {
                        match client.execute(command) {
                            Ok(Answer::Done) | Err(ControlError::Refused(_)) => {}
                            other => panic!("{other:?}"),
                        }
                    }
                    state(client);
                }
            });
        }
    });
    match ControlClient::connect(&machine.path()) {
        Err(ControlError::Refused(refusal)) => {
            assert!(refusal.message.contains("too many clients"));
        }
        other => panic!("{other:?}"),
    }
    clients.pop();
    machine.end(Signal::SIGINT);
}

#[test]
fn a_killed_machine_leaves_a_socket_that_the_next_one_replaces() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let start = || {
        let bantam = Bantam::payload("hello").append("finish=hang");
        let running = bantam.option("--control", &path).start();
        running.wait_for_output("PASS\n");
        running
    };
    let killed = start();
    let mut client = ControlClient::connect(&path).unwrap();
    killed.signal(Signal::SIGKILL);
    killed.wait();
    let error = client.execute(Command::Query).unwrap_err();
    assert!(matches!(error, ControlError::Ended), "{error:?}");
    assert!(path.exists());
    assert!(refused(&path, &["query"]).contains("nobody listens there any more"));
    let next = start();
    assert_eq!(control(&path, &["query"]), "running\n");
    // A path in use is an error, and stays in use.
    let ended = Bantam::payload("hello").option("--control", &path).finish();
    assert!(
        ended.failed().contains("another process uses it"),
        "{ended}"
    );
    assert_eq!(control(&path, &["stop"]), "done\n");
    next.wait().has_status(STATUS_POWER_CUT);
}

#[test]
fn only_the_owner_and_root_may_connect() {
    require_kvm!();
    if !geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let machine = Controlled::idle();
    let path = machine.path();
    let of_other_user = |path: PathBuf| {
        let connecting = thread::spawn(move || {
            // SAFETY: the system call takes numbers only. It changes the user of this thread, which ends.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
            assert_eq!(changed, 0);
            ControlClient::connect(&path).map(drop).unwrap_err()
        });
        connecting.join().unwrap()
    };
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(machine.folder.path(), 0o755);
    let error = of_other_user(path.clone());
    assert!(matches!(error, ControlError::Denied), "{error:?}");
    // The file's mode is not the only thing that protects the machine.
    mode(&path, 0o666);
    match of_other_user(path.clone()) {
        ControlError::Refused(refusal) => assert!(refusal.message.contains("only the user")),
        other => panic!("{other:?}"),
    }
    assert_eq!(control(&path, &["query"]), "running\n");
    machine.end(Signal::SIGTERM);
}
