//! The virtio console and channels, with guests that send back what they receive.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{Bantam, Kernel, RootFileSystem, pattern, require_kvm};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;

/// How long a program of the host waits for the guest.
const LIMIT: Duration = Duration::from_secs(60);
/// How long Linux may take for each step, its boot included.
const LINUX_LIMIT: Duration = Duration::from_secs(240);
/// How long a stream must take nothing for its other end to count as stopped.
const STALL_MS: u16 = 300;
const MIB: usize = 1 << 20;

fn client(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Reads exactly what is expected.
fn expect(stream: &mut UnixStream, expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).unwrap();
    assert!(bytes == expected, "{}", String::from_utf8_lossy(&bytes));
}

/// Sends bytes, and checks that the same bytes come back.
fn exchange(stream: &UnixStream, bytes: &[u8]) {
    thread::scope(|scope| {
        scope.spawn(|| (&mut &*stream).write_all(bytes).unwrap());
        let mut answer = vec![0; bytes.len()];
        (&mut &*stream).read_exact(&mut answer).unwrap();
        assert!(answer == bytes);
    });
}

#[test]
fn a_guest_writes_to_its_console_with_and_without_a_driver() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("log");
    Bantam::payload("console")
        .option("--console", format!("file={}", file.display()))
        .append("reset")
        .finish()
        .passed()
        .printed("console ready");
    assert_eq!(fs::read(&file).unwrap(), b"early\nhello\nagain\n");
}

#[test]
fn a_mebibyte_moves_both_ways_and_a_slow_reader_loses_none_of_it() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let machine = Bantam::payload("console")
        .option("--console", format!("socket={}", socket.display()))
        .append(format!("bytes={} reset", 2 * MIB))
        .start();
    machine.wait_for_output("console ready\n");
    let mut stream = client(&socket);
    let bytes = pattern(1, 0, 2 * MIB);
    let (first, second) = bytes.split_at(MIB);
    exchange(&stream, first);

    // It reads nothing until all buffers on the way are full.
    stream.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while sent < MIB {
        match stream.write(&second[sent..]) {
            Ok(count) => sent += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                let mut events = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut events, PollTimeout::from(STALL_MS)).unwrap() == 0 {
                    break;
                }
            }
        }
    }
    assert!(sent < MIB, "the guest has only 16 buffers of 4 KiB");
    stream.set_nonblocking(false).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| (&mut &stream).write_all(&second[sent..]).unwrap());
        let mut answer = vec![0; MIB];
        (&mut &stream).read_exact(&mut answer).unwrap();
        assert!(answer == second);
    });
    // The connection outlives a reset of the device.
    expect(&mut stream, b"again\n");
    machine.wait().passed();
    assert!(!socket.exists());
}

#[test]
fn channels_carry_data_and_report_when_an_end_is_closed() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let sockets = ["one", "two"].map(|name| folder.path().join(name));
    let mut bantam = Bantam::payload("console").append(format!("bytes={MIB} close"));
    for socket in &sockets {
        let name = socket.file_name().unwrap().to_str().unwrap();
        let channel = format!("name=org.example.{name},socket={}", socket.display());
        bantam = bantam.option("--channel", channel);
    }
    let machine = bantam.start();
    machine.wait_for_output("channels org.example.one org.example.two\n");
    let [mut one, two] = [0, 1].map(|index| client(&sockets[index]));
    thread::scope(|scope| {
        scope.spawn(|| exchange(&two, &pattern(2, 0, MIB)));
        exchange(&one, &pattern(1, 0, MIB));
    });
    machine.wait_for_output("channels done\n");
    // The guest sends its last bytes and closes the channel: the client sees the end.
    let mut rest = Vec::new();
    one.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye");
    machine.wait_for_output("org.example.one is closed\n");
    let mut next = client(&sockets[0]);
    expect(&mut next, b"back");
    let ended = machine.wait();
    ended.passed();
    assert!(
        ended
            .text()
            .ends_with("org.example.one is open\nok: channels\nPASS\n")
    );
}

#[test]
fn a_client_that_has_sent_all_still_gets_its_answer() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let machine = Bantam::payload("console")
        .option("--channel", format!("name=a,socket={}", socket.display()))
        .append("bytes=8")
        .start();
    machine.wait_for_output("channels a\n");
    let mut stream = client(&socket);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"question");
    machine.wait().passed();
}

fn set_size(terminal: &impl AsRawFd, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads `size`, which lives until the call returns.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    assert_eq!(result, 0);
}

#[test]
fn the_guest_learns_the_size_of_the_terminal() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("serial");
    let terminal = openpty(None, None).unwrap();
    set_size(&terminal.master, 80, 24);
    let end = || terminal.slave.try_clone().unwrap();
    let machine = Bantam::payload("console")
        .option("--console", "stdio")
        .option("--serial", format!("file={}", log.display()))
        .append("sizes=2")
        .stdin(end())
        .stdout(end())
        .start();
    let wait_for = |text: &str| {
        let deadline = Instant::now() + LIMIT;
        while !fs::read_to_string(&log).is_ok_and(|seen| seen.contains(text)) {
            assert!(Instant::now() < deadline, "no {text}");
            thread::sleep(Duration::from_millis(2));
        }
    };
    wait_for("size 80x24\n");
    set_size(&terminal.master, 132, 50);
    machine.signal(Signal::SIGWINCH);
    wait_for("size 132x50\n");
    machine.wait().succeeded();
    wait_for("PASS\n");
}

#[test]
fn the_console_at_standard_output_is_alone_there() {
    require_kvm!();
    let ended = Bantam::payload("console")
        .option("--console", "stdio")
        .finish();
    assert_eq!(ended.succeeded().text(), "early\nhello\n");
    let error = Bantam::payload("console")
        .option("--console", "stdio")
        .option("--serial", "stdio")
        .finish();
    assert_eq!(
        error.failed_with_one_line(),
        "both the serial port and the console lead to standard input and output: give one of \
         them another end"
    );
}

#[test]
fn pseudoterminals_are_named() {
    require_kvm!();
    let machine = Bantam::payload("console")
        .option("--channel", "name=agent,pty")
        .append("bytes=2")
        .start();
    machine.wait_for_output("channels agent\n");
    // The name is printed before the guest runs, or just after.
    let said = machine.wait_for_error("\n");
    let path = said.trim().strip_prefix("channel 'agent': ").unwrap();
    let mut terminal = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    terminal.write_all(b"hi").unwrap();
    let mut answer = [0; 2];
    terminal.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hi");
    machine.wait().passed();
}

#[test]
fn linux_has_a_console_of_the_terminals_size_and_named_channels() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent");
    let terminal = openpty(None, None).unwrap();
    set_size(&terminal.master, 100, 30);
    let end = || terminal.slave.try_clone().unwrap();
    let machine = Bantam::linux(Kernel::Small)
        .disk(&RootFileSystem::new().ext4, ",ro")
        .option("--console", "stdio")
        .option(
            "--channel",
            format!("name=org.example.agent,socket={}", socket.display()),
        )
        .stdin(end())
        .stdout(end())
        .start();
    let mut screen = Screen::new(fs::File::from(terminal.master.try_clone().unwrap()));
    // The kernel has logged it before the console's driver had started, and still has it in its buffer.
    screen.wait_for("virtio_blk virtio0:");
    screen.wait_for("bantam: init");

    // Input is echoed; the test must not wait for the echo.
    let size = "echo size-$(stty size | tr ' ' x)\n";
    screen.ask(size, "size-30x100");
    set_size(&terminal.master, 132, 50);
    machine.signal(Signal::SIGWINCH);
    screen.ask(size, "size-50x132");
    screen.ask("echo on-$(cat /sys/class/tty/console/active)\n", "on-hvc0");

    screen.ask(
        "cd /sys/class/virtio-ports/*p1; echo name-$(cat name)\n",
        "name-org.example.agent",
    );
    let mut client = client(&socket);
    client.set_read_timeout(Some(LINUX_LIMIT)).unwrap();
    client.write_all(b"question\n").unwrap();
    screen.ask(
        "exec 3<>/dev/${PWD##*/}; read line <&3; echo answer-$line >&3; echo read-$line\n",
        "read-question",
    );
    expect(&mut client, b"answer-question\n");
    screen.ask("exec 3>&-; echo closed-$?\n", "closed-0");
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    screen.file.write_all(b"poweroff\n").unwrap();
    machine.wait().succeeded();
}

/// The screen and keyboard of a user at a terminal.
struct Screen {
    file: fs::File,
    seen: String,
}

impl Screen {
    fn new(file: fs::File) -> Screen {
        let seen = String::new();
        Screen { file, seen }
    }

    /// Types a line and waits for the output.
    fn ask(&mut self, line: &str, answer: &str) {
        self.seen.clear();
        self.file.write_all(line.as_bytes()).unwrap();
        self.wait_for(answer);
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + LINUX_LIMIT;
        while !self.seen.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut events = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut events, PollTimeout::try_from(left).unwrap()).unwrap();
            assert_eq!(ready, 1, "no '{text}' in\n{}", self.seen);
            let mut bytes = [0; 4096];
            let count = self.file.read(&mut bytes).unwrap();
            self.seen
                .push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }
}
