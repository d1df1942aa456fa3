//! Snapshots, growth and jobs of drives by the API, and what a monitor leaves behind that is killed meanwhile. Every
//! answer is checked against `docs/openapi.yaml`.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{ApiMachine, Load, check_image, require_kvm, with_file_size_limit};
use serde_json::{Value, json};

const SIZE: usize = 16 << 20;
/// A guest that checks all blocks that one of [`load`] has written.
const CHECK: &str = "test=block mode=read verify seed=7 depth=8 operations=4096 pattern=seq";

/// Makes a raw image with checked data, and starts a guest that writes to it and checks what it reads.
fn load(seconds: u32) -> ApiMachine {
    load_in(ApiMachine::new(), seconds)
}

/// Like [`load`], in a machine that has not been configured.
fn load_in(machine: ApiMachine, seconds: u32) -> ApiMachine {
    let image = machine.image("a.img", SIZE);
    let folder = tempfile::tempdir().expect("there is room");
    let words = "mode=write pattern=seq verify seed=7 operations=4096";
    Load::of_disk(&folder, &image, "", words).finish();
    let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": image,
                       "cache_type": "Writeback"});
    machine.api.put("/drives/a", &drive);
    let words =
        format!("test=block mode=mixed verify seed=7 depth=16 seconds={seconds} finish=poweroff");
    machine.boot("load", &words);
    machine.api.act("InstanceStart");
    machine.running.wait_for_output("load: ready");
    machine
}

fn snapshot(machine: &ApiMachine, name: &str) {
    let drives = json!([{"drive_id": "a", "path_on_host": machine.path(name)}]);
    machine
        .api
        .put("/bantam/snapshot", &json!({"drives": drives}));
}

fn wait_for_state(machine: &ApiMachine, state: &str) -> Value {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let job = machine.api.get("/bantam/drives/a/job");
        if job["state"] == state {
            return job;
        }
        assert!(Instant::now() < deadline, "{job}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn present_drive(machine: &ApiMachine) -> Value {
    machine.api.get("/vm/config")["drives"][0].clone()
}

/// Has a guest check the data on a disk.
#[track_caller]
fn check_by_guest(image: &Path, kind: &str) {
    let folder = tempfile::tempdir().expect("there is room");
    Load::start(&folder, CHECK, |config| {
        let option = format!("{}{kind}", image.display());
        config.disks = vec![option.parse().expect("it is a disk")];
    })
    .finish();
}

#[test]
fn a_drive_has_a_snapshot_grows_and_moves() {
    require_kvm!();
    let machine = load(4);
    snapshot(&machine, "b.qcow2");
    let drive = present_drive(&machine);
    assert_eq!(drive["format"], "Qcow2");
    assert_eq!(drive["backing"], true);
    assert_eq!(drive["path_on_host"], json!(machine.path("b.qcow2")));
    let size = json!({"size_bytes": 2 * SIZE});
    machine.api.put("/bantam/drives/a/size", &size);

    let copy = machine.path("c.img");
    let job = json!({"job_type": "Copy", "path_on_host": copy});
    machine.api.put("/bantam/drives/a/job", &job);
    let job = wait_for_state(&machine, "Ready");
    assert_eq!(job["done_bytes"], 2 * SIZE);
    machine
        .api
        .patch("/bantam/drives/a/job", &json!({"action": "Finish"}));
    wait_for_state(&machine, "Finished");
    let drive = present_drive(&machine);
    assert_eq!(drive["path_on_host"], json!(copy));
    assert!(drive.get("format").is_none());

    snapshot(&machine, "d.qcow2");
    machine
        .api
        .put("/bantam/drives/a/job", &json!({"job_type": "Commit"}));
    wait_for_state(&machine, "Ready");
    machine
        .api
        .patch("/bantam/drives/a/job", &json!({"action": "Cancel"}));
    wait_for_state(&machine, "Cancelled");
    machine
        .api
        .put("/bantam/drives/a/job", &json!({"job_type": "Pull"}));
    wait_for_state(&machine, "Finished");

    let drive = present_drive(&machine);
    let overlay = machine.path("d.qcow2");
    assert_eq!(drive["path_on_host"], json!(overlay));
    // A drive keeps the format of its image, so that no raw image is taken for another, nor the reverse.
    let raw = machine.image("e.img", 2 * SIZE);
    let swap = json!({"drive_id": "a", "path_on_host": raw});
    let refused = machine.refused("PATCH", "/drives/a", &swap);
    assert!(refused.contains("qcow2"), "{refused}");
    assert_eq!(present_drive(&machine), drive);
    let without = json!({"drive_id": "a", "format": "Raw"});
    let refused = machine.refused("PATCH", "/drives/a", &without);
    assert!(refused.contains("path_on_host"), "{refused}");
    machine.running.wait_for_output("PASS\n");
    fs::remove_file(&copy).unwrap();
    check_image(&overlay, false);
    check_by_guest(&overlay, ",format=qcow2");
}

#[test]
fn a_request_that_is_not_possible_is_refused_on_one_line() {
    require_kvm!();
    let machine = ApiMachine::new();
    let job = json!({"job_type": "Pull"});
    machine.add_drive("a", &json!({}));
    let early = machine.refused("PUT", "/bantam/drives/a/job", &job);
    assert!(early.contains("not"), "{early}");
    machine.start_hello();
    let there = machine.image("there", 512);
    for (method, path, body, reason) in [
        ("PUT", "drives/b/job", job.clone(), "b"),
        ("PUT", "drives/a/job", job, "no backing file"),
        ("PUT", "drives/a/job", json!({"job_type": "Move"}), "Move"),
        (
            "PUT",
            "drives/a/job",
            json!({"job_type": "Pull", "path_on_host": "a"}),
            "unknown field",
        ),
        ("PUT", "snapshot", json!({"drives": []}), "at least one"),
        (
            "PATCH",
            "drives/a/job",
            json!({"action": "Finish"}),
            "no job",
        ),
        ("PATCH", "drives/a/job", json!({"action": "Stop"}), "Stop"),
        (
            "PUT",
            "drives/a/size",
            json!({"size_bytes": 512}),
            "cannot become smaller",
        ),
        (
            "PUT",
            "drives/a/size",
            json!({"size_bytes": 10_000}),
            "multiple of 512",
        ),
        (
            "PUT",
            "drives/a/job",
            json!({"job_type": "Copy", "path_on_host": there}),
            "File exists",
        ),
        (
            "PUT",
            "snapshot",
            json!({"drives": [{"drive_id": "a", "path_on_host": there}]}),
            "File exists",
        ),
        (
            "PUT",
            "other",
            json!({}),
            "Invalid request method and/or path",
        ),
    ] {
        let told = machine.refused(method, &format!("/bantam/{path}"), &body);
        assert!(told.contains(reason), "{told}");
        assert!(!told.contains('\n'), "{told}");
    }
    let none = machine.api.refused("GET", "/bantam/drives/a/job", "");
    assert_eq!(none, "The drive has not had a job yet");
    assert_eq!(fs::read(&there).unwrap(), [0; 512]);
    machine.stop();
}

#[test]
fn a_job_that_fails_does_the_guest_no_harm() {
    require_kvm!();
    // There is room for the image, but not for a qcow2 image with the same data.
    let limit = with_file_size_limit(SIZE as u64);
    let machine = load_in(ApiMachine::with(|bantam, _| bantam.launcher(limit)), 3);
    let copy = machine.path("copy");
    for _ in 0..2 {
        let job = json!({"job_type": "Copy", "path_on_host": copy, "format": "Qcow2"});
        start_job(&machine, &job);
        let failed = wait_for_state(&machine, "Failed");
        let reason = failed["reason"].as_str().unwrap();
        assert!(reason.contains("File too large"), "{reason}");
        assert!(!reason.contains('\n'), "{reason}");
        assert!(!copy.exists());
    }
    // The disk is as free as before.
    start_job(&machine, &json!({"job_type": "Copy", "path_on_host": copy}));
    wait_for_state(&machine, "Ready");
    machine
        .api
        .patch("/bantam/drives/a/job", &json!({"action": "Finish"}));
    machine.running.wait_for_output("PASS\n");
    machine.ended_well();
}

/// Kills the monitor some time after `begin`, at several moments, and has `look` examine what is left.
fn kill_after(begin: impl Fn(&ApiMachine), look: impl Fn(&Path)) {
    for ms in [0, 2, 5, 10, 20, 50] {
        let machine = load(20);
        begin(&machine);
        thread::sleep(Duration::from_millis(ms));
        let folder = machine.kill();
        look(folder.path());
    }
}

fn start_job(machine: &ApiMachine, job: &Value) {
    machine.api.put("/bantam/drives/a/job", job);
}

#[test]
fn a_copy_that_is_killed_leaves_the_disk_as_it_is() {
    require_kvm!();
    kill_after(
        |machine| {
            let path = machine.path("copy");
            let copy = json!({"job_type": "Copy", "path_on_host": path, "format": "Qcow2"});
            start_job(machine, &copy);
        },
        |folder| check_by_guest(&folder.join("a.img"), ""),
    );
}

#[test]
fn a_commit_that_is_killed_leaves_an_overlay_that_opens() {
    require_kvm!();
    kill_after(
        |machine| {
            snapshot(machine, "b.qcow2");
            thread::sleep(Duration::from_millis(100));
            start_job(machine, &json!({"job_type": "Commit"}));
        },
        |folder| {
            let overlay = folder.join("b.qcow2");
            check_image(&overlay, true);
            check_by_guest(&overlay, ",format=qcow2");
        },
    );
}

#[test]
fn a_pull_that_is_killed_leaves_an_overlay_that_opens() {
    require_kvm!();
    kill_after(
        |machine| {
            snapshot(machine, "b.qcow2");
            start_job(machine, &json!({"job_type": "Pull"}));
        },
        |folder| {
            let overlay = folder.join("b.qcow2");
            check_image(&overlay, true);
            check_by_guest(&overlay, ",format=qcow2");
        },
    );
}
