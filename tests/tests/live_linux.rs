//! A Linux guest works on a disk with four processors and four queues, while the disk grows, gets snapshots, and
//! is committed and copied.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{BusyLinux, configured, device, linux_slot, require_kvm};
use bantam_vmm::config::SerialConfig;
use bantam_vmm::{
    Console, Controller, DeviceAnswer, DeviceCommand, DiskJob, DiskSnapshot, ImageFormat, JobState,
};

const SIZE: usize = 24 << 20;
const SEED: u64 = 5;
/// Steps of each of the guest's threads. They take a minute or two.
const OPERATIONS: u32 = 1000;
/// How long a job may take.
const JOB_LIMIT: Duration = Duration::from_secs(60);

fn command(machine: &Controller, command: DeviceCommand) -> DeviceAnswer {
    device(machine, "disk0", command).unwrap_or_else(|error| panic!("{error}"))
}

/// Does `job`, and has the guest go on with its result.
fn finish_job(machine: &Controller, job: DiskJob) {
    command(machine, DeviceCommand::StartJob(job));
    let deadline = Instant::now() + JOB_LIMIT;
    loop {
        let answer = command(machine, DeviceCommand::Job);
        let DeviceAnswer::Job(Some(status)) = answer else {
            panic!("{answer:?}");
        };
        match status.state {
            JobState::Ready => break,
            // The end of one that has failed says why.
            JobState::Copying | JobState::Ending if Instant::now() < deadline => {}
            // This job finishes by itself.
            JobState::Finished => return,
            other => panic!("{other:?}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
    command(machine, DeviceCommand::FinishJob);
}

#[test]
fn a_disk_with_four_queues_keeps_its_data_through_growth_snapshots_and_jobs() {
    require_kvm!();
    let _slot = linux_slot();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let place = |name: &str| folder.path().join(name);
    let guest = BusyLinux::new(
        folder.path(),
        &["-o", "cluster_size=16k"],
        SIZE,
        SEED,
        OPERATIONS,
    );
    let log = place("log");
    let mut config = guest.config("");
    config.serial = SerialConfig::File(log.clone());
    let machine = configured(config, Console::default());
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    let text = || fs::read_to_string(&log).unwrap_or_default();
    let ended = || text().contains(&format!("bantam: {} ", guest.work()));
    BusyLinux::wait_until_it_works(text);
    let started = Instant::now();
    let mut size = SIZE as u64;
    let mut rounds = 0;
    let mut longest = Duration::ZERO;
    while !ended() {
        assert!(
            started.elapsed() < BusyLinux::LIMIT,
            "the guest does not end"
        );
        size += 1 << 20;
        command(&machine, DeviceCommand::Grow { size });
        let snapshot = DiskSnapshot {
            disk: "disk0".parse().expect("it is a name"),
            path: place(&format!("overlay{rounds}.qcow2")),
        };
        let held_up = machine.snapshot_disks(vec![snapshot]);
        longest = longest.max(held_up.unwrap_or_else(|error| panic!("{error}")));
        thread::sleep(Duration::from_millis(200));
        let job = match rounds % 3 {
            0 => DiskJob::Commit,
            1 => DiskJob::Pull,
            _ => DiskJob::Copy {
                path: place(&format!("copy{rounds}.qcow2")),
                format: ImageFormat::Qcow2,
            },
        };
        finish_job(&machine, job);
        rounds += 1;
        thread::sleep(Duration::from_millis(100));
    }
    println!(
        "{rounds} rounds in {:?}, held up for at most {longest:?}",
        started.elapsed()
    );
    let config = machine.configuration();
    machine.stop();
    machine.wait().expect("the disk is flushed");
    let text = text();
    assert!(
        text.contains(&format!("bantam: {} ok", guest.work())),
        "{text}"
    );
    assert!(rounds >= 6, "only {rounds} rounds");

    let present: PathBuf = config.expect("there is one").disks.swap_remove(0).path;
    drop(machine);
    guest.check_disk(&present);
    let grown = fs::metadata(place("result")).expect("it was made").len();
    assert_eq!(grown, size);
}
