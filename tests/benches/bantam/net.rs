//! The speed of a network card.

use std::fs;

use bantam_tests::{HostTap, Traffic};
use bantam_vmm::host::{can_administer_network, open_tun};

use crate::load::{self, Load, RUNS};
use crate::monitors::{Guest, Monitor, Monitors, Network};
use crate::report::{Goal, Peer, Report, Row};

/// What the host does during a load.
#[derive(Clone, Copy)]
enum HostSide {
    /// Drops frames.
    Drop,
    /// Sends frames of this many bytes.
    Flood(usize),
    /// Sends frames back.
    Echo,
}

impl HostSide {
    fn start(self, tap: &str) -> Option<Traffic> {
        match self {
            Self::Drop => None,
            Self::Flood(size) => Some(Traffic::flood(tap, size)),
            Self::Echo => Some(Traffic::echo(tap)),
        }
    }
}

struct Case {
    name: &'static str,
    unit: &'static str,
    arguments: &'static str,
    host: HostSide,
    figure: fn(&Load) -> f64,
    goal: Goal,
}

const CASES: [Case; 4] = [
    Case {
        name: "64-byte packets, guest to host",
        unit: "1/s",
        arguments: "mode=transmit packet-size=64 depth=256",
        host: HostSide::Drop,
        figure: |load| load.operations_per_second,
        goal: Goal::RatioAtLeast(1.5),
    },
    Case {
        name: "64-byte packets, host to guest",
        unit: "1/s",
        arguments: "mode=receive packet-size=64 depth=256",
        host: HostSide::Flood(64),
        figure: |load| load.operations_per_second,
        goal: Goal::RatioAtLeast(1.5),
    },
    Case {
        name: "64 KiB TCP segments (TSO), guest to host",
        unit: "MB/s",
        arguments: "mode=transmit packet-size=65536 depth=32",
        host: HostSide::Drop,
        figure: |load| load.bytes_per_second / 1e6,
        goal: Goal::RatioAtLeast(1.3),
    },
    Case {
        name: "64-byte round trip, one at a time, median latency",
        unit: "us",
        arguments: "mode=round-trip packet-size=64 depth=1",
        host: HostSide::Echo,
        figure: |load| load.median_latency.expect("round trips are timed") / 1000.0,
        goal: Goal::None,
    },
];

/// Returns a tap on which the host sends nothing of its own; `None` if taps cannot be created.
pub fn quiet_tap() -> Option<HostTap> {
    if !can_administer_network() || open_tun().is_err() {
        eprintln!("skipped: creating taps takes CAP_NET_ADMIN");
        return None;
    }
    let tap = HostTap::new();
    // The host's own IPv6 announcements would count as work. A host without IPv6 sends none.
    let _ = fs::write(
        format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", tap.name),
        "1",
    );
    Some(tap)
}

/// Adds the rows, if taps can be created.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let Some(tap) = quiet_tap() else {
        return;
    };
    for case in &CASES {
        let guest = Guest {
            network: Some(Network::Tap(tap.name.clone())),
            ..load::guest(&format!("test=net {}", case.arguments))
        };
        let run = |monitor| {
            let _traffic = case.host.start(&tap.name);
            load::run(monitors, monitor, &guest)
        };
        let (mut bantam, mut qemu) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            bantam.push(run(Monitor::Bantam));
            qemu.push(run(Monitor::Qemu));
        }
        let name = format!("net: {}", case.name);
        load::warn_of_too_few_cpus(&name, &[&bantam[..], &qemu].concat());
        report.add(Row {
            name,
            unit: case.unit,
            bantam: load::samples(&bantam, case.figure),
            peer: Some(Peer::monitor(load::samples(&qemu, case.figure))),
            goal: case.goal,
        });
    }
}
