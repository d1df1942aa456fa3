//! A log and messages that nobody reads: no machine waits for a reader.
//!
//! The pipe used as standard error here is full from the start, so the first line would already
//! block a thread that writes it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    ApiClient, ApiMachine, Bantam, Ended, Running, bare_metal_boot_source, monitor, payload,
    require_kvm,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::termios::{FlowArg, tcflow};
use nix::unistd::{mkfifo, pipe2, write};
use serde_json::json;

/// How long the process may take to end. Two seconds are specified; a busy host gets more.
const END_TIME: Duration = Duration::from_secs(8);

/// A full pipe in blocking mode.
struct FullPipe {
    reader: File,
    writer: OwnedFd,
}

impl FullPipe {
    fn new() -> FullPipe {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).expect("there are descriptors");
        fill(&writer);
        FullPipe {
            reader: reader.into(),
            writer,
        }
    }

    /// Returns an end for the monitor.
    fn end(&self) -> OwnedFd {
        self.writer.try_clone().expect("there are descriptors")
    }

    /// Returns all lines after those that filled the pipe. The monitor has ended.
    fn lines(self) -> Vec<String> {
        assert_blocking(&self.writer);
        drop(self.writer);
        let lines = BufReader::new(self.reader).split(b'\n');
        lines
            .map(|line| String::from_utf8_lossy(&line.expect("it is a pipe")).into_owned())
            .filter(|line| !line.starts_with(FILLING))
            .collect()
    }
}

const FILLING: &str = "filling";

/// Fills a pipe, and leaves it in blocking mode.
fn fill(pipe: impl AsFd) {
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("it can be set");
    let line = format!("{FILLING:-<127}\n");
    loop {
        match write(&pipe, line.as_bytes()) {
            Ok(_) => {}
            Err(Errno::EAGAIN) => break,
            Err(error) => panic!("a pipe cannot be filled: {error}"),
        }
    }
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::empty())).expect("it can be set");
}

/// Programs that share standard error may not expect it to be non-blocking.
#[track_caller]
fn assert_blocking(descriptor: impl AsFd) {
    let flags = fcntl(descriptor, FcntlArg::F_GETFL).expect("it is open");
    assert_eq!(flags & OFlag::O_NONBLOCK.bits(), 0);
}

/// Requests the instance `count` times, on one connection.
#[track_caller]
fn get_often(api: &ApiClient, count: usize) {
    let mut stream = api.connect();
    let mut answers = BufReader::new(stream.try_clone().expect("there are descriptors"));
    for _ in 0..count {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .expect("the server takes requests");
        let mut length = 0;
        let mut line = String::new();
        answers.read_line(&mut line).expect("there is an answer");
        assert_eq!(line, "HTTP/1.1 200 OK\r\n");
        while line != "\r\n" {
            line.clear();
            answers.read_line(&mut line).expect("it has a head");
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("it is a number");
            }
        }
        let mut body = vec![0; length];
        answers.read_exact(&mut body).expect("it has a body");
    }
}

/// Ends the process as a user does, and checks that it does not take long.
#[track_caller]
fn terminate(running: Running) -> Ended {
    let asked = Instant::now();
    running.signal(Signal::SIGTERM);
    let ended = running.wait();
    let time = asked.elapsed();
    assert!(time < END_TIME, "it took {time:?} to end\n{ended}");
    ended
}

// --- The API --------------------------------------------------------------------------------------

#[test]
fn an_api_whose_log_nobody_reads_goes_on() {
    for level in ["Info", "Debug"] {
        let pipe = FullPipe::new();
        let machine =
            ApiMachine::with(|bantam, _| bantam.option("--level", level).stderr(pipe.end()));
        get_often(&machine.api, 3000);
        machine.refused("GET", "/nothing", &json!(null));
        terminate(machine.running).succeeded();
        assert_blocking(&pipe.writer);
    }
}

#[test]
fn lines_that_find_no_room_are_counted_and_reported() {
    let pipe = FullPipe::new();
    let machine =
        ApiMachine::with(|bantam, _| bantam.option("--level", "Debug").stderr(pipe.end()));
    // More than the monitor keeps.
    get_often(&machine.api, 6000);
    let reader = pipe.reader.try_clone().expect("there are descriptors");
    let mut lines = BufReader::new(reader).lines();
    let count = lines
        .by_ref()
        .map(|line| line.expect("it is a pipe"))
        .find_map(|line| {
            let (_, notice) = line.split_once("] ")?;
            let count =
                notice.strip_suffix(" lines were lost here: nobody read them fast enough")?;
            count.parse::<u32>().ok()
        });
    assert!(count.is_some_and(|count| (100..6000).contains(&count)));

    // Later lines are there again.
    machine.refused("GET", "/nothing", &json!(null));
    let mut lines = lines.map(|line| line.expect("it is a pipe"));
    assert!(lines.any(|line| line.contains("GET /nothing is refused")));
    terminate(machine.running).succeeded();
}

#[test]
fn a_named_pipe_for_the_log_may_be_full() {
    let open = |path: &Path| {
        mkfifo(path, Mode::S_IRWXU).expect("the folder can be written to");
        let pipe = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)
            .expect("it is there");
        fill(&pipe);
        pipe
    };
    let mut pipe = None;
    let machine = ApiMachine::with(|bantam, folder| {
        let path = folder.join("log");
        pipe = Some(open(&path));
        bantam.option("--level", "Debug").option("--log-path", path)
    });
    get_often(&machine.api, 3000);
    // Another pipe, and then a file.
    let second = machine.path("second");
    let _second = open(&second);
    machine
        .api
        .put("/logger", &json!({"log_path": second, "level": "Debug"}));
    get_often(&machine.api, 3000);
    let log = machine.path("file");
    machine.api.put("/logger", &json!({"log_path": log}));
    get_often(&machine.api, 1);
    terminate(machine.running).succeeded();
    drop(pipe);
}

#[test]
fn under_the_name_firecracker_it_goes_on_too() {
    let folder = tempfile::tempdir().expect("there is room for temporary files");
    let firecracker = folder.path().join("firecracker");
    symlink(monitor(), &firecracker).expect("the folder can be written to");
    let socket = folder.path().join("api.socket");
    let pipe = FullPipe::new();
    let running = Bantam::new(["--api-sock"])
        .argument(&socket)
        .option("--level", "Debug")
        .launcher([
            "sh".as_ref(),
            "-c".as_ref(),
            // The first argument is the program itself, which is replaced by its other name.
            "shift; exec \"$0\" \"$@\"".as_ref(),
            firecracker.as_os_str(),
        ])
        .stderr(pipe.end())
        .start();
    get_often(&ApiClient::new(&socket), 3000);
    terminate(running).succeeded();
}

#[test]
fn a_machine_of_the_api_runs_and_ends() {
    require_kvm!();
    for finish in ["poweroff", "hang"] {
        let pipe = FullPipe::new();
        let machine =
            ApiMachine::with(|bantam, _| bantam.option("--level", "Debug").stderr(pipe.end()));
        get_often(&machine.api, 1000);
        let boot_source = bare_metal_boot_source("hello", &format!("finish={finish}"));
        machine.api.put("/boot-source", &boot_source);
        machine.api.act("InstanceStart");
        machine.running.wait_for_output("PASS\n");
        let ended = match finish {
            "poweroff" => machine.running.wait(),
            _ => terminate(machine.running),
        };
        ended.passed();
    }
}

#[test]
fn a_terminal_that_is_stopped_holds_up_nobody() {
    let terminal = openpty(None, None).expect("the host has pseudoterminals");
    tcflow(&terminal.slave, FlowArg::TCOOFF).expect("it is a terminal");
    let end = terminal.slave.try_clone().expect("there are descriptors");
    let machine = ApiMachine::with(|bantam, _| bantam.option("--level", "Debug").stderr(end));
    get_often(&machine.api, 3000);
    terminate(machine.running).succeeded();
    assert_blocking(&terminal.slave);
}

// --- Machines -------------------------------------------------------------------------------------

/// Runs a machine that logs all it can, to a pipe that nobody reads.
fn silenced(guest: &str, words: &str) -> (FullPipe, Bantam) {
    let pipe = FullPipe::new();
    let bantam = Bantam::payload(guest)
        .option("--log", "trace")
        .append(words)
        .stderr(pipe.end());
    (pipe, bantam)
}

#[test]
fn a_machine_whose_log_nobody_reads_goes_on() {
    require_kvm!();
    let (_pipe, bantam) = silenced("hello", "finish=poweroff");
    bantam.finish().passed();

    let (_pipe, bantam) = silenced("hello", "finish=hang");
    let running = bantam.start();
    running.wait_for_output("PASS\n");
    terminate(running).passed();
}

#[test]
fn a_hostile_guest_that_fills_the_log_holds_up_nobody() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room for temporary files");
    let disk = folder.path().join("disk");
    File::create(&disk)
        .and_then(|file| file.set_len(1 << 20))
        .expect("there is room for temporary files");
    let (_pipe, bantam) = silenced("hostile", "seed=3");
    bantam.disk(&disk, "").finish().passed();
}

#[test]
fn a_machine_that_starts_again_and_again_goes_on() {
    require_kvm!();
    let (_pipe, bantam) = silenced("hello", "finish=reset");
    let (output, end) = pipe2(OFlag::O_CLOEXEC).expect("there are descriptors");
    let running = bantam.option("--on-reboot", "restart").stdout(end).start();
    let lines = BufReader::new(File::from(output)).lines();
    let passes = lines.filter(|line| line.as_ref().is_ok_and(|line| line == "PASS"));
    assert_eq!(passes.take(3).count(), 3);
    terminate(running).succeeded();
}

#[test]
fn a_machine_that_cannot_start_tells_a_late_reader_why() {
    let missing = Path::new("/missing");
    let pipe = FullPipe::new();
    let ended = Bantam::run(missing).stderr(pipe.end()).finish();
    assert_eq!(ended.status.code(), Some(125), "{ended}");

    let pipe = FullPipe::new();
    let running = Bantam::run(missing).stderr(pipe.end()).start();
    let reader = thread::spawn(move || pipe.lines());
    let ended = running.wait();
    assert_eq!(ended.status.code(), Some(125), "{ended}");
    let lines = reader.join().expect("reading does not fail");
    assert!(
        lines.last().is_some_and(|line| line.starts_with("error: ")),
        "{lines:?}"
    );
}

#[test]
fn bounds_of_the_log_hold_across_restarts() {
    require_kvm!();
    // For the entropy device, the disk and the serial port: one burst each about the guest and the
    // host, and the line that says that there was more.
    const MAX_LINES: usize = 3 * 2 * 12;
    let folder = tempfile::tempdir().expect("there is room for temporary files");
    let disk = folder.path().join("disk");
    File::create(&disk)
        .and_then(|file| file.set_len(1 << 20))
        .expect("there is room for temporary files");
    let (output, end) = pipe2(OFlag::O_CLOEXEC).expect("there are descriptors");
    let running = Bantam::payload("hostile")
        .append("seed=5 rounds=20 finish=reset")
        .disk(&disk, "")
        .option("--on-reboot", "restart")
        .stdout(end)
        .start();
    let lines = BufReader::new(File::from(output)).lines();
    let passes = lines.filter(|line| line.as_ref().is_ok_and(|line| line == "PASS"));
    assert_eq!(passes.take(3).count(), 3);
    let ended = terminate(running);
    let warnings = ended.stderr.lines().filter(|line| line.contains(" WARN "));
    // Each minute allows each of them another line and the hint that there was more.
    let minutes = ended.duration.as_secs() as usize / 60;
    let count = warnings.count();
    assert!((1..=MAX_LINES + 12 * minutes).contains(&count), "{ended}");
}

// --- Colors and descriptors -----------------------------------------------------------------------

#[test]
fn the_log_has_colors_if_the_user_wants_them() {
    require_kvm!();
    let kernel = payload("hello");
    for (environment, has_colors) in [
        (["TERM=xterm", "A=b"], true),
        (["TERM=xterm", "NO_COLOR="], true),
        (["TERM=xterm", "NO_COLOR=1"], false),
        (["TERM=xterm", "CLICOLOR=0"], false),
        (["TERM=dumb", "A=b"], false),
    ] {
        let terminal = openpty(None, None).expect("the host has pseudoterminals");
        let launcher = ["env", "-i"].into_iter().chain(environment);
        let ended = Bantam::run(&kernel)
            .launcher(launcher)
            .append("finish=poweroff")
            .option("--log", "info")
            .stderr(terminal.slave)
            .finish();
        ended.passed();
        let mut seen = vec![0; 1 << 16];
        let mut person = File::from(terminal.master);
        let count = person.read(&mut seen).expect("lines wait in the terminal");
        let seen = String::from_utf8_lossy(&seen[..count]);
        assert!(seen.contains("INFO"), "{seen}");
        assert_eq!(seen.contains('\x1b'), has_colors, "{environment:?}: {seen}");
    }
}

#[test]
fn a_lack_of_descriptors_is_logged_when_it_begins_and_when_it_is_over() {
    let machine = ApiMachine::with(|bantam, _| {
        bantam.launcher(["prlimit", "--nofile=40", "--"].map(str::to_owned))
    });
    let clients: Vec<_> = (0..60).map(|_| machine.api.connect()).collect();
    machine.running.wait_for_error("cannot accept clients");
    // In this time each client that is accepted takes the place of another, after an attempt that fails.
    thread::sleep(Duration::from_millis(500));
    // Idle clients do not keep others out.
    assert_eq!(machine.api.get("/")["state"], "Not started");
    drop(clients);
    let log = machine.running.wait_for_error("clients are accepted again");
    assert_eq!(log.matches("cannot accept clients").count(), 1, "{log}");
    assert_eq!(machine.api.get("/")["state"], "Not started");
    let ended = machine.stop();
    assert!(!ended.stderr.contains("os error"), "{ended}");
}
