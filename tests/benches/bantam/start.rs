//! The time that the monitor itself takes: from the start of its process to its end, with a guest
//! whose first instruction asks for a reset.

use std::time::Duration;

use bantam_tests::payload;

use crate::monitors::{Guest, Monitor, Monitors};
use crate::process::{Ended, Process};
use crate::report::{Goal, Peer, Report, Row};

const RUNS: usize = 31;
const LIMIT: Duration = Duration::from_secs(30);

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let guest = Guest {
        kernel: payload("reset"),
        memory_mib: 128,
        ..Guest::default()
    };
    let run = |monitor| Process::start(monitors.command(monitor, &guest)).wait(LIMIT);
    // Programs and kernels are in the page cache after this.
    let _warm_up = Monitor::BOTH.map(run);
    let turns: Vec<[Ended; 2]> = (0..RUNS).map(|_| Monitor::BOTH.map(run)).collect();

    let mut add = |name: &str, of: fn(&Ended) -> Duration, limit| {
        let milliseconds = |ended| of(ended).as_secs_f64() * 1000.0;
        report.add(Row {
            name: name.to_owned(),
            unit: "ms",
            bantam: turns
                .iter()
                .map(|[bantam, _]| milliseconds(bantam))
                .collect(),
            peer: Some(Peer::monitor(
                turns.iter().map(|[_, qemu]| milliseconds(qemu)).collect(),
            )),
            goal: Goal::RatioAtMost(limit),
        });
    };
    add(
        "start: guest that only asks for a reset, wall time",
        |ended| ended.wall,
        0.35,
    );
    add(
        "start: guest that only asks for a reset, CPU time",
        |ended| ended.cpu,
        0.2,
    );
}
