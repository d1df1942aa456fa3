//! Changes to devices and their counters, by the owner of the machine, while a guest loads them.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_storage::{DiskFile, DiskOptions};
use bantam_tests::{HostTap, Load, Traffic, device, require_kvm, require_taps};
use bantam_vmm::config::NetConfig;
use bantam_vmm::{DeviceCommand, DeviceError, Error, Limits, NetLimits, RateLimit};
use serde_json::Value;
use tempfile::TempDir;

const DISK_SIZE: usize = 4 << 20;
const BLOCK_SIZE: usize = 4096;
const BLOCKS: usize = DISK_SIZE / BLOCK_SIZE;
/// All engines, and the cache modes that differ in how they open files.
const KINDS: [&str; 6] = [
    ",engine=auto",
    ",engine=io_uring",
    ",engine=sync",
    ",engine=auto,cache=none",
    ",engine=io_uring,cache=none,iothread=on",
    ",engine=sync,cache=none",
];

/// A folder for images that need O_DIRECT.
fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to")
}

#[test]
fn a_disk_is_replaced_again_and_again_under_load() {
    require_kvm!();
    for kind in KINDS {
        let folder = folder();
        let [first, second] = ["a.img", "b.img"].map(|name| folder.path().join(name));
        fs::write(&first, vec![0; DISK_SIZE]).unwrap();
        let words = format!("mode=write pattern=seq verify seed=4 operations={BLOCKS}");
        Load::of_disk(&folder, &first, kind, &words).finish();
        fs::copy(&first, &second).unwrap();

        let words = "mode=read verify seed=4 depth=32 seconds=1";
        let load = Load::of_disk(&folder, &first, kind, words);
        for _ in 0..10 {
            for image in [&second, &first] {
                // Each is free again when the other has replaced it.
                load.replace(image).unwrap();
                thread::sleep(Duration::from_millis(5));
            }
        }
        let missing = folder.path().join("missing");
        let error = load.replace(&missing).unwrap_err();
        let is_told = matches!(
            &error,
            Error::Device {
                source: DeviceError::Image(_),
                ..
            }
        );
        assert!(is_told, "{error}");
        load.wait_for("PASS");
        load.finish();
    }
}

#[test]
fn what_is_written_goes_to_the_disk_that_is_there() {
    require_kvm!();
    for kind in KINDS {
        let folder = folder();
        let [first, second] = ["a.img", "b.img"].map(|name| folder.path().join(name));
        for image in [&first, &second] {
            fs::write(image, vec![0x5a; DISK_SIZE]).unwrap();
        }
        let words = "mode=write verify seed=4 depth=32 seconds=1";
        let load = Load::of_disk(&folder, &first, kind, words);
        thread::sleep(Duration::from_millis(100));
        load.replace(&second).unwrap();
        let until_then = fs::read(&first).unwrap();
        load.finish();
        let written = |bytes: &[u8]| {
            let blocks = bytes.chunks(BLOCK_SIZE);
            blocks.filter(|block| block[8..16] != [0x5a; 8]).count()
        };
        assert!(written(&until_then) > 0, "{kind}");
        assert!(fs::read(&first).unwrap() == until_then, "{kind}");
        assert!(written(&fs::read(&second).unwrap()) > 0, "{kind}");
    }
}

#[test]
fn a_disk_that_is_read_only_stays_so() {
    require_kvm!();
    let folder = folder();
    let [first, second] = ["a.img", "b.img"].map(|name| folder.path().join(name));
    for image in [&first, &second] {
        fs::write(image, vec![0; DISK_SIZE]).unwrap();
    }
    let load = Load::of_disk(&folder, &first, ",ro", "mode=read seconds=1");
    load.replace(&second).unwrap();
    // The new image is locked for reading only, and the old one is free.
    let open = |path: &Path, read_only| {
        let options = DiskOptions {
            read_only,
            ..DiskOptions::default()
        };
        DiskFile::open(path, &options)
    };
    open(&first, false).unwrap();
    open(&second, true).unwrap();
    open(&second, false).unwrap_err();
    let path = second.clone();
    let replaced = device(
        &load.machine,
        "disk1",
        DeviceCommand::ReplaceImage { path, format: None },
    );
    assert!(matches!(
        replaced,
        Err(Error::NoSuchDevice { name }) if name.as_str() == "disk1"
    ));
    load.finish();
}

#[test]
fn requests_are_counted_and_timed() {
    require_kvm!();
    for kind in KINDS {
        let folder = folder();
        let image = folder.path().join("a.img");
        fs::write(&image, vec![0; DISK_SIZE]).unwrap();
        let load = Load::of_disk(&folder, &image, kind, "mode=read depth=8 operations=3000");
        load.wait_for("\n{");
        let metrics = load.metrics()["devices"]["disk0"].clone();
        let figures = load.finish();
        assert_eq!(figures["operations"], 3000);
        assert_eq!(metrics["read_count"], 3000, "{kind}");
        assert_eq!(metrics["read_bytes"], 3000 * BLOCK_SIZE, "{kind}");
        let mean = |sum: &Value| sum.as_f64().unwrap() / 3000.0;
        // Of the order of the guest's own latency, which includes notifications.
        let device = mean(&metrics["read_agg"]["sum_us"]);
        let median = figures["p99_ns"].as_f64().unwrap() / 1000.0;
        assert!(
            device > 0.0 && device < 10.0 * median,
            "{kind}: {metrics} {figures}"
        );
    }
}

#[test]
fn limits_of_a_disk_are_changed_under_load() {
    require_kvm!();
    let folder = folder();
    let image = folder.path().join("a.img");
    fs::write(&image, vec![0; DISK_SIZE]).unwrap();
    let limited = ",operations-per-second=10,burst-operations=1";
    let words = "mode=read depth=32 operations=20000";
    let load = Load::of_disk(&folder, &image, limited, words);
    thread::sleep(Duration::from_millis(300));
    let done = || load.metrics()["devices"]["disk0"]["read_count"].as_u64();
    assert!(done() <= Some(20), "{:?}", done());
    let unlimited = DeviceCommand::SetLimits(Limits::default());
    device(&load.machine, "disk0", unlimited).unwrap();
    load.finish();
}

#[test]
fn a_network_device_is_limited_in_both_directions_and_counts() {
    require_taps!();
    let folder = folder();
    let tap = HostTap::new();
    for (mode, name) in [("transmit", "tx"), ("receive", "rx")] {
        for iothread in ["on", "off"] {
            let words = format!("test=net mode={mode} packet-size=64 depth=16 operations=250");
            let option = format!(
                "tap={},iothread={iothread},{name}-packets-per-second=500,{name}-burst-packets=10",
                tap.name
            );
            let _traffic = (mode == "receive").then(|| Traffic::flood(&tap.name, 64));
            let start = Instant::now();
            let load = Load::start(&folder, &words, |config| {
                config.nets = vec![option.parse::<NetConfig>().unwrap()];
            });
            load.wait_for("\n{");
            let time = start.elapsed();
            let metrics = load.metrics()["devices"]["net0"].clone();
            let figures = load.finish();
            // 240 packets at 500 a second.
            assert!(time >= Duration::from_millis(400), "{mode}: {time:?}");
            assert!(figures["operations"].as_u64() >= Some(250), "{figures}");
            let count = metrics[format!("{name}_packets_count")].as_u64().unwrap();
            assert!(count >= 250, "{metrics}");
            let bytes = &metrics[format!("{name}_bytes_count")];
            assert!(bytes.as_u64() >= Some(count * 60), "{metrics}");
        }
    }
}

#[test]
fn limits_of_a_network_device_are_changed_under_load() {
    require_taps!();
    let folder = folder();
    let tap = HostTap::new();
    let words = "test=net mode=transmit packet-size=64 depth=64 operations=20000";
    let load = Load::start(&folder, words, |config| {
        let option = format!("tap={},tx-packets-per-second=1", tap.name);
        config.nets = vec![option.parse().unwrap()];
    });
    thread::sleep(Duration::from_millis(200));
    let sent = || load.metrics()["devices"]["net0"]["tx_packets_count"].as_u64();
    assert!(sent() <= Some(3), "{:?}", sent());
    let limit = RateLimit {
        size: 10_000,
        refill_time: Duration::from_millis(100),
        one_time_burst: 5000,
    };
    let limits = NetLimits {
        transmit: Limits {
            operations: Some(limit),
            bytes: None,
        },
        ..NetLimits::default()
    };
    device(&load.machine, "net0", DeviceCommand::SetNetLimits(limits)).unwrap();
    load.finish();
}
