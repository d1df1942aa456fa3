//! Migrations: for how long a guest stands still, how long all of it takes, and how fast memory crosses a network.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{arrive, configured, payload};
use bantam_vmm::config::MachineConfig;
use bantam_vmm::{Console, Controller, Migrated, MigrationConnection, MigrationOptions};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};

use crate::monitors::Monitors;
use crate::process::Process;
use crate::report::{Goal, Peer, Report, Row};
use crate::statistics::Samples;

const RUNS: usize = 11;
/// Moves over a network, each of which takes some seconds.
const CROSSINGS: usize = 3;
const LIMIT: Duration = Duration::from_secs(60);
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Memory above the guest itself.
const FREE: u64 = 16 * MIB;
/// Pages that are written each second, and how often in a second some of them are.
const DIRTY_PAGES: u64 = 20_000;
const DIRTY_STEPS: u64 = 100;
/// Size of a file of random bytes in the memory of a machine that crosses a network.
const CONTENT: u64 = 512 * MIB;
/// The other end of the network.
const ADDRESS: &str = "10.213.7.2";
/// Runs a command in the namespace of the source or the receiver.
const NAMESPACES: [&str; 2] = ["bantam-bench-source", "bantam-bench-receiver"];

/// Adds the rows; those of a network only if namespaces can be created and iperf3 and openssl are there.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let folder = monitors.folder().join("migration");
    fs::create_dir_all(&folder).expect("the folder can be written to");
    let downtime = |it: &Migrated| it.downtime;
    let add = |report: &mut Report, name: &str, times: Vec<f64>, goal| {
        report.add(Row {
            name: name.to_owned(),
            unit: "ms",
            bantam: Samples::new(times),
            peer: None,
            goal: Goal::AtMost(goal),
        });
    };
    let times = move_on(&folder, 512 * MIB, 64 * MIB, false, downtime);
    let name = "migration: the guest stands still, 512 MiB, idle";
    add(report, name, times, 10.0);
    let times = move_on(&folder, 512 * MIB, 64 * MIB, true, downtime);
    let name = "migration: the guest stands still, 512 MiB, of which devices write to 20,000 pages a second";
    add(report, name, times, 50.0);
    let times = move_on(&folder, 4096 * MIB, 100 * MIB, false, |it| it.time);
    let name = "migration: all of it, 4 GiB, of which 100 MiB are not zero";
    add(report, name, times, 1000.0);
    match Network::new(&folder) {
        Ok(network) => cross(monitors, &network, &folder, report),
        Err(error) => eprintln!("migration over a network is not measured: {error}"),
    }
    fs::remove_dir_all(&folder).expect("it was made above");
}

/// Moves a machine with `memory` bytes, of which `touched` are not zero, again and again within this process. Returns a time of
/// each move in milliseconds.
fn move_on(
    folder: &Path,
    memory: u64,
    touched: u64,
    is_written: bool,
    time: impl Fn(&Migrated) -> Duration,
) -> Vec<f64> {
    // It waits, halted, for its power button.
    let mut config = MachineConfig::new(payload("button"));
    config.memory = format!("{}M", memory / MIB).parse().expect("it is a size");
    config.serial = bantam_vmm::config::SerialConfig::File(folder.join("serial"));
    let mut machine = configured(config, Console::default());
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    write(&machine, 0..touched / PAGE);
    let mut times = Vec::new();
    for number in 0..RUNS {
        let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
        let [ours, theirs] =
            [ours, theirs].map(|it| MigrationConnection::new(it).expect("it is a socket"));
        let is_over = AtomicBool::new(false);
        let (migrated, next) = thread::scope(|scope| {
            let receiver = scope.spawn(|| arrive(theirs, folder, number, None));
            if is_written {
                scope.spawn(|| write_on(&machine, touched / PAGE, &is_over));
            }
            let migrated = machine.migrate(ours, &MigrationOptions::default());
            is_over.store(true, Ordering::Relaxed);
            let next = receiver.join().expect("the receiver does not panic");
            (migrated, next)
        });
        let migrated = migrated.unwrap_or_else(|error| panic!("{error}"));
        times.push(time(&migrated).as_secs_f64() * 1000.0);
        machine = next.unwrap_or_else(|error| panic!("{error}"));
    }
    machine.stop();
    times
}

/// Writes to these pages above the guest, as a device would.
fn write(machine: &Controller, pages: impl Iterator<Item = u64>) {
    let memory = machine.memory().expect("it runs");
    for page in pages {
        let bytes = [page as u8 | 1; PAGE as usize];
        let written = memory.write_slice(&bytes, GuestAddress(FREE + page * PAGE));
        written.expect("the machine has so much memory");
    }
}

/// Writes to [`DIRTY_PAGES`] of `count` pages each second.
fn write_on(machine: &Controller, count: u64, is_over: &AtomicBool) {
    let begun = Instant::now();
    let mut written = 0;
    while !is_over.load(Ordering::Relaxed) && machine.memory().is_ok() {
        let due = (begun.elapsed().as_secs_f64() * DIRTY_PAGES as f64) as u64;
        write(machine, (written..due).map(|page| page % count));
        written = due;
        thread::sleep(Duration::from_secs(1) / DIRTY_STEPS as u32);
    }
}

/// Two network namespaces with a link between them, and certificates for TLS.
struct Network {
    certificates: PathBuf,
}

impl Network {
    fn new(folder: &Path) -> io::Result<Network> {
        let network = Network {
            certificates: folder.join("certificates"),
        };
        let [source, receiver] = NAMESPACES;
        let lines = [
            format!("ip netns add {source}"),
            format!("ip netns add {receiver}"),
            format!(
                "ip link add source netns {source} type veth peer name receiver netns {receiver}"
            ),
            format!("ip -n {source} addr add 10.213.7.1/24 dev source"),
            format!("ip -n {receiver} addr add {ADDRESS}/24 dev receiver"),
            format!("ip -n {source} link set source up"),
            format!("ip -n {receiver} link set receiver up"),
        ];
        lines
            .iter()
            .try_for_each(|line| run(line, Path::new("/")))?;
        fs::create_dir_all(&network.certificates)?;
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        let authority = "-keyout cakey.pem -out cacert.pem -days 1 -subj /CN=authority";
        run(
            &format!("openssl req -x509 {key} {authority}"),
            &network.certificates,
        )?;
        for end in ["client", "server"] {
            let text = format!("subjectAltName=IP:{ADDRESS}\nextendedKeyUsage={end}Auth\n");
            fs::write(network.certificates.join("extensions"), text)?;
            let request = format!("-keyout {end}key.pem -out request -subj /CN={end}");
            let signed =
                format!("-CA cacert.pem -CAkey cakey.pem -extfile extensions -out {end}cert.pem");
            for line in [
                format!("openssl req {key} {request}"),
                format!("openssl x509 -req -in request -days 1 {signed}"),
            ] {
                run(&line, &network.certificates)?;
            }
        }
        Ok(network)
    }

    /// Returns a command that runs at one end.
    fn at(&self, end: usize, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", NAMESPACES[end]]);
        command.arg(program.as_ref());
        command
    }

    /// Returns how many MiB iperf3 sends in a second over one connection.
    fn iperf3(&self) -> f64 {
        let server = self
            .at(1, "iperf3")
            .args(["-s", "-1"])
            .stdout(Stdio::null())
            .spawn();
        let mut server = server.expect("iperf3 is installed");
        thread::sleep(Duration::from_millis(300));
        let mut client = self.at(0, "iperf3");
        let output = client.args(["-c", ADDRESS, "-t", "2", "-J"]).output();
        let output = output.expect("iperf3 is installed").stdout;
        let ended = server.wait().expect("it was started above");
        assert!(ended.success(), "iperf3 fails");
        let value: Value = serde_json::from_slice(&output).expect("iperf3 prints JSON");
        let bits = &value["end"]["sum_received"]["bits_per_second"];
        bits.as_f64().expect("iperf3 has received something") / 8.0 / MIB as f64
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in NAMESPACES {
            // There is none if it could not be created.
            let _ = run(&format!("ip netns del {namespace}"), Path::new("/"));
        }
    }
}

/// Runs a command whose words have no spaces.
fn run(line: &str, folder: &Path) -> io::Result<()> {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap_or_default());
    let output = command.args(words).current_dir(folder).output()?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let errors = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(format!("{line}: {}", errors.trim())))
        }
    }
}

/// Sends memory from one namespace to the other.
fn cross(monitors: &Monitors, network: &Network, folder: &Path, report: &mut Report) {
    let content = folder.join("content");
    let random = File::open("/dev/urandom").expect("the host has it");
    let mut file = File::create(&content).expect("the folder can be written to");
    io::copy(&mut random.take(CONTENT), &mut file).expect("there is room");
    let cases: [(&str, &str, &[&str]); 4] = [
        ("TCP", "tcp", &[]),
        ("TCP, 2 connections", "tcp", &["--connections", "2"]),
        ("TLS", "tls", &[]),
        ("TLS, 2 connections", "tls", &["--connections", "2"]),
    ];
    for (name, scheme, options) in cases {
        let (mut rates, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..CROSSINGS {
            peer.push(network.iperf3());
            rates.push(rate(monitors, network, folder, &content, scheme, options));
        }
        report.add(Row {
            name: format!("migration: memory between two network namespaces, {name}"),
            unit: "MiB/s",
            bantam: Samples::new(rates),
            peer: Some(Peer::named(
                "iperf3, one connection, plain",
                Samples::new(peer),
            )),
            goal: Goal::RatioAtLeast(0.8),
        });
    }
}

/// Moves a paused machine with `content` in its memory, and returns how many MiB were sent in a second.
fn rate(
    monitors: &Monitors,
    network: &Network,
    folder: &Path,
    content: &Path,
    scheme: &str,
    options: &[&str],
) -> f64 {
    let socket = folder.join("control.sock");
    let security = |command: &mut Command| {
        match scheme {
            "tls" => command.arg("--tls-dir").arg(&network.certificates),
            _ => command.arg("--insecure"),
        };
    };
    let mut source = network.at(0, monitors.bantam());
    source
        .args(["run", "--memory", "1G", "--kernel"])
        .arg(payload("button"));
    source
        .arg("--initrd")
        .arg(content)
        .arg("--control")
        .arg(&socket);
    let mut source = Process::start(source);
    source.wait_for("ready", LIMIT);
    let mut pause = Command::new(monitors.bantam());
    let paused = pause.arg("control").arg(&socket).arg("pause").output();
    assert!(
        paused.is_ok_and(|it| it.status.success()),
        "it is not paused"
    );

    let mut receiver = network.at(1, monitors.bantam());
    receiver.env("BANTAM_STATE_DIR", folder.join("there"));
    let listening = format!("{scheme}://{ADDRESS}:0");
    receiver.args(["migrate", "--name", "arrived", "--receive", &listening]);
    security(&mut receiver);
    let mut receiver = Process::start(receiver);
    receiver.wait_for("waiting at ", LIMIT);
    receiver.wait_for("\n", LIMIT);
    let address = receiver.text();
    let address = address.split_whitespace().last().expect("it is not empty");

    let mut moving = network.at(0, monitors.bantam());
    moving.args(["migrate", "--output", "json"]).args(options);
    moving.arg(&socket).arg(address);
    security(&mut moving);
    let output = moving.output().expect("ip is installed");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the machine does not move: {errors}"
    );
    let migrated: Migrated = serde_json::from_slice(&output.stdout).expect("it prints JSON");
    receiver.wait(LIMIT);
    source.wait(LIMIT);
    for action in ["destroy", "undefine"] {
        let mut command = Command::new(monitors.bantam());
        command.env("BANTAM_STATE_DIR", folder.join("there"));
        let done = command.args([action, "arrived"]).output();
        let done = done.expect("it is there");
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "the machine stays: {errors}");
    }
    migrated.sent as f64 / MIB as f64 / migrated.time.as_secs_f64()
}
