//! Bantam's disks compared with each other: a disk under load with and without idle ones, and the
//! default engine beside each of the others.

use std::fs;
use std::path::Path;

use crate::block::write_image;
use crate::load::{self, Load, RUNS};
use crate::monitors::{Disk, DiskAccess, Guest, Monitor, Monitors};
use crate::report::{Goal, Peer, Report, Row};

const IDLE_DISKS: usize = 16;
/// Ratio that still counts as noise.
const AS_FAST: f64 = 0.95;

/// A load; see `block`.
struct Case {
    name: &'static str,
    arguments: &'static str,
    access: DiskAccess,
}

const READ_DEPTH_1: Case = Case {
    name: "4 KiB random read, depth 1",
    arguments: "mode=read depth=1",
    access: DiskAccess::Cached,
};
const READ_DEPTH_32: Case = Case {
    name: "4 KiB random read, depth 32",
    arguments: "mode=read depth=32",
    access: DiskAccess::Cached,
};

const ENGINE_CASES: [Case; 5] = [
    READ_DEPTH_1,
    Case {
        name: "4 KiB random read, depth 4",
        arguments: "mode=read depth=4",
        access: DiskAccess::Cached,
    },
    READ_DEPTH_32,
    Case {
        name: "4 KiB random write, depth 32",
        arguments: "mode=write depth=32",
        access: DiskAccess::Cached,
    },
    Case {
        name: "4 KiB random read past the page cache, depth 32",
        arguments: "mode=read depth=32",
        access: DiskAccess::Direct,
    },
];

/// The engines that execute all requests in one way.
const PURE_ENGINES: [(&str, &str); 2] = [
    ("engine=sync", ",engine=sync"),
    ("engine=io_uring", ",engine=io_uring"),
];

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let (image, idle) = ["load.img", "idle.img"]
        .map(|name| monitors.folder().join(name))
        .into();
    for path in [&image, &idle] {
        write_image(path);
    }
    for case in [&READ_DEPTH_1, &READ_DEPTH_32] {
        let alone = guest(&image, case, "");
        let crowded = Guest {
            idle_disks: vec![idle.clone(); IDLE_DISKS],
            ..alone.clone()
        };
        let [crowded, alone] = run_in_turn(monitors, [&crowded, &alone]);
        let name = format!("{}: with {IDLE_DISKS} idle disks", case.name);
        add(report, name, &crowded, "one without", &alone);
    }
    for case in &ENGINE_CASES {
        let default = guest(&image, case, "");
        if let Err(reason) = load::try_out(monitors, Monitor::Bantam, &default) {
            eprintln!("skipped: {}: Bantam cannot: {reason}", case.name);
            continue;
        }
        let [first, second] = PURE_ENGINES.map(|(_, options)| guest(&image, case, options));
        let [default, first, second] = run_in_turn(monitors, [&default, &first, &second]);
        for ((engine, _), loads) in PURE_ENGINES.iter().zip([first, second]) {
            let name = format!("{}: default engine", case.name);
            add(report, name, &default, engine, &loads);
        }
    }
    for path in [&image, &idle] {
        let _ = fs::remove_file(path);
    }
}

fn guest(image: &Path, case: &Case, options: &'static str) -> Guest {
    Guest {
        disk: Some(Disk {
            image: image.to_owned(),
            format: "raw",
            access: case.access,
            options,
        }),
        ..load::guest(&format!("test=block {}", case.arguments))
    }
}

/// Runs the loads of several guests, which take turns.
fn run_in_turn<const N: usize>(monitors: &Monitors, guests: [&Guest; N]) -> [Vec<Load>; N] {
    let mut loads = [const { Vec::new() }; N];
    for _ in 0..RUNS {
        for (guest, loads) in guests.iter().zip(&mut loads) {
            loads.push(load::run(monitors, Monitor::Bantam, guest));
        }
    }
    loads
}

fn add(report: &mut Report, name: String, ours: &[Load], peer: &'static str, theirs: &[Load]) {
    let name = format!("disks: {name}");
    load::warn_of_too_few_cpus(&name, &[ours, theirs].concat());
    let rate = |load: &Load| load.operations_per_second;
    report.add(Row {
        name,
        unit: "1/s",
        bantam: load::samples(ours, rate),
        peer: Some(Peer::named(peer, load::samples(theirs, rate))),
        goal: Goal::RatioAtLeast(AS_FAST),
    });
}
