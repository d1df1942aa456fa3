//! The host's end of the serial port: terminals, pipes, files and sockets.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{Bantam, STATUS_ERROR, Terminal, require_kvm};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;

/// How long a test waits for output that should arrive at once.
const PATIENCE: Duration = Duration::from_secs(10);

fn hanging() -> Bantam {
    Bantam::payload("hello").append("finish=hang")
}

// --- A terminal -------------------------------------------------------------------------------

#[test]
fn ctrl_a_x_quits_and_ctrl_a_h_helps() {
    require_kvm!();
    let mut terminal = Terminal::new();
    let machine = terminal.at(hanging()).start();
    terminal.wait_for("PASS\r\n");
    terminal.assert_raw();
    terminal.type_keys(b"\x01h");
    machine.wait_for_error("Ctrl-A x   quit");
    // The monitor reacts neither to the interrupt key nor to an x alone.
    terminal.type_keys(b"\x03x\x01x");
    machine.wait().succeeded();
    terminal.assert_restored();
}

#[test]
fn keys_go_to_the_guest_and_are_not_echoed() {
    require_kvm!();
    let mut terminal = Terminal::new();
    let machine = terminal
        .at(Bantam::payload("serial").append("bytes=5 mode=polled"))
        .start();
    terminal.wait_for("ready\r\n");
    terminal.type_keys(b"k\x01\x01\x03\x01be");
    terminal.wait_for("checksum");
    machine.wait().succeeded();
    let seen = String::from_utf8_lossy(&terminal.seen).into_owned();
    assert!(seen.contains("ready\r\nk\x01\x03\x01b\r\n"), "{seen:?}");
    terminal.assert_restored();
}

#[test]
fn a_large_paste_reaches_the_guest_completely() {
    // More than the pipe to the guest and the terminal's own buffers hold.
    const SIZE: usize = 128 << 10;
    require_kvm!();
    let mut terminal = Terminal::new();
    let machine = terminal
        .at(Bantam::payload("serial").append(format!("bytes={SIZE} mode=polled")))
        .limit(Duration::from_secs(200))
        .start();
    terminal.wait_for("ready\r\n");
    let paste: Vec<u8> = (b' '..=b'~').cycle().take(SIZE).collect();
    let mut person = terminal.person.try_clone().unwrap();
    let writer = thread::spawn({
        let paste = paste.clone();
        move || person.write_all(&paste).unwrap()
    });
    let mut chunk = [0; 4096];
    let echo_starts = terminal.seen.len();
    while terminal.seen.len() < echo_starts + SIZE {
        let count = terminal.person.read(&mut chunk).unwrap();
        terminal.seen.extend_from_slice(&chunk[..count]);
    }
    writer.join().unwrap();
    assert!(terminal.seen[echo_starts..][..SIZE] == paste);
    terminal.wait_for("checksum");
    machine.wait().succeeded();
}

#[test]
fn the_terminal_is_restored_when_the_guest_ends_the_machine() {
    require_kvm!();
    for (ending, status) in [("poweroff", 0), ("triple-fault", STATUS_ERROR)] {
        let terminal = Terminal::new();
        let bantam = Bantam::payload("hello").append(format!("finish={ending}"));
        let ended = terminal.at(bantam).finish();
        assert_eq!(ended.status.code(), Some(status), "{ended}");
        terminal.assert_restored();
    }
}

#[test]
fn the_terminal_is_restored_when_a_signal_stops_the_machine() {
    require_kvm!();
    let mut terminal = Terminal::new();
    let machine = terminal.at(hanging()).start();
    terminal.wait_for("PASS\r\n");
    terminal.assert_raw();
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
    terminal.assert_restored();
}

#[test]
fn the_terminal_is_restored_when_the_monitor_crashes() {
    require_kvm!();
    for signal in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGABRT] {
        let mut terminal = Terminal::new();
        let machine = terminal.at(hanging()).start();
        terminal.wait_for("PASS\r\n");
        terminal.assert_raw();
        machine.signal(signal);
        let ended = machine.wait();
        assert_eq!(ended.status.signal(), Some(signal as i32), "{ended}");
        terminal.assert_restored();
    }
}

#[test]
fn the_terminal_is_given_back_while_the_monitor_is_suspended() {
    require_kvm!();
    let mut terminal = Terminal::new();
    let machine = terminal.at(hanging()).start();
    terminal.wait_for("PASS\r\n");
    machine.signal(Signal::SIGTSTP);
    wait_until(|| process_state(machine.pid().as_raw()) == 'T');
    terminal.assert_restored();
    machine.signal(Signal::SIGCONT);
    wait_until(|| terminal.settings() != terminal.original);
    terminal.assert_raw();
    terminal.type_keys(b"\x01x");
    machine.wait().succeeded();
    terminal.assert_restored();
}

/// Returns the state of a process (proc(5), `/proc/PID/stat`).
fn process_state(pid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process exists");
    let after_name = stat.rsplit_once(") ").expect("the name is in parentheses");
    after_name.1.chars().next().expect("the state is next")
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it did not happen in time");
        thread::sleep(Duration::from_millis(2));
    }
}

// --- Pipes and files in its place ---------------------------------------------------------------

fn hello_alone() -> Bantam {
    Bantam::payload("hello")
        .option("--cmdline", "alone")
        .option("--rng", "off")
        .option("--host-workarounds", "off")
}

const HELLO_ALONE: &str = "hello from ring 3 via pvh\ncommand line: alone\nPASS\n";

#[test]
fn standard_output_has_what_the_guest_prints_and_nothing_else() {
    require_kvm!();
    for log in ["off", "trace"] {
        let ended = hello_alone().option("--log", log).finish();
        assert_eq!(ended.succeeded().text(), HELLO_ALONE);
        assert_eq!(ended.stderr.is_empty(), log == "off", "{ended}");
    }
}

#[test]
fn piped_input_is_for_the_guest_alone() {
    require_kvm!();
    let mut machine = Bantam::payload("serial")
        .stdin(Stdio::piped())
        .append("bytes=4 mode=polled")
        .start();
    machine.wait_for_output("ready\n");
    // At a terminal, this would print the help and end the machine.
    machine.send(b"\x01h\x01x");
    let ended = machine.wait();
    ended.passed().printed("ready\n\x01h\x01x\n");
}

#[test]
fn a_guest_runs_to_its_end_without_standard_streams() {
    require_kvm!();
    for (redirection, output) in [
        ("<&-", HELLO_ALONE),
        ("</dev/null", HELLO_ALONE),
        ("2>&-", HELLO_ALONE),
        (">&-", ""),
        ("<&- >&- 2>&-", ""),
    ] {
        let script = format!("exec \"$@\" {redirection}");
        let launcher = ["sh", "-c", &script, "sh"];
        let ended = hello_alone().launcher(launcher).finish();
        assert_eq!(ended.succeeded().text(), output, "{redirection}");
    }
}

#[test]
fn a_reader_that_leaves_does_not_hold_the_guest_up() {
    require_kvm!();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = Bantam::payload("serial")
        .append("print-kib=96")
        .stdout(writer)
        .option("--log", "info")
        .finish();
    ended.succeeded();
    assert!(
        ended.stderr.contains("has ended: the guest has rebooted"),
        "{ended}"
    );
}

#[test]
fn a_stop_does_not_wait_for_a_reader_that_has_stopped_reading() {
    require_kvm!();
    let (_reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let machine = Bantam::payload("serial")
        .append("print-kib=1024")
        .stdout(writer)
        .option("--log", "info")
        .start();
    machine.wait_for_error("kernel command line");
    // Until every buffer on the way is full.
    thread::sleep(Duration::from_millis(1500));
    let asked = Instant::now();
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_file_gets_the_output_after_what_it_has() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    for runs in 1..=2 {
        let ended = hello_alone()
            .option("--serial", format!("file={}", path.display()))
            .finish();
        assert_eq!(ended.succeeded().text(), "");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, HELLO_ALONE.repeat(runs));
    }
}

#[test]
fn output_can_go_nowhere() {
    require_kvm!();
    let ended = hello_alone().option("--serial", "none").finish();
    assert_eq!(ended.succeeded().text(), "");
    assert_eq!(ended.stderr, "");
}

// --- A pseudoterminal and a socket of its own ---------------------------------------------------

#[test]
fn a_pseudoterminal_is_named_and_leads_to_the_guest() {
    require_kvm!();
    let machine = Bantam::payload("serial")
        .option("--serial", "pty")
        .append("bytes=3 mode=polled finish=hang")
        .start();
    let line = machine.wait_for_error("\n");
    let path = line
        .strip_prefix("serial console: ")
        .unwrap_or_else(|| panic!("{line}"))
        .trim_end()
        .to_owned();
    let mut user = File::options().read(true).write(true).open(&path).unwrap();
    let mut seen = Vec::new();
    read_until(&mut user, &mut seen, b"ready\n");
    user.write_all(b"x\ry").unwrap();
    // In raw mode: no character is translated.
    read_until(&mut user, &mut seen, b"ready\nx\ry\n");
    read_until(&mut user, &mut seen, b"PASS\n");
    drop(user);
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
    assert!(!Path::new(&path).exists());
}

fn read_until(from: &mut impl Read, seen: &mut Vec<u8>, wanted: &[u8]) {
    while !seen.windows(wanted.len()).any(|window| window == wanted) {
        let mut bytes = [0; 256];
        match from.read(&mut bytes) {
            Ok(count @ 1..) => seen.extend_from_slice(&bytes[..count]),
            other => panic!("{other:?} after {}", String::from_utf8_lossy(seen)),
        }
    }
}

#[test]
fn a_socket_serves_one_client_after_another() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let machine = Bantam::payload("serial")
        .option("--serial", format!("socket={}", path.display()))
        .append("bytes=1000000 mode=polled")
        .start();
    wait_until(|| path.exists());
    for byte in b"abc" {
        let mut client = UnixStream::connect(&path).unwrap();
        talk(&mut client, *byte);
    }
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
    assert!(!path.exists(), "the socket has outlived its machine");
}

#[test]
fn late_clients_of_a_socket_get_the_output_and_all_are_served_at_once() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let machine = Bantam::payload("serial")
        .option("--serial", format!("socket={}", path.display()))
        .append("print-kib=64 finish=hang")
        .start();
    wait_until(|| path.exists());
    let connect = || {
        let client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    };
    let mut first = connect();
    let mut output = Vec::new();
    read_until(&mut first, &mut output, b"PASS\n");
    assert!(output.len() > 64 << 10);
    // The early client has not taken it from later ones.
    for _ in 0..15 {
        let mut seen = Vec::new();
        read_until(&mut connect(), &mut seen, b"PASS\n");
        assert!(seen == output);
    }
    // The guest does not read, so this waits for ever; the machine still ends.
    first.write_all(b"unread").unwrap();
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
}

#[test]
fn clients_of_a_socket_type_and_see_what_all_type() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let machine = Bantam::payload("serial")
        .option("--serial", format!("socket={}", path.display()))
        .append("bytes=6 mode=polled finish=hang")
        .start();
    wait_until(|| path.exists());
    let mut clients: Vec<_> = (0..3)
        .map(|_| {
            let client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            (client, Vec::new())
        })
        .collect();
    read_until(&mut clients[0].0, &mut Vec::new(), b"ready\n");
    for index in 0..3 {
        let byte = b'a' + index as u8;
        clients[index].0.write_all(&[byte, byte]).unwrap();
        for (client, seen) in &mut clients {
            read_until(client, seen, &[byte, byte]);
        }
    }
    for (client, seen) in &mut clients {
        read_until(client, seen, b"PASS\n");
    }
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}

/// Sends a byte until the guest sends it back: input before the guest is ready is lost.
fn talk(client: &mut UnixStream, byte: u8) {
    client
        .set_read_timeout(Some(Duration::from_millis(500)))
        .expect("sockets have time-outs");
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "the guest sent nothing back");
        client.write_all(&[byte]).expect("the monitor is connected");
        let mut bytes = [0; 256];
        match client.read(&mut bytes) {
            Ok(count) if bytes[..count].contains(&byte) => return,
            Ok(0) => panic!("the monitor hung up"),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("cannot read: {error}"),
        }
    }
}
