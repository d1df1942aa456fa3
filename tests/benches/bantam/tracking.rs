//! What it costs a disk and a network card that the monitor logs which pages of memory change.

use std::fs;
use std::path::Path;

use bantam_tests::Traffic;

use crate::block::{sync, write_image};
use crate::load::{self, Load, RUNS};
use crate::monitors::{Disk, DiskAccess, Guest, Monitor, Monitors, Network};
use crate::net::quiet_tap;
use crate::report::{Goal, Peer, Report, Row};

/// A load, and the size of the frames with which the host floods the guest meanwhile.
struct Case {
    name: &'static str,
    arguments: &'static str,
    flood: Option<usize>,
}

const BLOCK_CASES: [Case; 2] = [
    Case {
        name: "block: 4 KiB random read, depth 32",
        arguments: "test=block mode=read depth=32",
        flood: None,
    },
    Case {
        name: "block: 4 KiB random write, depth 32",
        arguments: "test=block mode=write depth=32",
        flood: None,
    },
];

const NET_CASES: [Case; 2] = [
    Case {
        name: "net: 64-byte packets, guest to host",
        arguments: "test=net mode=transmit packet-size=64 depth=256",
        flood: None,
    },
    Case {
        name: "net: 64-byte packets, host to guest",
        arguments: "test=net mode=receive packet-size=64 depth=256",
        flood: Some(64),
    },
];

/// Adds the rows; those of a network card only if taps can be created.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let image = monitors.folder().join("tracked.img");
    write_image(&image);
    for case in &BLOCK_CASES {
        measure_case(monitors, report, case, Some(&image), None);
    }
    let _ = fs::remove_file(&image);
    let Some(tap) = quiet_tap() else {
        return;
    };
    for case in &NET_CASES {
        measure_case(monitors, report, case, None, Some(&tap.name));
    }
}

fn measure_case(
    monitors: &Monitors,
    report: &mut Report,
    case: &Case,
    image: Option<&Path>,
    tap: Option<&str>,
) {
    let disk = image.map(|image| Disk {
        image: image.to_owned(),
        format: "raw",
        access: DiskAccess::Cached,
        options: "",
    });
    let run = |tracks_dirty_pages| {
        // Otherwise the kernel would write back the data of the last load meanwhile.
        image.map(sync);
        let _traffic = tap
            .zip(case.flood)
            .map(|(tap, size)| Traffic::flood(tap, size));
        let guest = Guest {
            disk: disk.clone(),
            network: tap.map(|tap| Network::Tap(tap.to_owned())),
            tracks_dirty_pages,
            ..load::guest(case.arguments)
        };
        load::run(monitors, Monitor::Bantam, &guest)
    };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..2 * RUNS {
        without.push(run(false));
        with.push(run(true));
        // The other way round, so that neither has the advantage of its place.
        with.push(run(true));
        without.push(run(false));
    }
    let name = format!("{}, with dirty pages tracked", case.name);
    load::warn_of_too_few_cpus(&name, &[&with[..], &without].concat());
    let rate = |load: &Load| load.operations_per_second;
    report.add(Row {
        name,
        unit: "1/s",
        bantam: load::samples(&with, rate),
        peer: Some(Peer::named(
            "the rate without",
            load::samples(&without, rate),
        )),
        goal: Goal::RatioAtLeast(0.95),
    });
}
