//! The payload `load` on disks and network cards: under load, no data is lost or mixed up.

extern crate alloc;

// Parts of the payload that need no machine.
#[allow(dead_code, missing_docs)]
#[path = "../payloads/src/bin/load/histogram.rs"]
mod histogram;
#[allow(dead_code, missing_docs)]
#[path = "../payloads/src/bin/load/stamp.rs"]
mod stamp;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use histogram::Histogram;
use stamp::Stamps;

use bantam_tests::{Bantam, Ended, HostTap, Traffic, require_kvm, require_taps, tap_name};

const DISK_SIZE: u64 = 4 << 20;
const BLOCK_SIZE: u64 = 4096;

/// Runs a load on a disk.
fn load_disk(disk: &Path, words: &str) -> Ended {
    Bantam::payload("load")
        .disk(disk, "")
        .append(format!("test=block {words}"))
        .finish()
}

/// Returns a number from the line that the payload prints.
fn figure(ended: &Ended, name: &str) -> u64 {
    let text = ended.text();
    let line = text.lines().find(|line| line.starts_with('{'));
    let line = line.unwrap_or_else(|| panic!("no line of JSON in\n{ended}"));
    let figures: serde_json::Value = serde_json::from_str(line).expect("it is JSON");
    let figure = figures[name].as_u64();
    figure.unwrap_or_else(|| panic!("no '{name}' in\n{ended}"))
}

fn empty_disk(folder: &Path) -> PathBuf {
    let path = folder.join("disk");
    let disk = File::create(&path).expect("the folder is writable");
    disk.set_len(DISK_SIZE).expect("sizes can be set");
    path
}

/// Fills a disk with stamps, and then runs other loads that check and change them. Returns the
/// number of interrupts of all loads.
fn no_data_is_mixed_up(depth: u32, completion: &str) -> u64 {
    let folder = tempfile::tempdir().expect("there is room for temporary files");
    let disk = empty_disk(folder.path());
    let common = format!("verify seed=7 depth={depth} completion={completion}");
    let blocks = DISK_SIZE / BLOCK_SIZE;
    let mut interrupts = 0;
    for words in [
        format!("mode=write pattern=seq operations={blocks}"),
        "mode=read pattern=random operations=2000".into(),
        "mode=mixed pattern=random operations=4000".into(),
        "mode=read pattern=seq block-size=8192 operations=600".into(),
        "mode=read pattern=seq block-size=512 operations=2000".into(),
    ] {
        let ended = load_disk(&disk, &format!("{common} {words}"));
        ended.passed();
        let wanted = words.rsplit_once('=').map(|(_, count)| count.parse());
        assert_eq!(Some(Ok(figure(&ended, "operations"))), wanted, "{ended}");
        assert_eq!(figure(&ended, "errors"), 0, "{ended}");
        interrupts += figure(&ended, "interrupts");
    }
    interrupts
}

#[test]
fn no_data_is_mixed_up_one_request_at_a_time() {
    require_kvm!();
    assert_eq!(no_data_is_mixed_up(1, "polled"), 0);
}

#[test]
fn no_data_is_mixed_up_with_many_requests_in_flight() {
    require_kvm!();
    assert_eq!(no_data_is_mixed_up(256, "polled"), 0);
}

#[test]
fn no_data_is_mixed_up_with_interrupts() {
    require_kvm!();
    assert!(no_data_is_mixed_up(1, "interrupt") > 0);
    // If requests are always done when the driver looks, it needs no interrupt, so the test
    // requires none.
    no_data_is_mixed_up(256, "interrupt");
}

#[test]
fn large_requests_keep_their_data() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = empty_disk(folder.path());
    for mode in ["write", "read"] {
        let words = "pattern=seq block-size=1M depth=4 verify operations=8";
        load_disk(&disk, &format!("mode={mode} {words}")).passed();
    }
}

#[test]
fn data_that_nobody_wrote_is_noticed() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = empty_disk(folder.path());
    let write = format!(
        "mode=write pattern=seq verify operations={}",
        DISK_SIZE / BLOCK_SIZE
    );
    load_disk(&disk, &write).passed();
    let mut data = fs::read(&disk).unwrap();
    data[DISK_SIZE as usize / 2 + 1000] ^= 1;
    fs::write(&disk, data).unwrap();
    let read = write.replace("write", "read");
    load_disk(&disk, &read)
        .succeeded()
        .printed("FAIL: block read: 1 errors, the first: at 0x2003e8 of the disk is")
        .printed("\nFAIL\n");
}

#[test]
fn a_load_ends_after_its_time() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = empty_disk(folder.path());
    let ended = load_disk(&disk, "mode=read seconds=1");
    ended.passed();
    assert!(figure(&ended, "operations") > 100, "{ended}");
    let text = ended.text();
    let seconds = text.split("\"seconds\":").nth(1);
    let seconds = seconds.and_then(|rest| rest.split(',').next()?.parse::<f64>().ok());
    assert!(
        seconds.is_some_and(|seconds| (1.0..5.0).contains(&seconds)),
        "{ended}"
    );
    assert!(
        ended.duration.as_secs_f64() > seconds.unwrap_or_default(),
        "{ended}"
    );
}

#[test]
fn wrong_arguments_fail_with_a_line_that_says_so() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let disk = empty_disk(folder.path());
    for (words, line) in [
        ("depth=0", "depth=0: expected a number from 1 to 256"),
        ("depth=many", "depth=many: expected a number from 1 to 256"),
        ("mode=erase", "mode=erase: expected read or write or mixed"),
        (
            "block-size=5000",
            "block-size=5000: expected a power of two",
        ),
        (
            "seconds=1 operations=1",
            "expected seconds=N or operations=N, not both",
        ),
        ("queues=4", "queues=4: the block device has 1"),
        (
            "span=1G",
            "span=1073741824: the block device has 4194304 bytes",
        ),
        ("test=net", "there is no network card"),
        (
            "test=tape",
            "expected test=block, test=net, test=tcp or test=udp, not 'tape'",
        ),
    ] {
        load_disk(&disk, words)
            .succeeded()
            .printed(&format!("FAIL: load: {line}\nFAIL\n"));
    }
}

#[test]
fn frames_come_back_in_a_round_trip() {
    require_taps!();
    let tap = HostTap::new();
    for words in [
        "packet-size=64 depth=1 operations=500",
        "packet-size=1514 depth=64 operations=5000",
        "packet-size=64 depth=4 operations=500 completion=interrupt",
    ] {
        let _echo = Traffic::echo(&tap.name);
        let ended = Bantam::payload("load")
            .option("--net", format!("tap={}", tap.name))
            .append(format!("test=net mode=round-trip {words}"))
            .finish();
        ended.passed();
        assert_eq!(figure(&ended, "errors"), 0, "{ended}");
    }
}

#[test]
fn frames_are_sent_and_received_by_the_thousand() {
    require_taps!();
    let tap = HostTap::new();
    let _flood = Traffic::flood(&tap.name, 64);
    for words in [
        "mode=transmit packet-size=64 depth=256 operations=20000",
        "mode=transmit packet-size=65536 depth=16 operations=2000",
        "mode=receive packet-size=64 depth=256 operations=20000",
    ] {
        let ended = Bantam::payload("load")
            .option("--net", format!("tap={}", tap.name))
            .append(format!("test=net {words}"))
            .finish();
        ended.passed();
        assert!(figure(&ended, "operations") >= 2000, "{ended}");
    }
}

#[test]
fn frames_that_do_not_come_back_are_counted() {
    require_taps!();
    let ended = Bantam::payload("load")
        .option("--net", format!("tap={}", tap_name()))
        .append("test=net mode=round-trip depth=4 seconds=1")
        .finish();
    ended
        .succeeded()
        .printed("FAIL: net round trip: 4 errors, the first: a frame did not come back");
}

#[test]
fn a_histogram_knows_times_to_two_percent() {
    assert_eq!(Histogram::new().percentile(0.5), None);
    for scale in [1, 7, 1000, 123_456, 1 << 30] {
        let mut histogram = Histogram::new();
        for time in 1..=1000 {
            histogram.record(time * scale);
        }
        for (share, expected) in [(0.001, 1), (0.5, 500), (0.99, 990), (0.999, 999)] {
            let expected = (expected * scale) as f64;
            let found = histogram.percentile(share).expect("there are times") as f64;
            assert!(
                (found - expected).abs() <= 0.02 * expected,
                "{share} of {scale}: {found}, not {expected}"
            );
        }
    }
}

#[test]
fn a_histogram_takes_any_time() {
    let mut histogram = Histogram::new();
    histogram.record(0);
    histogram.record(u64::MAX);
    assert_eq!(histogram.percentile(0.5), Some(0));
    assert!(histogram.percentile(1.0) > Some(1 << 39));
}

#[test]
fn stamps_distinguish_places_seeds_and_generations() {
    let mut stamps = Stamps::new(7, 16).unwrap();
    let mut data = [0; 512];
    stamps.fill(3, &mut data);
    assert_eq!(stamps.check(3, &data), Ok(()));
    // Of another place, another load, and another seed.
    assert!(stamps.check(4, &data).is_err());
    assert_eq!(Stamps::new(7, 16).unwrap().check(3, &data), Ok(()));
    assert!(Stamps::new(8, 16).unwrap().check(3, &data).is_err());
    // Data written before is stale, and so is a block that is half of it.
    let before = data;
    stamps.fill(3, &mut data);
    assert!(stamps.check(3, &before).is_err());
    data[256..].copy_from_slice(&before[256..]);
    assert!(stamps.check(3, &data).is_err());
    assert!(Stamps::new(7, u64::MAX).is_err());
}
