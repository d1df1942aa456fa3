//! The network that a user has without rights: Bantam's, beside passt and QEMU's slirp.

mod server;
mod world;

use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::Duration;

use bantam_tests::payload;
use bantam_vmm::host::can_administer_network;

use crate::load::{self, Load, RUNS};
use crate::memory::MonitorMemory;
use crate::monitors::{Guest, Monitor, Monitors, Network};
use crate::process::Process;
use crate::report::{Goal, Peer, Report, Row};
use crate::statistics::Samples;
use server::{Server, Service};
use world::{SERVER, datagrams_received};

const LIMIT: Duration = Duration::from_secs(10);
const GIB: f64 = (1_u64 << 30) as f64;
const MIB: f64 = (1 << 20) as f64;
/// How long a guest is idle before its monitor's memory is measured.
const SETTLE_TIME: Duration = Duration::from_millis(500);
/// The environment variable that names the folder for definitions and state of networks.
const NETWORK_ROOT: &str = "BANTAM_NETWORK_ROOT";
/// How often a machine is started with a network and without.
const STARTS: usize = 21;
/// How often the memory of a machine is measured with a network and without.
const MEMORY_RUNS: usize = 3;

/// The networks, in the order in which they take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contestant {
    /// Bantam's `user`.
    User,
    /// Bantam with passt.
    Passt,
    /// QEMU with its own.
    Slirp,
}

impl Contestant {
    const ALL: [Self; 3] = [Self::User, Self::Passt, Self::Slirp];
}

struct Case {
    name: &'static str,
    unit: &'static str,
    arguments: &'static str,
    service: Service,
    figure: fn(&Run) -> f64,
    of_passt: Goal,
    of_slirp: Goal,
    /// Whether the CPU time for the bytes is a row too.
    has_cpu: bool,
}

const CASES: [Case; 5] = [
    Case {
        name: "TCP, guest to host",
        unit: "MB/s",
        arguments: "test=tcp mode=send",
        service: Service::Discard,
        figure: |run| run.load.bytes_per_second / 1e6,
        of_passt: Goal::RatioAtLeast(1.0),
        of_slirp: Goal::RatioAtLeast(2.0),
        has_cpu: true,
    },
    Case {
        name: "TCP, host to guest",
        unit: "MB/s",
        arguments: "test=tcp mode=receive",
        service: Service::Send,
        figure: |run| run.load.bytes_per_second / 1e6,
        of_passt: Goal::RatioAtLeast(1.0),
        of_slirp: Goal::RatioAtLeast(2.0),
        has_cpu: true,
    },
    Case {
        name: "TCP connections, 32 at a time",
        unit: "1/s",
        arguments: "test=tcp mode=connect depth=32",
        service: Service::Close,
        figure: |run| run.load.operations_per_second,
        of_passt: Goal::None,
        of_slirp: Goal::RatioAtLeast(1.5),
        has_cpu: false,
    },
    Case {
        name: "TCP round trip of a byte, median latency",
        unit: "us",
        arguments: "test=tcp mode=round-trip",
        service: Service::Echo,
        figure: |run| run.load.median_latency.expect("round trips are timed") / 1000.0,
        of_passt: Goal::RatioAtMost(1.0),
        of_slirp: Goal::None,
        has_cpu: false,
    },
    Case {
        name: "UDP datagrams in frames of 64 bytes, guest to host",
        unit: "1/s",
        arguments: "test=udp packet-size=64",
        service: Service::Ignore,
        // As the host's kernel counts them: the guest does not notice what is lost on the way.
        figure: |run| run.datagrams * run.load.operations_per_second / run.load.operations,
        of_passt: Goal::None,
        of_slirp: Goal::RatioAtLeast(1.5),
        has_cpu: false,
    },
];

/// One load of one network.
struct Run {
    load: Load,
    /// Datagrams that have come to the host's socket meanwhile.
    datagrams: f64,
    /// CPU time of Bantam's threads that serve devices, and of passt.
    cpu: Duration,
}

impl Run {
    fn cpu_per_gib(&self) -> f64 {
        let bytes =
            self.load.bytes_per_second * self.load.operations / self.load.operations_per_second;
        self.cpu.as_secs_f64() / (bytes / GIB)
    }
}

/// Adds the rows, if network namespaces can be made.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    if !can_administer_network() {
        eprintln!("skipped: network namespaces take CAP_NET_ADMIN");
        return;
    }
    world::inside(|| {
        for case in &CASES {
            measure_case(monitors, case, report);
        }
        measure_memory(monitors, report);
        measure_start(monitors, report);
    });
}

fn measure_case(monitors: &Monitors, case: &Case, report: &mut Report) {
    let server = Server::start(SERVER, case.service);
    let arguments = format!("{} peer={}", case.arguments, server.address());
    let turns: Vec<[Run; 3]> = (0..RUNS)
        .map(|_| Contestant::ALL.map(|contestant| run(monitors, contestant, &arguments)))
        .collect();
    let name = format!("usernet: {}", case.name);
    let loads: Vec<Load> = turns.iter().flatten().map(|run| run.load).collect();
    load::warn_of_too_few_cpus(&name, &loads);
    let samples = |contestant, figure: fn(&Run) -> f64| -> Samples {
        let index = Contestant::ALL.iter().position(|&one| one == contestant);
        let index = index.expect("all are there");
        turns.iter().map(|turn| figure(&turn[index])).collect()
    };
    let mut add = |name: String, unit, figure, peer, peer_name, goal| {
        report.add(Row {
            name,
            unit,
            bantam: samples(Contestant::User, figure),
            peer: Some(Peer::named(peer_name, samples(peer, figure))),
            goal,
        });
    };
    let Case { unit, figure, .. } = *case;
    add(
        name.clone(),
        unit,
        figure,
        Contestant::Passt,
        "passt",
        case.of_passt,
    );
    add(
        name.clone(),
        unit,
        figure,
        Contestant::Slirp,
        "slirp",
        case.of_slirp,
    );
    if case.has_cpu {
        let name = format!("{name}, CPU time of a GiB");
        let goal = Goal::RatioAtMost(1.0);
        add(
            name,
            "s",
            Run::cpu_per_gib,
            Contestant::Passt,
            "passt",
            goal,
        );
    }
}

fn run(monitors: &Monitors, contestant: Contestant, arguments: &str) -> Run {
    let passt = (contestant == Contestant::Passt).then(Passt::start);
    let guest = Guest {
        network: Some(match &passt {
            Some(passt) => Network::Passt(passt.socket.clone()),
            None => Network::User,
        }),
        ..load::guest(arguments)
    };
    let monitor = match contestant {
        Contestant::User | Contestant::Passt => Monitor::Bantam,
        Contestant::Slirp => Monitor::Qemu,
    };
    let datagrams = datagrams_received();
    let passt_cpu = passt.as_ref().map_or(Duration::ZERO, Passt::cpu);
    let load = load::run(monitors, monitor, &guest);
    let passt_cpu = passt.as_ref().map_or(Duration::ZERO, Passt::cpu) - passt_cpu;
    Run {
        cpu: load.device_cpu + passt_cpu,
        load,
        datagrams: datagrams_received() - datagrams,
    }
}

/// passt, which gives the guest the addresses that Bantam and QEMU give.
struct Passt {
    process: Process,
    socket: PathBuf,
}

impl Passt {
    fn start() -> Self {
        // It gives up its rights, so the socket is in a folder to which everybody may write.
        let socket = std::env::temp_dir().join(format!("bantam-bench-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--ipv4-only", "--socket"]);
        command.arg(&socket);
        command.args([
            "--address",
            "10.0.2.15",
            "--netmask",
            "24",
            "--gateway",
            "10.0.2.2",
        ]);
        let mut process = Process::start(command);
        process.wait_for("now start", LIMIT);
        Self { process, socket }
    }

    fn cpu(&self) -> Duration {
        self.process.threads_cpu(|_| true)
    }
}

/// Measures by how much a machine takes more memory with a network that it has used than without.
fn measure_memory(monitors: &Monitors, report: &mut Report) {
    let server = Server::start(SERVER, Service::Close);
    let arguments = format!(
        "test=tcp mode=connect depth=1 operations=1 peer={} finish=hang",
        server.address()
    );
    let memory = |kernel: &str, command_line: &str, network| {
        let guest = Guest {
            kernel: payload(kernel),
            command_line: command_line.to_owned(),
            memory_mib: 64,
            network,
            ..Guest::default()
        };
        let mut process = Process::start(monitors.command(Monitor::Bantam, &guest));
        process.wait_for("PASS", LIMIT);
        thread::sleep(SETTLE_TIME);
        let memory = MonitorMemory::of(process.pid(), guest.memory_mib << 20);
        process.stop(LIMIT);
        memory.resident as f64 / MIB
    };
    let growths = (0..MEMORY_RUNS).map(|_| {
        let without = memory("hello", "finish=hang", None);
        memory("load", &arguments, Some(Network::User)) - without
    });
    report.add(Row {
        name: "usernet: memory of a network that is idle after a connection".to_owned(),
        unit: "MiB",
        bantam: growths.collect(),
        peer: None,
        goal: Goal::AtMost(1.0),
    });
}

/// Measures by how much a guest runs later on a network of the host than without.
fn measure_start(monitors: &Monitors, report: &mut Report) {
    let folder = monitors.folder().join("networks");
    let start = |network| {
        let guest = Guest {
            kernel: payload("hello"),
            command_line: "finish=hang".to_owned(),
            memory_mib: 64,
            network,
            ..Guest::default()
        };
        let mut command = monitors.command(Monitor::Bantam, &guest);
        command.env(NETWORK_ROOT, &folder);
        let mut process = Process::start(command);
        let time = process.wait_for("PASS", LIMIT);
        process.stop(LIMIT);
        time
    };
    // The first machine makes the network.
    start(Some(Network::Nat));
    let growths = (0..STARTS).map(|_| {
        let without = start(None);
        let with = start(Some(Network::Nat));
        (with.as_secs_f64() - without.as_secs_f64()) * 1000.0
    });
    report.add(Row {
        name: "usernet: start until the guest has run, with nat more than without".to_owned(),
        unit: "ms",
        bantam: growths.collect(),
        peer: None,
        goal: Goal::AtMost(15.0),
    });
    let mut stop = Command::new(monitors.bantam());
    stop.args(["network", "stop", "default"]);
    stop.env(NETWORK_ROOT, &folder);
    let status = stop.status();
    let stopped = status.as_ref().is_ok_and(ExitStatus::success);
    assert!(stopped, "the network cannot be stopped: {status:?}");
}
