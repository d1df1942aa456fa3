//! The speed of a disk, through the page cache and past it, and its cost for the host.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::host_io::{direct_io_uring_loop, pread_loop};
use crate::load::{self, Load, RUNS};
use crate::monitors::{Disk, DiskAccess, Guest, Monitor, Monitors};
use crate::report::{Goal, Peer, Report, Row};
use crate::statistics::Samples;

const MIB: usize = 1 << 20;
const IMAGE_MIB: usize = 64;
const DIRECT_DEPTH: u32 = 32;
const NANOSECONDS_IN_MICROSECOND: f64 = 1000.0;
const BYTES_IN_MB: f64 = 1e6;

/// The number of a load that counts.
#[derive(Clone, Copy)]
enum Figure {
    Operations,
    Bytes,
    MedianLatency,
}

impl Figure {
    fn unit(self) -> &'static str {
        match self {
            Self::Operations => "1/s",
            Self::Bytes => "MB/s",
            Self::MedianLatency => "us",
        }
    }

    fn of(self, load: &Load) -> f64 {
        match self {
            Self::Operations => load.operations_per_second,
            Self::Bytes => load.bytes_per_second / BYTES_IN_MB,
            Self::MedianLatency => {
                let nanoseconds = load.median_latency.expect("a disk's requests are timed");
                nanoseconds / NANOSECONDS_IN_MICROSECOND
            }
        }
    }
}

/// A load through the page cache.
struct Case {
    name: &'static str,
    arguments: &'static str,
    figure: Figure,
    goal: Goal,
}

const READ_DEPTH_32: Case = Case {
    name: "4 KiB random read, depth 32",
    arguments: "mode=read depth=32",
    figure: Figure::Operations,
    goal: Goal::RatioAtLeast(1.9),
};

const OTHER_CASES: [Case; 4] = [
    Case {
        name: "4 KiB random read, depth 4",
        arguments: "mode=read depth=4",
        figure: Figure::Operations,
        goal: Goal::RatioAtLeast(1.3),
    },
    Case {
        name: "4 KiB random read, depth 1, median latency",
        arguments: "mode=read depth=1",
        figure: Figure::MedianLatency,
        goal: Goal::AtMost(6.0),
    },
    Case {
        name: "1 MiB sequential read, depth 4",
        arguments: "mode=read pattern=seq block-size=1M depth=4",
        figure: Figure::Bytes,
        goal: Goal::RatioAtLeast(1.1),
    },
    Case {
        name: "4 KiB random write, depth 32",
        arguments: "mode=write depth=32",
        figure: Figure::Operations,
        goal: Goal::RatioAtLeast(2.0),
    },
];

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let image = monitors.folder().join("load.img");
    write_image(&image);
    let host_reads = || pread_loop(&image).unwrap_or_else(|error| cannot("read", &image, &error));
    let (bantam, host) = measure_case(monitors, report, &image, &READ_DEPTH_32, host_reads);
    report.add(Row {
        name: row_name(READ_DEPTH_32.name, "beside the host"),
        unit: Figure::Operations.unit(),
        bantam: load::samples(&bantam, |load| load.operations_per_second),
        peer: Some(Peer::named("host pread loop", Samples::new(host))),
        goal: Goal::RatioAtLeast(0.9),
    });
    for case in &OTHER_CASES {
        measure_case(monitors, report, &image, case, || ());
    }
    measure_direct(monitors, report, &image);
    let _ = fs::remove_file(&image);
}

/// Adds the rows of one load. Returns Bantam's runs, and the results of `host`, which takes turns
/// with the monitors.
fn measure_case<T>(
    monitors: &Monitors,
    report: &mut Report,
    image: &Path,
    case: &Case,
    host: impl Fn() -> T,
) -> (Vec<Load>, Vec<T>) {
    let guest = guest(image, DiskAccess::Cached, case.arguments);
    let (mut bantam, mut qemu, mut of_host) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        for (monitor, loads) in [(Monitor::Bantam, &mut bantam), (Monitor::Qemu, &mut qemu)] {
            // Otherwise the kernel would write back the data of the last load while this one is
            // measured.
            sync(image);
            loads.push(load::run(monitors, monitor, &guest));
        }
        of_host.push(host());
    }
    report.add(Row {
        name: format!("block: {}", case.name),
        unit: case.figure.unit(),
        bantam: load::samples(&bantam, |load| case.figure.of(load)),
        peer: Some(Peer::monitor(load::samples(&qemu, |load| {
            case.figure.of(load)
        }))),
        goal: case.goal,
    });
    add_cpu(report, case.name, &bantam, &qemu);
    (bantam, of_host)
}

/// Adds the row of CPU time of a load, and warns if the host had too few CPUs for its rows.
fn add_cpu(report: &mut Report, name: &str, bantam: &[Load], qemu: &[Load]) {
    load::warn_of_too_few_cpus(&format!("block: {name}"), &[bantam, qemu].concat());
    let per_operation = |load: &Load| {
        assert!(
            !load.device_cpu.is_zero(),
            "no thread of a monitor is known to serve its disk"
        );
        load.device_cpu.as_secs_f64() * 1e6 / load.operations
    };
    report.add(Row {
        name: row_name(name, "device threads' CPU time, each"),
        unit: "us",
        bantam: load::samples(bantam, per_operation),
        peer: Some(Peer::monitor(load::samples(qemu, per_operation))),
        goal: Goal::RatioAtMost(0.7),
    });
}

fn row_name(case: &str, what: &str) -> String {
    format!("block: {case}: {what}")
}

/// Measures past the page cache, if the image's file system and Bantam can.
fn measure_direct(monitors: &Monitors, report: &mut Report, image: &Path) {
    const NAME: &str = "4 KiB random read past the page cache, depth 32";
    let guest = guest(
        image,
        DiskAccess::Direct,
        &format!("mode=read depth={DIRECT_DEPTH}"),
    );
    if let Err(error) = direct_io_uring_loop(image, DIRECT_DEPTH) {
        eprintln!("skipped: {NAME}: the host cannot: {error}");
        return;
    }
    if let Err(reason) = load::try_out(monitors, Monitor::Bantam, &guest) {
        eprintln!("skipped: {NAME}: Bantam cannot: {reason}");
        return;
    }
    let (mut bantam, mut qemu, mut host) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        bantam.push(load::run(monitors, Monitor::Bantam, &guest));
        qemu.push(load::run(monitors, Monitor::Qemu, &guest));
        host.push(
            direct_io_uring_loop(image, DIRECT_DEPTH)
                .unwrap_or_else(|error| cannot("read", image, &error)),
        );
    }
    let rate = |load: &Load| load.operations_per_second;
    report.add(Row {
        name: format!("block: {NAME}"),
        unit: Figure::Operations.unit(),
        bantam: load::samples(&bantam, rate),
        peer: Some(Peer::monitor(load::samples(&qemu, rate))),
        goal: Goal::None,
    });
    report.add(Row {
        name: row_name(NAME, "beside the host"),
        unit: Figure::Operations.unit(),
        bantam: load::samples(&bantam, rate),
        peer: Some(Peer::named("host io_uring loop", Samples::new(host))),
        goal: Goal::RatioAtLeast(0.95),
    });
    add_cpu(report, NAME, &bantam, &qemu);
}

fn guest(image: &Path, access: DiskAccess, arguments: &str) -> Guest {
    Guest {
        disk: Some(Disk {
            image: image.to_owned(),
            format: "raw",
            access,
            options: "",
        }),
        ..load::guest(&format!("test=block {arguments}"))
    }
}

/// Writes an image without holes, which is both on the disk and in the page cache.
pub fn write_image(path: &Path) {
    let write = || {
        let mut file = File::create(path)?;
        let mut chunk = vec![0_u8; MIB];
        for (index, byte) in chunk.iter_mut().enumerate() {
            *byte = index as u8;
        }
        for _ in 0..IMAGE_MIB {
            file.write_all(&chunk)?;
        }
        file.sync_all()
    };
    write().unwrap_or_else(|error| cannot("write", path, &error));
}

/// Writes what the page cache has of a file to the disk.
pub fn sync(path: &Path) {
    File::open(path)
        .and_then(|file| file.sync_all())
        .unwrap_or_else(|error| cannot("sync", path, &error));
}

fn cannot(what: &str, path: &Path, error: &std::io::Error) -> ! {
    panic!("cannot {what} '{}': {error}", path.display())
}
