//! The API: the time until it is available, the time to start a machine, answers while a guest is
//! busy, and memory.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{HostTap, elf_kernel, payload};

use crate::memory::MonitorMemory;
use crate::monitors::Monitors;
use crate::process::Process;
use crate::report::{Goal, Report, Row};
use crate::statistics::Samples;

const RUNS: usize = 31;
const REQUESTS: usize = 5000;
const LIMIT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_micros(20);
const GUEST_MEMORY_MIB: u64 = 128;
const MIB: f64 = (1 << 20) as f64;

/// A monitor that serves the API, and a client's connection.
struct Machine {
    process: Process,
    connection: UnixStream,
    /// From just before the process was started until the client was connected.
    ready: Duration,
    /// CPU time of the process by then.
    ready_cpu: Duration,
}

impl Machine {
    fn start(monitors: &Monitors) -> Machine {
        let socket = monitors.folder().join("api.socket");
        // An interrupted run may have left one.
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(monitors.bantam());
        command.args(["api", "--level", "Error", "--api-sock"]);
        command.arg(&socket);
        let started = Instant::now();
        let process = Process::start(command);
        let connection = connect(&socket, started);
        let ready = started.elapsed();
        Machine {
            ready_cpu: process.threads_cpu(|_| true),
            process,
            connection,
            ready,
        }
    }

    /// Sends a request and waits for the answer, which must be a success.
    fn request(&mut self, method: &str, path: &str, body: &str) {
        let size = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n");
        let request = [head, body.to_owned()].concat();
        let mut connection = &self.connection;
        connection.write_all(request.as_bytes()).expect("it reads");
        let mut answer = [0; 4096];
        let mut count = 0;
        while !is_whole(&answer[..count]) {
            let more = connection.read(&mut answer[count..]).expect("it answers");
            assert!(more > 0, "the connection ends");
            count += more;
        }
        let text = String::from_utf8_lossy(&answer[..count]);
        assert!(text.starts_with("HTTP/1.1 20"), "{method} {path}: {text}");
    }

    fn boot(&mut self, kernel: &Path, boot_args: &str) {
        let machine = format!(r#"{{"vcpu_count": 1, "mem_size_mib": {GUEST_MEMORY_MIB}}}"#);
        self.request("PUT", "/machine-config", &machine);
        let kernel = kernel.display();
        let boot_source =
            format!(r#"{{"kernel_image_path": "{kernel}", "boot_args": "{boot_args}"}}"#);
        self.request("PUT", "/boot-source", &boot_source);
    }

    fn start_instance(&mut self) {
        self.request("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    }
}

fn connect(socket: &Path, started: Instant) -> UnixStream {
    loop {
        match UnixStream::connect(socket) {
            Ok(connection) => return connection,
            Err(error) => {
                assert!(started.elapsed() < LIMIT, "no API: {error}");
                thread::sleep(POLL_INTERVAL);
            }
        }
    }
}

/// Returns whether it is a complete answer, including its body.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let size = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |size| size.parse().expect("sizes are numbers"));
    body.len() == size
}

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let mut add = |name: &str, unit, bantam, limit| {
        report.add(Row {
            name: name.to_owned(),
            unit,
            bantam,
            peer: None,
            goal: Goal::AtMost(limit),
        });
    };
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;

    // Programs and kernels are in the page cache after this.
    started_guest(monitors);
    let turns: Vec<[Duration; 3]> = (0..RUNS).map(|_| started_guest(monitors)).collect();
    let mut add_time = |name: &str, index: usize, limit| {
        let times = turns.iter().map(|turn| milliseconds(turn[index]));
        add(name, "ms", times.collect(), limit);
    };
    add_time("api: start until a client is connected, wall time", 0, 6.0);
    add_time("api: start until a client is connected, CPU time", 1, 4.0);
    add_time(
        "api: InstanceStart sent until the guest's first line is there",
        2,
        8.0,
    );

    let slow = p99_while_busy(monitors);
    add(
        "api: GET / while the guest uses its processor, p99",
        "ms",
        Samples::new(vec![milliseconds(slow)]),
        1.0,
    );
    let memory = memory(monitors);
    add(
        "api: memory with disk, network, vsock and balloon, without guest memory, Rss",
        "MiB",
        Samples::new(vec![memory.resident as f64 / MIB]),
        4.6,
    );
}

/// Starts a guest, and returns the times of the three rows.
fn started_guest(monitors: &Monitors) -> [Duration; 3] {
    let mut machine = Machine::start(monitors);
    machine.boot(&payload("hello"), "finish=poweroff");
    let asked = Instant::now();
    machine.start_instance();
    machine.process.wait_for("hello from ring 3", LIMIT);
    let started = asked.elapsed();
    let times = [machine.ready, machine.ready_cpu, started];
    machine.process.wait(LIMIT);
    times
}

fn p99_while_busy(monitors: &Monitors) -> Duration {
    let mut machine = Machine::start(monitors);
    let kernel: PathBuf = monitors.folder().join("busy-kernel");
    // stay: jmp stay
    fs::write(&kernel, elf_kernel(&[0xeb, 0xfe])).expect("the folder can be written to");
    machine.boot(&kernel, "");
    machine.start_instance();
    let mut times: Vec<Duration> = (0..REQUESTS)
        .map(|_| {
            let asked = Instant::now();
            machine.request("GET", "/", "");
            asked.elapsed()
        })
        .collect();
    machine.process.stop(LIMIT);
    times.sort();
    times[REQUESTS * 99 / 100]
}

fn memory(monitors: &Monitors) -> MonitorMemory {
    let tap = HostTap::new();
    let image = monitors.folder().join("api-disk.img");
    fs::write(&image, [0; 1 << 16]).expect("the folder can be written to");
    let mut machine = Machine::start(monitors);
    machine.boot(&payload("devices"), "finish=hang");
    let image = image.display();
    let drive =
        format!(r#"{{"drive_id": "a", "is_root_device": false, "path_on_host": "{image}"}}"#);
    machine.request("PUT", "/drives/a", &drive);
    let interface = format!(r#"{{"iface_id": "a", "host_dev_name": "{}"}}"#, tap.name);
    machine.request("PUT", "/network-interfaces/a", &interface);
    machine.request("PUT", "/entropy", "{}");
    let balloon = r#"{"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1}"#;
    machine.request("PUT", "/balloon", balloon);
    let vsock = monitors.folder().join("api-vsock.socket");
    let _ = fs::remove_file(&vsock);
    let vsock = format!(r#"{{"guest_cid": 3, "uds_path": "{}"}}"#, vsock.display());
    machine.request("PUT", "/vsock", &vsock);
    machine.start_instance();
    machine.process.wait_for("PASS", LIMIT);
    let memory = MonitorMemory::of(machine.process.pid(), GUEST_MEMORY_MIB << 20);
    machine.process.stop(LIMIT);
    memory
}
