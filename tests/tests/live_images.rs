//! Snapshots, growth, copies, commits and pulls of disks whose guest writes to them meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{Load, device, qemu_img, require_kvm};
use bantam_vmm::config::{DiskConfig, MachineConfig};
use bantam_vmm::{
    Controller, DeviceAnswer, DeviceCommand, DiskJob, DiskSnapshot, Error, Event, Events,
    ImageFormat, JobState, JobStatus,
};
use tempfile::TempDir;

const DISK_SIZE: u64 = 16 << 20;
/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(60);
/// A guest that writes everywhere, in no order, and checks what it reads.
const MIXED: &str = "test=block mode=mixed verify seed=7 depth=16";
/// A guest that checks all blocks that such a guest has written, and some more.
const CHECK: &str = "test=block mode=read verify seed=7 depth=8 operations=8192 pattern=seq";

/// A folder on a disk, not in memory.
fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to")
}

/// Checks that a qcow2 image is in order.
#[track_caller]
fn check(image: &Path) {
    qemu_img(&["check", "-q", "-U", "-f", "qcow2"], &[image]);
}

/// Makes an image, each block of which a guest has written.
fn written(folder: &TempDir, name: &str, format: &str) -> PathBuf {
    let path = create(folder, name, format);
    let words = format!(
        "test=block mode=write pattern=seq verify seed=7 depth=8 operations={}",
        DISK_SIZE / 4096
    );
    let kind = format!(",format={format}");
    Load::start(folder, &words, |config| {
        config.disks = vec![disk(&path, &kind)];
    })
    .finish();
    path
}

/// Makes an image that reads as zeroes.
fn create(folder: &TempDir, name: &str, format: &str) -> PathBuf {
    let path = folder.path().join(name);
    let size = DISK_SIZE.to_string();
    qemu_img(&["create", "-q", "-f", format], &[&path, Path::new(&size)]);
    path
}

fn disk(path: &Path, kind: &str) -> DiskConfig {
    let option = format!("{}{kind}", path.display());
    option.parse().expect("it is a disk")
}

/// Starts a guest that loads a disk for some seconds.
fn load(folder: &TempDir, image: &Path, kind: &str, seconds: u32) -> Load {
    let words = format!("{MIXED} seconds={seconds}");
    Load::start(folder, &words, |config| {
        config.disks = vec![disk(image, kind)];
    })
}

/// Has a guest check the disks of a machine as they are configured now.
#[track_caller]
fn check_by_guest(folder: &TempDir, config: &MachineConfig) {
    let disks = config.disks.clone();
    Load::start(folder, CHECK, |config| config.disks = disks).finish();
}

fn job(machine: &Controller) -> Option<JobStatus> {
    match device(machine, "disk0", DeviceCommand::Job).expect("it is a disk") {
        DeviceAnswer::Job(status) => status,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn start_job(machine: &Controller, job: DiskJob) {
    let started = device(machine, "disk0", DeviceCommand::StartJob(job));
    started.unwrap_or_else(|error| panic!("{error}"));
}

/// Waits for the next event of a job.
#[track_caller]
fn next_of_job(events: &Events) -> JobStatus {
    let deadline = Instant::now() + LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match events.next_within(left) {
            Some(Event::Job { device, status }) => {
                assert_eq!(device.as_str(), "disk0");
                return status;
            }
            Some(_) => {}
            None => panic!("the job does not go on"),
        }
    }
}

#[track_caller]
fn refused(machine: &Controller, command: DeviceCommand) -> String {
    let error = device(machine, "disk0", command).expect_err("it is refused");
    let error = error.to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

// --- Snapshots ------------------------------------------------------------------------------------

fn snapshot(machine: &Controller, disks: &[(&str, &Path)]) -> Result<Duration, Error> {
    let disks = disks.iter().map(|(disk, path)| DiskSnapshot {
        disk: disk.parse().expect("it is a name"),
        path: path.to_path_buf(),
    });
    machine.snapshot_disks(disks.collect())
}

#[test]
fn snapshots_are_taken_under_load() {
    require_kvm!();
    for (format, kind) in [
        ("raw", ""),
        ("qcow2", ",format=qcow2,iothread=on"),
        ("raw", ",engine=sync"),
        ("qcow2", ",format=qcow2,engine=io_uring,cache=writethrough"),
        ("raw", ",cache=none"),
    ] {
        let folder = folder();
        let [first, second] = ["a.img", "b.img"].map(|name| written(&folder, name, format));
        let words = format!("{MIXED} seconds=3");
        let load = Load::start(&folder, &words, |config| {
            config.disks = vec![disk(&first, kind), disk(&second, kind)];
        });
        let machine = load.machine.clone();
        let mut times = Vec::new();
        let mut images = vec![(first.clone(), None::<Vec<u8>>)];
        for number in 0..5 {
            thread::sleep(Duration::from_millis(300));
            let overlays =
                ["a", "b"].map(|name| folder.path().join(format!("{name}{number}.qcow2")));
            let held_up = snapshot(
                &machine,
                &[("disk0", &overlays[0]), ("disk1", &overlays[1])],
            );
            let held_up = held_up.unwrap_or_else(|error| panic!("{kind}: {error}"));
            times.push(held_up);
            let (last, content) = images.last_mut().unwrap();
            *content = Some(fs::read(last).unwrap());
            images.push((overlays[0].clone(), None));
        }
        times.sort();
        println!("{kind}: requests were held up for {times:?}");
        // Requests wait for no timeout. The host's storage and its other work decide about the rest.
        assert!(times[2] < Duration::from_secs(1), "{kind}: {times:?}");
        let config = machine.configuration().unwrap();
        assert_eq!(config.disks[0].path, images[5].0);
        load.finish();
        drop(machine);
        for (image, content) in &images {
            if let Some(content) = content {
                assert!(fs::read(image).unwrap() == *content, "{}", image.display());
            }
            if format == "qcow2" || *image != first {
                check(image);
            }
        }
        check_by_guest(&folder, &config);
    }
}

#[test]
fn all_disks_have_a_snapshot_or_none_has() {
    require_kvm!();
    let folder = folder();
    let [first, second] = ["a.img", "b.img"].map(|name| create(&folder, name, "raw"));
    let load = Load::start(&folder, &format!("{MIXED} seconds=2"), |config| {
        config.disks = vec![disk(&first, ""), disk(&second, ",ro")];
    });
    let machine = &load.machine;
    let [overlay, other] = ["a.qcow2", "b.qcow2"].map(|name| folder.path().join(name));
    fs::write(&other, "here").unwrap();
    for (disks, reason) in [
        ([("disk0", &overlay), ("disk1", &other)], "it is read-only"),
        ([("disk0", &overlay), ("disk0", &other)], "each disk once"),
        (
            [("disk0", &overlay), ("disk7", &other)],
            "no device 'disk7'",
        ),
        ([("disk0", &other), ("disk1", &overlay)], "File exists"),
    ] {
        let disks = disks.map(|(name, path)| (name, path.as_path()));
        let error = snapshot(machine, &disks).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!overlay.exists(), "{reason}");
        assert_eq!(fs::read(&other).unwrap(), b"here");
    }
    assert_eq!(machine.configuration().unwrap().disks[0].path, first);
    let direct = snapshot(machine, &[]).unwrap();
    assert!(direct < LIMIT);
    load.finish();
}

/// Starts a guest that loads a disk for a second, and is paused.
fn load_paused(folder: &TempDir, image: &Path, kind: &str) -> Load {
    let load = load(folder, image, kind, 1);
    load.machine.pause().expect("it runs");
    load
}

#[test]
fn a_paused_machine_has_a_snapshot_too_and_others_can_read_the_base() {
    require_kvm!();
    let folder = folder();
    let image = written(&folder, "a.img", "qcow2");
    let load = load_paused(&folder, &image, ",format=qcow2");
    let overlay = folder.path().join("a.qcow2");
    let info = |image: &Path| {
        let output = Command::new("qemu-img")
            .args(["info", "-f", "qcow2"])
            .arg(image)
            .output();
        output.unwrap().status.success()
    };
    assert!(!info(&image));
    snapshot(&load.machine, &[("disk0", &overlay)]).unwrap();
    assert!(info(&image) && !info(&overlay));
    check(&image);
    // Nobody else may write to it.
    let write = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write 0 512"])
        .arg(&image)
        .output();
    assert!(!write.unwrap().status.success());
    load.machine.resume().unwrap();
    let config = load.machine.configuration().unwrap();
    load.finish();
    check(&overlay);
    check_by_guest(&folder, &config);
}

// --- Growth ---------------------------------------------------------------------------------------

#[test]
fn an_image_grows_under_load() {
    require_kvm!();
    for (format, kind) in [
        ("raw", ""),
        ("qcow2", ",format=qcow2"),
        ("raw", ",cache=none"),
        ("qcow2", ",format=qcow2,cache=none"),
    ] {
        let folder = folder();
        let image = written(&folder, "a.img", format);
        let load = load(&folder, &image, kind, 2);
        thread::sleep(Duration::from_millis(300));
        // A first level table of a qcow2 image has to move for so many.
        for size in [2 * DISK_SIZE, 3 * DISK_SIZE, 1 << 40] {
            let answer = device(&load.machine, "disk0", DeviceCommand::Grow { size });
            assert_eq!(answer.unwrap(), DeviceAnswer::Size(size), "{kind}");
        }
        for (size, reason) in [
            (DISK_SIZE, "cannot become smaller while a machine uses it"),
            ((1 << 40) + 100, "multiple of 512 bytes"),
        ] {
            let error = refused(&load.machine, DeviceCommand::Grow { size });
            assert!(error.contains(reason), "{error}");
        }
        let config = load.machine.configuration().unwrap();
        load.finish();
        let info = qemu_img(&["info", "--output=json", "-f", format], &[&image]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], 1_u64 << 40);
        if format == "qcow2" {
            check(&image);
        }
        let disks = config.disks.clone();
        let words = format!("{CHECK} span={DISK_SIZE}");
        Load::start(&folder, &words, |config| config.disks = disks).finish();
    }
}

// --- Jobs -----------------------------------------------------------------------------------------

#[test]
fn a_guest_goes_on_with_a_copy_of_its_disk() {
    require_kvm!();
    for (format, kind, target) in [
        ("raw", "", ImageFormat::Qcow2),
        ("qcow2", ",format=qcow2", ImageFormat::Raw),
        ("raw", ",cache=none", ImageFormat::Raw),
        ("raw", ",cache=none", ImageFormat::Qcow2),
        ("qcow2", ",format=qcow2,engine=sync", ImageFormat::Qcow2),
    ] {
        let folder = folder();
        let image = written(&folder, "a.img", format);
        let load = load(&folder, &image, kind, 4);
        let machine = load.machine.clone();
        let events = machine.subscribe().unwrap();
        thread::sleep(Duration::from_millis(500));
        let path = folder.path().join("copy");
        start_job(
            &machine,
            DiskJob::Copy {
                path: path.clone(),
                format: target,
            },
        );
        let status = next_of_job(&events);
        assert_eq!(status.state, JobState::Ready, "{kind}");
        assert_eq!((status.done, status.total), (DISK_SIZE, DISK_SIZE));
        thread::sleep(Duration::from_millis(300));
        machine.pause().unwrap();
        let answer = device(&machine, "disk0", DeviceCommand::FinishJob).unwrap();
        assert!(matches!(answer, DeviceAnswer::Image(image) if image.path == path));
        assert_eq!(next_of_job(&events).state, JobState::Finished);
        let is_equal = ["compare", "-q", "-U", "-f", format, "-F", target.name()];
        qemu_img(&is_equal, &[&image, &path]);
        machine.resume().unwrap();
        let content = fs::read(&image).unwrap();
        let config = machine.configuration().unwrap();
        assert_eq!(config.disks[0].path, path);
        load.finish();
        drop(machine);
        assert!(fs::read(&image).unwrap() == content);
        if target == ImageFormat::Qcow2 {
            check(&path);
        }
        check_by_guest(&folder, &config);
    }
}

#[test]
fn an_overlay_is_committed_into_its_backing_file() {
    require_kvm!();
    for (format, kind) in [
        ("raw", ""),
        ("qcow2", ",format=qcow2"),
        ("raw", ",cache=none"),
        ("qcow2", ",format=qcow2,cache=none"),
    ] {
        let folder = folder();
        let image = written(&folder, "a.img", format);
        let load = load(&folder, &image, kind, 4);
        let machine = load.machine.clone();
        let events = machine.subscribe().unwrap();
        thread::sleep(Duration::from_millis(300));
        let overlay = folder.path().join("overlay.qcow2");
        for round in 0..2 {
            snapshot(&machine, &[("disk0", &overlay)]).unwrap();
            thread::sleep(Duration::from_millis(300));
            start_job(&machine, DiskJob::Commit);
            assert_eq!(next_of_job(&events).state, JobState::Ready);
            machine.pause().unwrap();
            if round == 0 {
                device(&machine, "disk0", DeviceCommand::CancelJob).unwrap();
                assert_eq!(next_of_job(&events).state, JobState::Cancelled);
                machine.resume().unwrap();
                start_job(&machine, DiskJob::Commit);
                assert_eq!(next_of_job(&events).state, JobState::Ready);
                machine.pause().unwrap();
            }
            device(&machine, "disk0", DeviceCommand::FinishJob).unwrap();
            assert_eq!(next_of_job(&events).state, JobState::Finished);
            let is_equal = ["compare", "-q", "-U", "-f", "qcow2", "-F", format];
            qemu_img(&is_equal, &[&overlay, &image]);
            fs::remove_file(&overlay).unwrap();
            machine.resume().unwrap();
        }
        let config = machine.configuration().unwrap();
        assert_eq!(config.disks[0].path, image);
        load.finish();
        drop(machine);
        if format == "qcow2" {
            check(&image);
        }
        check_by_guest(&folder, &config);
    }
}

#[test]
fn an_overlay_pulls_what_its_backing_files_hold() {
    require_kvm!();
    let folder = folder();
    let image = written(&folder, "a.img", "raw");
    let load = load(&folder, &image, ",cache=none", 4);
    let machine = load.machine.clone();
    let events = machine.subscribe().unwrap();
    let overlays = ["b", "c"].map(|name| folder.path().join(name));
    for overlay in &overlays {
        thread::sleep(Duration::from_millis(300));
        snapshot(&machine, &[("disk0", overlay)]).unwrap();
    }
    start_job(&machine, DiskJob::Pull);
    assert_eq!(next_of_job(&events).state, JobState::Finished);
    // All of its former backing files are free, and it needs them no more.
    for base in [&overlays[0], &image] {
        let format = if *base == image { "raw" } else { "qcow2" };
        let words = ["-f", format, "-c", "write 0 16M"];
        let written = Command::new("qemu-io")
            .args(words)
            .arg(base)
            .output()
            .unwrap();
        assert!(written.status.success(), "{written:?}");
        fs::remove_file(base).unwrap();
    }
    let config = machine.configuration().unwrap();
    load.finish();
    drop(machine);
    check(&overlays[1]);
    check_by_guest(&folder, &config);
}

#[test]
fn a_job_ends_when_it_is_cancelled_and_with_its_machine() {
    require_kvm!();
    let folder = folder();
    let image = written(&folder, "a.img", "qcow2");
    let path = folder.path().join("copy");
    let copy = || DiskJob::Copy {
        path: path.clone(),
        format: ImageFormat::Raw,
    };
    let load = load(&folder, &image, ",format=qcow2", 3);
    let machine = load.machine.clone();
    let events = machine.subscribe().unwrap();
    assert_eq!(job(&machine), None);
    for command in [DeviceCommand::FinishJob, DeviceCommand::CancelJob] {
        assert!(refused(&machine, command).contains("no job is at work"));
    }
    start_job(&machine, copy());
    let second = refused(&machine, DeviceCommand::StartJob(DiskJob::Commit));
    assert!(second.contains("finish or cancel it first"), "{second}");
    for command in [
        DeviceCommand::Grow { size: 1 << 40 },
        DeviceCommand::UpdateSize,
        DeviceCommand::ReplaceImage {
            path: create(&folder, "other", "qcow2"),
            format: None,
        },
    ] {
        let error = refused(&machine, command);
        assert!(error.contains("a job is at work"), "{error}");
    }
    let overlay = folder.path().join("overlay");
    let error = snapshot(&machine, &[("disk0", &overlay)]).unwrap_err();
    assert!(error.to_string().contains("a job is at work"), "{error}");
    assert!(!overlay.exists());
    let start = Instant::now();
    device(&machine, "disk0", DeviceCommand::CancelJob).unwrap();
    let mut status = next_of_job(&events);
    if status.state == JobState::Ready {
        status = next_of_job(&events);
    }
    assert_eq!(status.state, JobState::Cancelled);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(job(&machine), Some(status));
    assert!(!path.exists());

    // A target that cannot be written fails the job, and not the guest.
    let begun = device(
        &machine,
        "disk0",
        DeviceCommand::StartJob(DiskJob::Copy {
            path: "/dev/full/copy".into(),
            format: ImageFormat::Raw,
        }),
    );
    assert!(begun.is_err());
    assert!(refused(&machine, DeviceCommand::StartJob(DiskJob::Pull)).contains("backing"));

    start_job(&machine, copy());
    machine.stop();
    machine.wait().unwrap();
    drop(load);
    drop(machine);
    check(&image);
    assert!(!path.exists());
}

#[test]
fn pauses_do_not_disturb_snapshots_and_jobs() {
    require_kvm!();
    let folder = folder();
    let image = written(&folder, "a.img", "raw");
    let load = load(&folder, &image, "", 5);
    let machine = load.machine.clone();
    let events = machine.subscribe().unwrap();
    let overlay = folder.path().join("overlay.qcow2");
    let end = Instant::now() + Duration::from_secs(3);
    let config = thread::scope(|scope| {
        scope.spawn(|| {
            while Instant::now() < end {
                machine.pause().unwrap();
                thread::sleep(Duration::from_millis(3));
                machine.resume().unwrap();
                thread::sleep(Duration::from_millis(3));
            }
        });
        let mut rounds = 0;
        while Instant::now() < end {
            snapshot(&machine, &[("disk0", &overlay)]).unwrap();
            start_job(&machine, DiskJob::Commit);
            assert_eq!(next_of_job(&events).state, JobState::Ready);
            device(&machine, "disk0", DeviceCommand::FinishJob).unwrap();
            assert_eq!(next_of_job(&events).state, JobState::Finished);
            fs::remove_file(&overlay).unwrap();
            rounds += 1;
        }
        assert!(rounds > 3, "{rounds}");
        machine.configuration().unwrap()
    });
    assert_eq!(config.disks[0].path, image);
    load.finish();
    drop(machine);
    check_by_guest(&folder, &config);
}
