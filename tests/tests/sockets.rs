//! Ownership of a socket: after a crash, while it is in use, and if several processes want it.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    ApiClient, Bantam, Ended, Running, bare_metal_boot_source, require_kvm, require_namespaces,
    unprivileged, with_mounts,
};
use nix::sys::signal::Signal;
use serde_json::json;

/// How long a test waits, on a busy host, for an event that should happen at once.
const PATIENCE: Duration = Duration::from_secs(30);

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().expect("there is a folder for temporary files"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("it can be read");
        let names = entries.map(|entry| {
            let name = entry.expect("it can be read").file_name();
            name.into_string().expect("tests use ASCII")
        });
        names.collect()
    }
}

fn api(socket: &Path) -> Bantam {
    Bantam::api(socket).option("--level", "Error")
}

fn wait_for(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        assert!(Instant::now() < deadline, "no {}", path.display());
        thread::sleep(Duration::from_millis(1));
    }
}

/// Leaves a socket at `path`, as a killed process does.
fn abandon(path: &Path) {
    drop(UnixListener::bind(path).expect("the folder can be written to"));
}

#[track_caller]
fn assert_refused(ended: &Ended, reason: &str) {
    let line = ended.failed_with_one_line();
    assert!(line.contains("cannot listen on"), "{ended}");
    assert!(line.contains(reason), "{ended}");
}

fn stop(machine: Running) {
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}

#[test]
fn a_path_is_free_as_soon_as_its_user_is_killed() {
    require_kvm!();
    let folder = Folder::new();
    let at = |name: &str| folder.path(name);
    let serial_file = format!("file={}", at("serial.log").display());
    let serial_socket = format!("socket={}", at("serial").display());
    let vsock = format!("cid=3,socket={}", at("vsock").display());
    for (option, value) in [
        ("--serial", &serial_file),
        ("--serial", &serial_socket),
        ("--vsock", &vsock),
    ] {
        let bantam = |finish| {
            let bantam = Bantam::payload("hello").append(format!("finish={finish}"));
            bantam.option(option, value).option("--log", "info")
        };
        let mut machine = bantam("hang").start();
        for _ in 0..5 {
            // The guest runs, so that everything exists.
            machine.wait_for_error("kernel command line");
            wait_for(&at(match value.split_once('=') {
                Some(("file", _)) => "serial.log",
                Some(("socket", _)) => "serial",
                _ => "vsock",
            }));
            // Without waiting for the end of the process.
            machine.signal(Signal::SIGKILL);
            machine = bantam("hang").start();
        }
        machine.wait_for_error("kernel command line");
        machine.signal(Signal::SIGKILL);
        bantam("poweroff").finish().succeeded();
    }
}

#[test]
fn an_api_is_served_again_as_soon_as_its_process_is_killed() {
    let folder = Folder::new();
    let socket = folder.path("api.socket");
    for _ in 0..5 {
        let monitor = api(&socket).start();
        let client = ApiClient::new(&socket);
        assert_eq!(client.get("/")["state"], "Not started");
        monitor.signal(Signal::SIGKILL);
    }
    let monitor = api(&socket).start();
    let deadline = Instant::now() + PATIENCE;
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "nobody listens");
        thread::sleep(Duration::from_millis(1));
    }
    ApiClient::new(&socket).get("/");
    stop(monitor);
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn of_many_monitors_that_start_at_once_one_gets_an_abandoned_socket() {
    const STARTERS: usize = 10;
    let folder = Folder::new();
    let socket = folder.path("api.socket");
    abandon(&socket);
    let start = Barrier::new(STARTERS);
    let monitors: Vec<_> = thread::scope(|scope| {
        let starters: Vec<_> = (0..STARTERS)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    api(&socket).start()
                })
            })
            .collect();
        starters
            .into_iter()
            .map(|starter| starter.join().expect("it starts a process"))
            .collect()
    });
    let winner = api_process(&socket);
    let (winners, others): (Vec<_>, Vec<_>) = monitors
        .into_iter()
        .partition(|monitor| monitor.pid().as_raw() == winner);
    assert_eq!(winners.len(), 1);
    for other in others {
        assert_refused(&other.wait(), "another process uses it");
    }
    ApiClient::new(&socket).get("/");
    for winner in winners {
        stop(winner);
    }
    assert_eq!(folder.names(), [""; 0]);
}

/// Returns the process that listens to a socket.
fn api_process(socket: &Path) -> i32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            let credentials =
                nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials);
            return credentials.expect("it is a Unix socket").pid();
        }
        assert!(Instant::now() < deadline, "nobody listens");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn nobody_removes_the_socket_of_another() {
    let folder = Folder::new();
    let socket = folder.path("api.socket");
    let first = api(&socket).start();
    ApiClient::new(&socket).get("/");
    fs::remove_file(&socket).expect("it is there");
    let second = api(&socket).start();
    ApiClient::new(&socket).get("/");
    stop(first);
    ApiClient::new(&socket).get("/");
    let third = api(&socket).finish();
    assert_refused(&third, "another process uses it; choose another path");
    ApiClient::new(&socket).get("/");
    stop(second);
    assert!(!socket.exists());
}

#[test]
fn no_guest_runs_if_the_api_cannot_be_served() {
    require_kvm!();
    let folder = Folder::new();
    let socket = folder.path("api.socket");
    let config = folder.path("config.json");
    let machine = json!({
        "boot-source": bare_metal_boot_source("hello", "finish=hang"),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    });
    fs::write(&config, machine.to_string()).expect("the folder can be written to");
    let _taken = UnixListener::bind(&socket).expect("the folder can be written to");
    let ended = api(&socket).option("--config-file", &config).finish();
    assert_refused(&ended, "another process uses it");
    assert_eq!(ended.text(), "");
}

#[test]
fn a_check_whether_the_serial_port_is_in_use_does_not_disturb_its_client() {
    require_kvm!();
    let folder = Folder::new();
    let socket = folder.path("serial");
    let option = format!("socket={}", socket.display());
    let bantam = || Bantam::payload("hello").option("--serial", &option);
    let machine = bantam().append("finish=hang").start();
    wait_for(&socket);
    let mut client = UnixStream::connect(&socket).expect("the machine listens");
    let timeout = client.set_read_timeout(Some(PATIENCE));
    timeout.expect("sockets have time-outs");
    let mut seen = Vec::new();
    while !seen.ends_with(b"PASS\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).expect("the guest prints");
        seen.extend(byte);
    }
    assert_refused(&bantam().finish(), "another process uses it");
    client.set_nonblocking(true).expect("sockets can be");
    let error = client.read(&mut [0]).expect_err("nothing more comes");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    stop(machine);
}

#[test]
fn each_error_has_the_remedy_that_helps() {
    let folder = Folder::new();
    let refused = |path: &Path, reason: &str| assert_refused(&api(path).finish(), reason);
    let file = folder.path("file");
    fs::write(&file, "precious").expect("the folder can be written to");
    refused(&file, "a file that is not a socket is in its place");
    assert_eq!(fs::read(&file).expect("it is there"), b"precious");
    refused(&folder.path("none/socket"), "create the folder first");
    let long = folder.path(&"s".repeat(120));
    refused(&long, "choose a shorter one");
    let closed = folder.path("closed");
    fs::create_dir(&closed).expect("the folder can be written to");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o500)).expect("it is ours");
    let ended = api(&closed.join("socket"))
        .launcher(unprivileged())
        .finish();
    assert_refused(&ended, "permission denied; choose a path in a folder");
    assert!(!ended.failed_with_one_line().contains("remove"), "{ended}");
}

#[test]
fn a_read_only_file_system_is_named() {
    require_namespaces!();
    let folder = Folder::new();
    let mount = format!("mount -t tmpfs -o ro tmpfs '{}'", folder.path("").display());
    let ended = api(&folder.path("socket"))
        .launcher(with_mounts(&mount))
        .finish();
    assert_refused(&ended, "read-only file system; choose a path on one");
}
