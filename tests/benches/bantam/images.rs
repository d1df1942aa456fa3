//! Disks in qcow2 images, beside raw ones and beside the peer's, and the tools for images beside `qemu-img`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::block::write_image;
use crate::load::{self, Load, RUNS};
use crate::monitors::{Disk, DiskAccess, Guest, Monitor, Monitors};
use crate::report::{Goal, Peer, Report, Row};
use crate::statistics::Samples;

const QEMU_IMG: &str = "qemu-img";
const RAW: &str = "Bantam's raw";
const NANOSECONDS_IN_MICROSECOND: f64 = 1000.0;
const MIB: u64 = 1 << 20;
/// Size of an image on which nearly each write of a load allocates a cluster.
const EMPTY_SIZE: &str = "64G";
/// Size of the disk that is converted, half of which is holes.
const CONVERTED_SIZE: u64 = 4096 * MIB;
const CONVERSIONS: usize = 4;
const CHECKED_SIZE: &str = "100G";

/// The number of a load that counts.
#[derive(Clone, Copy)]
enum Figure {
    Operations,
    MedianLatency,
}

/// A load on an image whose clusters are all allocated.
struct Case {
    name: &'static str,
    arguments: &'static str,
    figure: Figure,
    beside_raw: Goal,
    beside_peer: Goal,
}

const CASES: [Case; 3] = [
    Case {
        name: "4 KiB random read, depth 32",
        arguments: "mode=read depth=32",
        figure: Figure::Operations,
        beside_raw: Goal::RatioAtLeast(0.92),
        beside_peer: Goal::RatioAtLeast(1.8),
    },
    Case {
        name: "4 KiB random write, depth 32",
        arguments: "mode=write depth=32",
        figure: Figure::Operations,
        beside_raw: Goal::RatioAtLeast(0.9),
        beside_peer: Goal::RatioAtLeast(1.8),
    },
    Case {
        name: "4 KiB random read, depth 1, median latency",
        arguments: "mode=read depth=1",
        figure: Figure::MedianLatency,
        beside_raw: Goal::RatioAtMost(1.15),
        beside_peer: Goal::None,
    },
];

const RANDOM_READ: &str = "mode=read depth=32";

/// Loads whose writes allocate, with their names.
const ALLOCATING: [(&str, &str); 2] = [
    (
        "allocating 4 KiB random write, depth 32",
        "mode=write depth=32",
    ),
    (
        "allocating 64 KiB sequential write, depth 4",
        "mode=write pattern=seq block-size=64K depth=4",
    ),
];

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let files = Files::new(monitors.folder());
    measure_allocated(monitors, report, &files);
    measure_layers(monitors, report, &files);
    measure_allocating(monitors, report, &files);
    measure_tools(monitors, report, &files);
}

/// The files of these benchmarks, which are removed at the end.
struct Files {
    raw: PathBuf,
    allocated: PathBuf,
    middle: PathBuf,
    top: PathBuf,
    empty: PathBuf,
    target: PathBuf,
}

impl Files {
    fn new(folder: &Path) -> Files {
        let at = |name| folder.join(name);
        Files {
            raw: at("images-raw.img"),
            allocated: at("images-allocated.qcow2"),
            middle: at("images-middle.qcow2"),
            top: at("images-top.qcow2"),
            empty: at("images-empty.qcow2"),
            target: at("images-target.img"),
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in [
            &self.raw,
            &self.allocated,
            &self.middle,
            &self.top,
            &self.empty,
            &self.target,
        ] {
            let _ = fs::remove_file(path);
        }
    }
}

fn measure_allocated(monitors: &Monitors, report: &mut Report, files: &Files) {
    write_image(&files.raw);
    convert_to_qcow2(files);
    for case in &CASES {
        let qcow2 = guest(&files.allocated, "qcow2", case.arguments);
        let raw = guest(&files.raw, "raw", case.arguments);
        let [qcow2, raw, peer] = run_in_turn(
            monitors,
            [
                (Monitor::Bantam, &qcow2),
                (Monitor::Bantam, &raw),
                (Monitor::Qemu, &qcow2),
            ],
        );
        let name = format!("qcow2: {}", case.name);
        let beside_raw = Peer::named(RAW, case.figure.samples(&raw));
        add(
            report,
            name.clone(),
            case.figure,
            &qcow2,
            beside_raw,
            case.beside_raw,
        );
        let peer = Peer::monitor(case.figure.samples(&peer));
        add(report, name, case.figure, &qcow2, peer, case.beside_peer);
    }
}

/// Reads through three layers, of which the deepest has everything, and from one that has nothing.
fn measure_layers(monitors: &Monitors, report: &mut Report, files: &Files) {
    create(
        &files.middle,
        &["-F", "qcow2", "-b", text(&files.allocated)],
        None,
    );
    create(
        &files.top,
        &["-F", "qcow2", "-b", text(&files.middle)],
        None,
    );
    create(&files.empty, &[], Some("64M"));
    let raw = guest(&files.raw, "raw", RANDOM_READ);
    let top = guest(&files.top, "qcow2", RANDOM_READ);
    let empty = guest(&files.empty, "qcow2", RANDOM_READ);
    let [raw, top, empty] = run_in_turn(
        monitors,
        [&raw, &top, &empty].map(|guest| (Monitor::Bantam, guest)),
    );
    let name = "4 KiB random read, depth 32";
    for (what, loads, goal) in [
        ("three layers deep", top, 0.85),
        ("of what is not allocated", empty, 1.0),
    ] {
        add(
            report,
            format!("qcow2: {name}, {what}"),
            Figure::Operations,
            &loads,
            Peer::named(RAW, Figure::Operations.samples(&raw)),
            Goal::RatioAtLeast(goal),
        );
    }
}

fn measure_allocating(monitors: &Monitors, report: &mut Report, files: &Files) {
    for (name, arguments) in ALLOCATING {
        let guest = guest(&files.empty, "qcow2", arguments);
        let [mut bantam, mut qemu] = [const { Vec::new() }; 2];
        for _ in 0..RUNS {
            for (monitor, loads) in [(Monitor::Bantam, &mut bantam), (Monitor::Qemu, &mut qemu)] {
                create(&files.empty, &[], Some(EMPTY_SIZE));
                touch_memory();
                loads.push(load::run(monitors, monitor, &guest));
                check(&files.empty);
            }
        }
        let peer = Peer::monitor(Figure::Operations.samples(&qemu));
        let goal = Goal::RatioAtLeast(1.5);
        add(
            report,
            format!("qcow2: {name}"),
            Figure::Operations,
            &bantam,
            peer,
            goal,
        );
    }
}

/// Compares the time of a few commands of `bantam image` with those of `qemu-img`.
fn measure_tools(monitors: &Monitors, report: &mut Report, files: &Files) {
    write_half(&files.raw);
    let (raw, qcow2) = (text(&files.raw), text(&files.allocated));
    let target = text(&files.target);
    create(
        &files.empty,
        &["-o", "preallocation=metadata"],
        Some(CHECKED_SIZE),
    );
    convert_to_qcow2(files);
    let commands: [(&str, &[&str]); 3] = [
        (
            "convert 4 GiB, half of it holes, raw to qcow2",
            &["convert", "-f", "raw", "-O", "qcow2", raw, target],
        ),
        (
            "convert 4 GiB, half of it holes, qcow2 to raw",
            &["convert", "-f", "qcow2", "-O", "raw", qcow2, target],
        ),
        (
            "check 100 GiB",
            &["check", "-q", "-f", "qcow2", text(&files.empty)],
        ),
    ];
    for (name, arguments) in commands {
        let [mut bantam, mut qemu] = [const { Vec::new() }; 2];
        for round in 0..CONVERSIONS {
            let mut turns = [(true, &mut bantam), (false, &mut qemu)];
            // What the last command has left in the kernel can favour the next one.
            turns.rotate_left(round % 2);
            for (of_bantam, times) in turns {
                let _ = fs::remove_file(&files.target);
                // Otherwise the kernel would write back the last command's data while this one is measured.
                nix::unistd::sync();
                touch_memory();
                let mut command = if of_bantam {
                    let mut command = Command::new(monitors.bantam());
                    command.arg("image");
                    command
                } else {
                    Command::new(QEMU_IMG)
                };
                command.args(arguments).stdout(Stdio::null());
                let start = Instant::now();
                let status = command.status();
                times.push(start.elapsed().as_secs_f64() * 1000.0);
                assert!(
                    status.is_ok_and(|status| status.success()),
                    "{command:?} fails"
                );
            }
        }
        report.add(Row {
            name: format!("image: {name}"),
            unit: "ms",
            bantam: Samples::new(bantam),
            peer: Some(Peer::named("qemu-img", Samples::new(qemu))),
            goal: Goal::RatioAtMost(1.0),
        });
    }
}

/// Writes a disk of which every other MiB is a hole.
fn write_half(path: &Path) {
    let write = || {
        let file = File::create(path)?;
        file.set_len(CONVERTED_SIZE)?;
        let chunk: Vec<u8> = (0..MIB).map(|index| index as u8).collect();
        for offset in (0..CONVERTED_SIZE).step_by(2 * MIB as usize) {
            file.write_all_at(&chunk, offset)?;
        }
        file.sync_all()
    };
    write().unwrap_or_else(|error| panic!("cannot write '{}': {error}", path.display()));
}

fn guest(image: &Path, format: &'static str, arguments: &str) -> Guest {
    Guest {
        disk: Some(Disk {
            image: image.to_owned(),
            format,
            access: DiskAccess::Cached,
            options: "",
        }),
        ..load::guest(&format!("test=block {arguments}"))
    }
}

/// Runs loads that take turns.
fn run_in_turn<const N: usize>(
    monitors: &Monitors,
    cases: [(Monitor, &Guest); N],
) -> [Vec<Load>; N] {
    let mut loads = [const { Vec::new() }; N];
    for _ in 0..RUNS {
        for ((monitor, guest), loads) in cases.iter().zip(&mut loads) {
            loads.push(load::run(monitors, *monitor, guest));
        }
    }
    loads
}

impl Figure {
    fn unit(self) -> &'static str {
        match self {
            Self::Operations => "1/s",
            Self::MedianLatency => "us",
        }
    }

    fn samples(self, loads: &[Load]) -> Samples {
        load::samples(loads, |load| match self {
            Self::Operations => load.operations_per_second,
            Self::MedianLatency => {
                load.median_latency.expect("a disk's requests are timed")
                    / NANOSECONDS_IN_MICROSECOND
            }
        })
    }
}

fn add(report: &mut Report, name: String, figure: Figure, loads: &[Load], peer: Peer, goal: Goal) {
    load::warn_of_too_few_cpus(&name, loads);
    report.add(Row {
        name,
        unit: figure.unit(),
        bantam: figure.samples(loads),
        peer: Some(peer),
        goal,
    });
}

/// Touches as much memory as a run fills of the page cache, and frees it. On a host that is a virtual machine, the first
/// use of memory can take longer than the writes that are measured, and only some runs would meet it.
fn touch_memory() {
    const SIZE: usize = 2 << 30;
    let mut memory = vec![0_u8; SIZE];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
}

/// Makes an empty image with these options; without a size, it has that of its backing file.
fn create(path: &Path, options: &[&str], size: Option<&str>) {
    // The kernel can hold the locks of a monitor that has ended for a while, but a new file has none.
    let _ = fs::remove_file(path);
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    arguments.extend(options);
    arguments.push(text(path));
    arguments.extend(size);
    qemu_img(&arguments);
}

fn convert_to_qcow2(files: &Files) {
    let (raw, qcow2) = (text(&files.raw), text(&files.allocated));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw, qcow2]);
}

/// Checks the image of a monitor that was killed: clusters may have leaked, and the kernel may not have released its locks.
fn check(path: &Path) {
    const LEAKS: i32 = 3;
    let output = Command::new(QEMU_IMG)
        .args(["check", "-q", "-U", text(path)])
        .output();
    let output = output.unwrap_or_else(|error| panic!("{QEMU_IMG}: {error}"));
    assert!(
        [Some(0), Some(LEAKS)].contains(&output.status.code()),
        "qemu-img finds errors in {}: {}",
        path.display(),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn qemu_img(arguments: &[&str]) {
    let status = Command::new(QEMU_IMG).args(arguments).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "qemu-img {arguments:?} fails"
    );
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the benchmarks chose the name")
}
