//! Machines whose storage stops answering: they can be ended, and their owner gets answers.

use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    ApiMachine, Bantam, STATUS_POWER_CUT, StallingStorage, payload, require_fuse, require_kvm,
};
use bantam_vmm::config::{DiskConfig, DiskLockOption, MachineConfig};
use bantam_vmm::{Console, ExitReason};
use nix::sys::signal::Signal;
use serde_json::json;

/// How long a process may take to end once its user has asked for it, on a busy host.
const END_LIMIT: Duration = Duration::from_secs(3);
/// How long a change may take whose host does not answer, on a busy host.
const ANSWER_LIMIT: Duration = Duration::from_secs(17);
/// How long the guest may take to use its disk.
const USE_TIME: Duration = Duration::from_millis(500);

const LOAD: &str = "test=block depth=8 mode=read seconds=50";

#[test]
fn a_signal_ends_a_machine_whose_disk_does_not_answer() {
    require_fuse!();
    for engine in ["auto", "sync", "io_uring"] {
        let storage = StallingStorage::new();
        let running = Bantam::payload("load")
            .append(LOAD)
            .option("--shutdown-timeout", "0")
            .disk(&storage.path(), &format!(",lock=off,engine={engine}"))
            .start();
        thread::sleep(USE_TIME);
        storage.stall(true);
        thread::sleep(USE_TIME);
        let asked = Instant::now();
        running.signal(Signal::SIGTERM);
        let ended = running.wait();
        assert!(asked.elapsed() < END_LIMIT, "{engine}: {ended}");
        assert_eq!(ended.status.code(), Some(STATUS_POWER_CUT), "{ended}");
        let message = format!(
            "disk '{}' does not answer: ending without it",
            storage.path().display()
        );
        assert!(ended.stderr.contains(&message), "{engine}: {ended}");
    }
}

#[test]
fn a_machine_that_ends_by_itself_says_what_it_waits_for_until_a_signal_ends_the_wait() {
    require_fuse!();
    let storage = StallingStorage::new();
    storage.stall(true);
    let serial = format!("file={}", storage.path().display());
    let running = Bantam::payload("hello")
        .append("finish=poweroff")
        .option("--serial", &serial)
        .start();
    running.wait_for_error("the machine has ended, but serial port has not finished");
    let asked = Instant::now();
    running.signal(Signal::SIGTERM);
    let ended = running.wait();
    assert!(asked.elapsed() < END_LIMIT, "{ended}");
    assert_eq!(ended.status.code(), Some(STATUS_POWER_CUT), "{ended}");
}

#[test]
fn a_signal_ends_a_start_that_the_host_does_not_answer() {
    require_fuse!();
    let storage = StallingStorage::new();
    storage.stall(true);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let running = Bantam::run(storage.path()).start();
        thread::sleep(USE_TIME);
        let asked = Instant::now();
        running.signal(signal);
        let ended = running.wait();
        assert!(asked.elapsed() < END_LIMIT, "{ended}");
        assert_eq!(ended.status.code(), Some(STATUS_POWER_CUT), "{ended}");
    }
    let running = Bantam::new(["api", "--no-api"])
        .option("--config-file", storage.path())
        .start();
    thread::sleep(USE_TIME);
    let asked = Instant::now();
    running.signal(Signal::SIGTERM);
    let ended = running.wait();
    assert!(asked.elapsed() < END_LIMIT, "{ended}");
}

#[test]
fn changes_are_refused_in_time_while_a_disk_does_not_answer_and_work_again_afterwards() {
    require_fuse!();
    let storage = StallingStorage::new();
    for engine in ["Sync", "Async"] {
        let machine = ApiMachine::new();
        let api = &machine.api;
        let path = storage.path();
        api.put(
            "/drives/stuck",
            &json!({"drive_id": "stuck", "is_root_device": false, "path_on_host": path,
                    "io_engine": engine, "is_read_only": true}),
        );
        machine.add_drive("other", &json!({}));
        // It gives the disk up after some seconds, and then does nothing.
        machine.boot("load", &format!("{LOAD} finish=hang"));
        api.act("InstanceStart");
        thread::sleep(USE_TIME);
        storage.stall(true);
        thread::sleep(USE_TIME);

        let timed = |method, target, body: &str| {
            let asked = Instant::now();
            let answer = api.request(method, target, body);
            let time = asked.elapsed();
            assert!(time < ANSWER_LIMIT, "{engine}: {target} {body}: {time:?}");
            answer
        };
        let paused = timed("PATCH", "/vm", r#"{"state": "Paused"}"#);
        assert_eq!(paused.status, 400, "{paused:?}");
        let name = path.display().to_string();
        assert!(format!("{paused:?}").contains(&name), "{paused:?}");
        // It runs.
        let resumed = timed("PATCH", "/vm", r#"{"state": "Resumed"}"#);
        assert_eq!(resumed.status, 204, "{resumed:?}");
        let image = machine.image("new", 8192);
        let swap = json!({"drive_id": "other", "path_on_host": image}).to_string();
        timed("PATCH", "/drives/other", &swap);

        storage.stall(false);
        timed("PATCH", "/vm", r#"{"state": "Paused"}"#);
        let state = api.get("/");
        assert!(format!("{state:?}").contains("Paused"), "{state:?}");
        machine.stop();
    }
}

#[test]
fn a_change_of_the_storage_of_a_file_holds_up_no_other_device() {
    require_fuse!();
    let storage = StallingStorage::new();
    storage.hold_changes(true);
    let machine = ApiMachine::new();
    let drive = json!({"drive_id": "slow", "is_root_device": false, "path_on_host": storage.path(),
                       "io_engine": "Async"});
    machine.api.put("/drives/slow", &drive);
    machine.add_drive("other", &json!({"is_read_only": true}));
    machine.boot("devices", "block-test=write finish=hang");
    machine.api.act("InstanceStart");
    storage.wait_for_change();
    // The event loop of both has to switch.
    let image = machine.image("new", 8192);
    let swap = json!({"drive_id": "other", "path_on_host": image});
    let asked = Instant::now();
    machine.api.patch("/drives/other", &swap);
    assert!(asked.elapsed() < END_LIMIT);
    // The zeroes are written then.
    storage.hold_changes(false);
    machine.running.wait_for_output("PASS\n");
    machine.stop();
}

#[test]
fn a_library_user_is_told_what_does_not_end() {
    require_fuse!();
    let storage = StallingStorage::new();
    let mut config = MachineConfig::new(payload("load"));
    config.append = Some(LOAD.to_owned());
    config.disks = vec![DiskConfig {
        lock: DiskLockOption::Off,
        ..DiskConfig::new(storage.path())
    }];
    let machine = bantam_tests::configured(config, Console::default());
    let a_moment = Duration::from_millis(100);
    assert!(machine.wait_within(a_moment).is_err(), "it is not started");
    machine.start().expect("the host has what it takes");
    thread::sleep(USE_TIME);
    assert_eq!(machine.wait_within(a_moment).unwrap(), None);
    storage.stall(true);
    thread::sleep(USE_TIME);
    machine.stop();
    assert_eq!(machine.wait_within(a_moment).unwrap(), None);
    assert_eq!(
        machine.held_up(),
        [format!("disk '{}'", storage.path().display())]
    );
    storage.stall(false);
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
    assert_eq!(
        machine.wait_within(a_moment).unwrap(),
        Some(ExitReason::Stopped)
    );
}

#[test]
fn a_paused_machine_is_not_waited_for() {
    require_kvm!();
    let machine = ApiMachine::with(|bantam, _| bantam.option("--shutdown-timeout", "30"));
    machine.start_hello();
    machine
        .api
        .request("PATCH", "/vm", r#"{"state": "Paused"}"#);
    let asked = Instant::now();
    machine.running.signal(Signal::SIGTERM);
    let ended = machine.running.wait();
    assert!(asked.elapsed() < END_LIMIT, "{ended}");
    assert!(ended.stderr.contains("the machine is paused"), "{ended}");
}
