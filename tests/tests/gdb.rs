//! Guests that gdb debugs.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Bantam, Ended, Running, STATUS_ERROR, STATUS_POWER_CUT, configured, payload, require_kvm,
};
use bantam_vmm::config::{GdbConfig, MachineConfig};
use bantam_vmm::host::{Virtualization, virtualization};
use bantam_vmm::{Console, Controller, ExitReason, State};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long one run of gdb may take.
const LIMIT: Duration = Duration::from_secs(40);
/// How long what a user asks of a machine may take.
const PROMPT: Duration = Duration::from_secs(2);

/// A monitor with a guest that waits for gdb.
struct Debugged {
    bantam: Running,
    payload: &'static str,
    socket: PathBuf,
    _folder: TempDir,
}

impl Debugged {
    fn start(payload: &'static str, cpus: u8, words: &str) -> Debugged {
        let folder = tempfile::tempdir().expect("there is room for temporary files");
        let socket = folder.path().join("gdb.sock");
        let bantam = Bantam::payload(payload)
            .option("--cpus", cpus.to_string())
            .option("--gdb", format!("unix:{}", socket.display()))
            .append(words)
            .start();
        bantam.wait_for_error("waits for gdb");
        Debugged {
            bantam,
            payload,
            socket,
            _folder: folder,
        }
    }

    /// Starts gdb, which connects and executes `commands`.
    fn start_gdb(&self, commands: &[&str]) -> Gdb {
        Gdb::start(self.payload, &self.socket.display().to_string(), commands)
    }

    /// Has gdb connect and execute `commands`, and returns what it prints.
    fn gdb(&self, commands: &[&str]) -> String {
        self.start_gdb(commands).finish()
    }

    fn finish(self) -> Ended {
        self.bantam.wait()
    }
}

/// A gdb that executes commands. It is killed when this is dropped.
struct Gdb {
    child: Child,
    output: PathBuf,
    _folder: TempDir,
}

impl Gdb {
    fn start(name: &str, target: &str, commands: &[&str]) -> Gdb {
        let folder = tempfile::tempdir().expect("there is room for temporary files");
        let output = folder.path().join("output");
        let file = File::create(&output).expect("there is room for temporary files");
        let mut command = Command::new("gdb");
        command
            .args(["-nx", "-batch", "-ex", "set pagination off", "-ex"])
            .arg(format!("file {}", payload(name).display()))
            .args(["-ex", &format!("target remote {target}")])
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("there are descriptors"))
            .stderr(file);
        for line in commands {
            command.args(["-ex", line]);
        }
        let child = command.spawn().expect("gdb is installed");
        Gdb {
            child,
            output,
            _folder: folder,
        }
    }

    fn text(&self) -> String {
        let output = fs::read(&self.output).expect("it was created");
        String::from_utf8_lossy(&output).into_owned()
    }

    fn wait_for(&self, text: &str) {
        let begin = Instant::now();
        while !self.text().contains(text) {
            assert!(begin.elapsed() < LIMIT, "no '{text}':\n{}", self.text());
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(
            self.child
                .id()
                .try_into()
                .expect("process ids are positive"),
        );
        kill(pid, signal).expect("it is not reaped yet");
    }

    /// Waits for its end, and returns what it has printed.
    fn finish(mut self) -> String {
        let begin = Instant::now();
        while self.child.try_wait().expect("it is a child").is_none() {
            assert!(begin.elapsed() < LIMIT, "gdb hangs:\n{}", self.text());
            thread::sleep(Duration::from_millis(10));
        }
        self.text()
    }
}

impl Drop for Gdb {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Checks that `text` has all of `parts`, in this order.
#[track_caller]
fn assert_in_order(text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => panic!("no '{part}' where it should be in\n{text}"),
        }
    }
}

#[test]
fn a_guest_waits_for_gdb_at_its_first_instruction() {
    require_kvm!();
    let guest = Debugged::start("hello", 1, "finish=poweroff");
    let text = guest.gdb(&[
        "printf \"at %d\\n\", $pc == (long)&pvh_entry",
        "printf \"mode %x %x\\n\", $cr0, $cs",
        "stepi",
        "printf \"stepped %d\\n\", $pc - (long)&pvh_entry",
        "continue",
    ]);
    assert_in_order(
        &text,
        &[
            "at 1",
            "mode 11 10",
            "stepped 1",
            "(process 1) exited normally]",
        ],
    );
    guest.finish().passed().has_status(0);
}

#[test]
fn registers_and_memory_can_be_read_and_written() {
    require_kvm!();
    let guest = Debugged::start("hello", 1, "finish=poweroff");
    let text = guest.gdb(&[
        // In 64-bit mode, with the addresses of the kernel.
        "break undefined_instruction",
        "continue",
        "set $saved = $rbx",
        "set $rbx = 0x1122334455667788",
        "printf \"rbx %lx\\n\", $rbx",
        "set $rbx = $saved",
        "set $xmm3.v2_int64[1] = 0x99",
        "printf \"xmm3 %lx\\n\", $xmm3.v2_int64[1]",
        "set $xmm3.v2_int64[1] = 0",
        "set $gs_base = 0x7000",
        "printf \"gs_base %lx cr4 %lx efer %lx\\n\", $gs_base, $cr4 & 0x20, $efer & 0x500",
        "set $eflags |= 1",
        "info registers eflags",
        "set $ds = 0x1238",
        "x/2xb (long)&undefined_instruction",
        "set {char[4]}0x3000 = \"abc\"",
        "x/s 0x3000",
        "x/xb 0xd0000000",
        "x/xb 0x800000000000",
        "set {char}0xdeadbeef000 = 1",
        "continue",
        "delete",
        "continue",
    ]);
    assert_in_order(
        &text,
        &[
            "Breakpoint 1, 0x",
            "rbx 1122334455667788",
            "xmm3 99",
            "gs_base 7000 cr4 20 efer 500",
            "CF",
            "Could not write register \"ds\"",
            // The breakpoint is not to be seen.
            ":\t0x48\t0x81",
            "\"abc\"",
            "Cannot access memory at address 0xd0000000",
            "Cannot access memory at address 0x800000000000",
            "Cannot access memory at address 0xdeadbeef000",
            "Breakpoint 1, 0x",
            "exited normally]",
        ],
    );
    guest.finish().passed().has_status(0);
}

#[test]
fn breakpoints_in_memory_and_in_debug_registers_stop_the_guest() {
    require_kvm!();
    let guest = Debugged::start("hello", 1, "finish=number number=7");
    let text = guest.gdb(&[
        "hbreak undefined_instruction",
        "continue",
        "stepi",
        "printf \"stepped %d\\n\", $pc > (long)&undefined_instruction",
        "delete",
        "break write_serial",
        "continue",
        "printf \"character %c\\n\", *(char*)$rdi",
        "continue",
        "delete",
        "continue",
    ]);
    assert_in_order(
        &text,
        &[
            "Breakpoint 1, 0x",
            "stepped 1",
            "Breakpoint 2, 0x",
            "Breakpoint 2, 0x",
            "(process 1) exited with code 07]",
        ],
    );
    let ended = guest.finish();
    ended.has_status(7);
    assert!(ended.text().contains("PASS"), "{ended}");
}

#[test]
fn a_program_of_the_guest_is_stopped_in_ring_3() {
    require_kvm!();
    let guest = Debugged::start("hello", 1, "finish=poweroff");
    let text = guest.gdb(&[
        // Page tables and descriptor tables are there from then on.
        "hbreak undefined_instruction",
        "continue",
        "delete",
        "break system_call",
        "continue",
        "printf \"ring %d\\n\", $cs & 3",
        "delete",
        // Back from the kernel, in the caller.
        "set $caller = *(long*)$rsp",
        "tbreak *$caller",
        "continue",
        "printf \"in the caller %d\\n\", $pc == $caller",
        "stepi",
        "stepi",
        "printf \"moved %d in ring %d\\n\", $pc != $caller, $cs & 3",
        "printf \"trap flag %d\\n\", ((int)$eflags >> 8) & 1",
        "continue",
    ]);
    assert_in_order(
        &text,
        &[
            "Breakpoint 1, 0x",
            "Breakpoint 2, 0x",
            "ring 3",
            "in the caller 1",
            "moved 1 in ring 3",
            "trap flag 0",
            "exited normally]",
        ],
    );
    guest.finish().passed().has_status(0);
}

#[test]
fn data_is_watched_by_debug_registers() {
    require_kvm!();
    let guest = Debugged::start("cpus", 2, "finish=poweroff");
    let text = guest.gdb(&[
        "break undefined_instruction",
        "continue",
        "delete",
        "watch *(long*)&interrupt_total",
        "continue",
        "delete",
        "continue",
    ]);
    if virtualization() == Virtualization::Pvm {
        assert!(
            text.contains("Could not insert hardware watchpoint 2"),
            "{text}"
        );
    } else {
        assert_in_order(
            &text,
            &[
                "Hardware watchpoint 2",
                "Old value = 0",
                "New value = 1",
                "exited normally]",
            ],
        );
    }
    guest.finish().passed().has_status(0);
}

#[test]
fn each_vcpu_is_a_thread() {
    require_kvm!();
    let guest = Debugged::start("cpus", 4, "expect=4 finish=poweroff");
    let text = guest.gdb(&[
        "info threads",
        // Each processor but the first takes one interrupt.
        "break interrupt",
        "continue",
        "info threads",
        "thread 1",
        "printf \"first %d\\n\", $_thread",
        "continue",
        "stepi",
        "continue",
        "delete",
        "continue",
    ]);
    assert_in_order(
        &text,
        &[
            "vCPU 0, running",
            "vCPU 1, not started",
            "vCPU 3, not started",
            "Thread 2 hit Breakpoint 1",
            "vCPU 0, ",
            "vCPU 1, running",
            "vCPU 2, not started",
            "first 1",
            "Thread 3 hit Breakpoint 1",
            "Thread 4 hit Breakpoint 1",
            "exited normally]",
        ],
    );
    guest.finish().passed().has_status(0);
}

#[test]
fn gdb_interrupts_leaves_and_kills_a_guest() {
    require_kvm!();
    let guest = Debugged::start("hello", 2, "finish=hang");
    let gdb = guest.start_gdb(&["continue", "printf \"at %lx\\n\", $pc", "detach"]);
    guest.bantam.wait_for_output("PASS");
    gdb.signal(Signal::SIGINT);
    assert_in_order(
        &gdb.finish(),
        &["received signal SIGINT", "at 1", "detached]"],
    );

    // It goes on, and stops anew for another gdb, also after one that has vanished meanwhile.
    let gdb = guest.start_gdb(&["break triple_fault", "continue"]);
    gdb.wait_for("Breakpoint 1 at");
    thread::sleep(Duration::from_millis(200));
    gdb.signal(Signal::SIGKILL);
    drop(gdb);
    let text = guest.gdb(&["info threads", "kill"]);
    assert_in_order(&text, &["vCPU 0, ", "vCPU 1, ", "killed]"]);
    guest.finish().has_status(STATUS_POWER_CUT);
}

#[test]
fn a_guest_goes_on_without_breakpoints_when_gdb_is_gone() {
    require_kvm!();
    let guest = Debugged::start("hello", 2, "finish=poweroff");
    let text = guest.gdb(&[
        "break undefined_instruction",
        "hbreak read_msr",
        "continue",
        "stepi",
        // Breakpoints are in memory only while the guest runs.
        "set breakpoint always-inserted on",
        "printf \"gone\\n\"",
        "shell kill -9 $PPID",
    ]);
    assert_in_order(&text, &["Breakpoint 1, 0x", "gone"]);
    guest.finish().passed().has_status(0);
}

#[test]
fn a_signal_ends_a_guest_that_gdb_has_stopped() {
    require_kvm!();
    let ends_soon = |guest: Debugged| {
        let begin = Instant::now();
        guest.bantam.signal(Signal::SIGTERM);
        guest.finish().has_status(STATUS_POWER_CUT);
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
    };
    // Before gdb, and at a breakpoint.
    ends_soon(Debugged::start("hello", 2, "finish=hang"));
    let guest = Debugged::start("hello", 2, "finish=hang");
    let gdb = guest.start_gdb(&["break undefined_instruction", "continue", "shell sleep 5"]);
    gdb.wait_for("Breakpoint 1, 0x");
    ends_soon(guest);
    drop(gdb);

    // While the guest runs, gdb is told.
    let guest = Debugged::start("hello", 2, "finish=hang");
    let gdb = guest.start_gdb(&["continue"]);
    guest.bantam.wait_for_output("PASS");
    ends_soon(guest);
    assert_in_order(&gdb.finish(), &["terminated with signal SIGKILL"]);
}

#[test]
fn a_crash_of_the_guest_is_told_to_gdb() {
    require_kvm!();
    let guest = Debugged::start("hello", 1, "finish=triple-fault");
    let text = guest.gdb(&["continue"]);
    assert_in_order(&text, &["terminated with signal SIGSEGV"]);
    guest.finish().has_status(STATUS_ERROR);
}

#[test]
fn gdb_connects_by_tcp() {
    require_kvm!();
    let bantam = Bantam::payload("hello")
        .option("--gdb", "tcp:127.0.0.1:0")
        .append("finish=poweroff")
        .start();
    let log = bantam.wait_for_error("target remote 127.0.0.1:");
    let target = log.split("target remote ").nth(1).expect("it was found");
    let target = target.split_whitespace().next().expect("it was found");
    let gdb = Gdb::start("hello", target, &["continue"]);
    assert_in_order(&gdb.finish(), &["exited normally]"]);
    bantam.wait().passed().has_status(0);
}

/// A machine in this process, and the place where gdb connects to it.
fn machine(folder: &Path, cpus: u8) -> (Controller, PathBuf) {
    let socket = folder.join("gdb.sock");
    let config = MachineConfig {
        cpus: i64::from(cpus)
            .try_into()
            .expect("a machine can have as many"),
        gdb: Some(GdbConfig::Unix(socket.clone())),
        append: Some("finish=hang".to_owned()),
        ..MachineConfig::new(payload("hello"))
    };
    let machine = configured(config, Console::default());
    machine.start().expect("the host has what it takes");
    (machine, socket)
}

/// A client of the protocol.
struct Client(UnixStream);

impl Client {
    fn connect(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket).expect("the machine listens");
        let limited = stream.set_read_timeout(Some(LIMIT));
        limited.expect("a stream can have a limit");
        Client(stream)
    }

    fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0, u8::wrapping_add);
        write!(self.0, "${packet}#{sum:02x}").expect("it is connected");
    }

    /// Sends a packet and returns the answer.
    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.answer()
    }

    fn answer(&mut self) -> String {
        let mut bytes = Vec::new();
        let mut byte = [0];
        while !bytes.contains(&b'#') {
            self.0.read_exact(&mut byte).expect("it answers");
            bytes.push(byte[0]);
        }
        self.0.read_exact(&mut [0; 2]).expect("it answers");
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let answer = text.split('$').nth(1).expect("it begins so");
        let answer = answer.trim_end_matches('#').to_owned();
        self.0.write_all(b"+").expect("it is connected");
        answer
    }
}

#[test]
fn a_machine_is_paused_and_stopped_in_every_state_of_its_debugger() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let (machine, socket) = machine(folder.path(), 3);
    let pause = || {
        let begin = Instant::now();
        machine.pause().unwrap();
        machine.save_processors().unwrap();
        machine.resume().unwrap();
        assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
        assert_eq!(machine.state(), State::Running);
    };
    // Before gdb has connected.
    pause();
    let mut gdb = Client::connect(&socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    let registers = gdb.ask("g");
    pause();
    // What gdb sees is still there, and the guest still waits.
    assert_eq!(gdb.ask("g"), registers);

    machine.pause().unwrap();
    assert_eq!(gdb.ask("g"), registers);
    // It goes on for gdb, but not for its owner.
    gdb.send("vCont;c");
    thread::sleep(Duration::from_millis(50));
    gdb.0.write_all(b"\x03").unwrap();
    assert!(gdb.answer().starts_with("T02"));
    assert_eq!(gdb.ask("g"), registers);
    gdb.send("vCont;c");
    machine.resume().unwrap();
    thread::sleep(Duration::from_millis(50));
    pause();
    gdb.0.write_all(b"\x03").unwrap();
    assert!(gdb.answer().starts_with("T02"));
    assert_ne!(gdb.ask("g"), registers);
    pause();

    let begin = Instant::now();
    machine.stop();
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
    assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
}

#[test]
fn no_bytes_of_a_client_harm_the_machine() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let (machine, socket) = machine(folder.path(), 2);
    let mut seed = 1_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as u8
    };
    // Bytes, and whole packets of them.
    for round in 0..60 {
        let mut gdb = Client::connect(&socket);
        let bytes: Vec<u8> = (0..2000).map(|_| random()).collect();
        // It may have closed the connection.
        let _ = match round % 2 {
            0 => gdb.0.write_all(&bytes),
            _ => {
                let packet: String = bytes
                    .iter()
                    .map(|byte| char::from(byte % 95 + 32))
                    .collect();
                let packet = packet.replace(['$', '#'], ";");
                let sum = packet.bytes().fold(0, u8::wrapping_add);
                write!(gdb.0, "${packet}#{sum:02x}")
            }
        };
    }
    // Packets with arguments that no gdb sends.
    let long = "f".repeat(300);
    for packet in [
        "m",
        "m,",
        "mffffffffffffffff,ffffffffffffffff",
        "m0,fffffff",
        "M0,4:00",
        "M0,ffff:00",
        "X0,4:a",
        "g",
        "G",
        "G00",
        "p",
        "pffffffff",
        "P",
        "P0=",
        "P0=00",
        "P3b=ffffffffffffffff",
        "P10=ffffffffffffffff",
        "Hgffffffff",
        "Hg0",
        "Hc-1",
        "T0",
        "Tffff",
        "vCont",
        "vCont;",
        "vCont;s:ffff",
        "vCont;x",
        "vCont;r0,0:1",
        "Z0,0,0",
        "Z0,ffffffffffffffff,1",
        "Z1,ffffffffffffffff,8",
        "Z2,ffffffffffffffff,ffffffffffffffff",
        "Z2,0,0",
        "Z5,0,1",
        "z0,0,0",
        "z2,0,8",
        "z1,1234,1",
        "qXfer:features:read:target.xml:ffffffff,ffffffff",
        "qXfer:features:read:other:0,10",
        "qThreadExtraInfo,ffff",
        "qRcmd,00",
        "k0",
        "D0",
        "vKill;0",
        "!",
        "R00",
        &long,
    ] {
        let mut gdb = Client::connect(&socket);
        gdb.send(packet);
        gdb.send("?");
        thread::sleep(Duration::from_millis(5));
        if machine.state() == State::Stopped {
            assert!(["k0", "vKill;0"].contains(&packet), "{packet}");
            return;
        }
    }
    let mut gdb = Client::connect(&socket);
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    machine.stop();
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
}
