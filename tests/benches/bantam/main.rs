//! Measures Bantam beside QEMU's microvm machine: `make bench`, or `make bench ONLY=start` for one
//! part. `docs/benchmarks.md` says what is measured.
//!
//! Prints a table, and writes its rows to `bench/results.json` in cargo's target folder.

mod api;
mod block;
mod boot;
mod disks;
mod host_io;
mod images;
mod load;
mod many;
mod memory;
mod migration;
mod monitors;
mod named;
mod net;
mod process;
mod report;
mod snapshots;
mod start;
mod statistics;
mod tracking;
mod usernet;

use std::env;
use std::fs;
use std::path::PathBuf;

use monitors::Monitors;
use report::Report;

/// A part of the benchmarks, with the name that `ONLY=` takes.
type Part = (&'static str, fn(&Monitors, &mut Report));

const PARTS: [Part; 14] = [
    ("start", start::measure),
    ("api", api::measure),
    ("boot", boot::measure),
    ("memory", memory::measure),
    ("many", many::measure),
    ("block", block::measure),
    ("net", net::measure),
    ("usernet", usernet::measure),
    ("disks", disks::measure),
    ("images", images::measure),
    ("named", named::measure),
    ("snapshots", snapshots::measure),
    ("tracking", tracking::measure),
    ("migration", migration::measure),
];

fn main() {
    // Cargo itself passes `--bench`.
    let wanted: Vec<String> = env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    for name in &wanted {
        assert!(
            PARTS.iter().any(|(part, _)| part == name),
            "there is no part '{name}' of the benchmarks: expected one of {}",
            PARTS.map(|(part, _)| part).join(", ")
        );
    }
    let folder = target_folder().join("bench");
    fs::create_dir_all(&folder).expect("cargo's target folder can be written to");
    let monitors = Monitors::find(&target_folder(), &folder);
    let mut report = Report::new(&monitors);
    for (name, measure) in PARTS {
        if wanted.is_empty() || wanted.iter().any(|part| part == name) {
            eprintln!("measuring: {name}");
            measure(&monitors, &mut report);
        }
    }
    report.print();
    report.write(&folder.join("results.json"));
}

/// Cargo's target folder, where this program is in `release/deps`.
fn target_folder() -> PathBuf {
    let program = env::current_exe().expect("the system knows what it runs");
    program
        .ancestors()
        .nth(3)
        .expect("cargo puts benchmarks three folders deep")
        .to_owned()
}
