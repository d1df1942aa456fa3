//! Snapshots by the API: `PUT /snapshot/create` and `PUT /snapshot/load`. Every answer is checked against
//! `docs/openapi.yaml`.

#![expect(clippy::unwrap_used, reason = "every step of a test has to succeed")]

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{ApiMachine, HostTap, require_kvm, require_taps};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use serde_json::{Value, json};
use tempfile::TempDir;

const AFTER_START: &str = "The requested operation is not supported after starting the microVM";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM";

/// How long a guest may take to count on.
const PATIENCE: Duration = Duration::from_secs(10);
const MIB: u64 = 16;
const PAGE_SIZE: u64 = 4096;

/// A folder with the files of snapshots.
struct Snapshots(TempDir);

impl Snapshots {
    fn new() -> Snapshots {
        Snapshots(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn state(&self, name: &str) -> String {
        self.path(&format!("{name}.state"))
    }

    fn memory(&self, name: &str) -> String {
        self.path(&format!("{name}.memory"))
    }

    fn create(&self, name: &str, kind: &str) -> Value {
        json!({"snapshot_type": kind, "snapshot_path": self.state(name), "mem_file_path": self.memory(name)})
    }

    fn load(&self, name: &str) -> Value {
        let backend = json!({"backend_type": "File", "backend_path": self.memory(name)});
        json!({"snapshot_path": self.state(name), "mem_backend": backend})
    }

    /// Takes a snapshot of a paused machine.
    #[track_caller]
    fn take(&self, machine: &ApiMachine, name: &str, kind: &str) {
        machine
            .api
            .put("/snapshot/create", &self.create(name, kind));
    }

    /// Returns a machine that goes on from a snapshot, with these other members of the request.
    #[track_caller]
    fn restored(&self, name: &str, members: &Value) -> ApiMachine {
        let machine = ApiMachine::new();
        machine
            .api
            .put("/snapshot/load", &with(self.load(name), members));
        machine
    }

    /// Returns the content of guest memory.
    fn content(&self, name: &str) -> Vec<u8> {
        let mut bytes = fs::read(self.memory(name)).unwrap();
        bytes.truncate((MIB << 20) as usize);
        bytes
    }
}

fn with(mut body: Value, members: &Value) -> Value {
    for (name, value) in members.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    body
}

fn go_to(machine: &ApiMachine, state: &str) {
    machine.api.patch("/vm", &json!({ "state": state }));
}

/// Starts a guest that counts in memory, and returns where.
fn counting(machine: &ApiMachine, config: &Value) -> u64 {
    let config = with(json!({"vcpu_count": 1, "mem_size_mib": MIB}), config);
    machine.api.put("/machine-config", &config);
    machine.boot("count", "timer=deadline finish=poweroff");
    machine.api.act("InstanceStart");
    let mut text = machine.running.wait_for_output("counting at 0x");
    while !text.ends_with('\n') {
        thread::sleep(Duration::from_millis(1));
        text = machine.running.wait_for_output("counting at 0x");
    }
    let address = text.split("counting at 0x").nth(1).unwrap();
    u64::from_str_radix(address.lines().next().unwrap().trim(), 16).unwrap()
}

/// Returns how far the guest had counted, which had found no error.
fn count(memory: &[u8], address: u64) -> u64 {
    let word = |index: u64| {
        let start = (address + index * 8) as usize;
        u64::from_le_bytes(memory[start..start + 8].try_into().unwrap())
    };
    assert_eq!(word(1), 0, "the guest has found errors");
    word(0)
}

/// Lets a paused machine count on, and takes a snapshot of each kind of it when it is paused again.
fn count_on(
    machine: &ApiMachine,
    snapshots: &Snapshots,
    kinds: &[(&str, &str)],
    address: u64,
    from: u64,
) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        go_to(machine, "Resumed");
        thread::sleep(Duration::from_millis(20));
        go_to(machine, "Paused");
        snapshots.take(machine, "probe", "Full");
        let now = count(&snapshots.content("probe"), address);
        assert!(Instant::now() < deadline, "the guest stands still at {now}");
        if now > from {
            for (name, kind) in kinds {
                snapshots.take(machine, name, kind);
            }
            return now;
        }
    }
}

/// Copies what `differential` has data for over `base`, as Firecracker's snapshot-editor does it.
fn rebase(base: &str, differential: &str) {
    let to = File::options().write(true).open(base).unwrap();
    let from = File::open(differential).unwrap();
    let mut end = 0;
    loop {
        let start = match lseek64(from.as_fd(), end, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return,
            Err(error) => panic!("{error}"),
        };
        end = lseek64(from.as_fd(), start, Whence::SeekHole).unwrap();
        let mut bytes = vec![0; (end - start) as usize];
        from.read_exact_at(&mut bytes, start as u64).unwrap();
        to.write_all_at(&bytes, start as u64).unwrap();
    }
}

#[test]
fn a_machine_goes_on_from_a_snapshot_in_another_process() {
    require_kvm!();
    let snapshots = Snapshots::new();
    let machine = ApiMachine::new();
    machine.add_drive("data", &json!({"cache_type": "Writeback"}));
    machine.add_drive(
        "a_drive_with_a_name_that_no_device_of_the_machine_can_have_because_of_its_length",
        &json!({}),
    );
    machine.api.put("/entropy", &json!({}));
    let address = counting(&machine, &json!({}));
    let refused = machine.refused("PUT", "/snapshot/create", &snapshots.create("a", "Full"));
    assert_eq!(
        refused,
        "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore \
         unavailable while running"
    );
    go_to(&machine, "Paused");
    // A file that is there already is replaced.
    fs::write(snapshots.memory("a"), "before").unwrap();
    snapshots.take(&machine, "a", "Full");
    let first = count(&snapshots.content("a"), address);
    let configuration = machine.api.get("/vm/config");
    // The machine goes on, and its snapshot stays as it is.
    count_on(&machine, &snapshots, &[], address, first);
    assert_eq!(count(&snapshots.content("a"), address), first);
    let folder = machine.kill();

    for resume in [false, true] {
        let machine = snapshots.restored("a", &json!({"resume_vm": resume}));
        let api = &machine.api;
        let state = if resume { "Running" } else { "Paused" };
        assert_eq!(api.get("/")["state"], state);
        assert_eq!(api.get("/vm/config"), configuration);
        assert_eq!(api.get("/machine-config"), configuration["machine-config"]);
        let bucket = json!({"size": 1_000_000, "refill_time": 100});
        for drive in configuration["drives"].as_array().unwrap() {
            let id = drive["drive_id"].as_str().unwrap();
            let limits = json!({"drive_id": id, "rate_limiter": {"bandwidth": bucket}});
            api.patch(&format!("/drives/{id}"), &limits);
        }
        let other = machine.image("other", 8192);
        api.patch(
            "/drives/data",
            &json!({"drive_id": "data", "path_on_host": other}),
        );
        assert_eq!(
            api.get("/vm/config")["drives"][0]["path_on_host"],
            json!(other)
        );
        for (method, path, body) in [
            ("PUT", "/snapshot/load", snapshots.load("a")),
            (
                "PUT",
                "/machine-config",
                json!({"vcpu_count": 1, "mem_size_mib": MIB}),
            ),
            ("PUT", "/actions", json!({"action_type": "InstanceStart"})),
        ] {
            assert_eq!(machine.refused(method, path, &body), AFTER_START);
        }
        go_to(&machine, "Paused");
        count_on(&machine, &snapshots, &[], address, first);
        api.put("/actions", &json!({"action_type": "FlushMetrics"}));
        machine.stop();
    }
    drop(folder);
}

#[test]
fn the_files_of_a_snapshot_are_refused_with_a_reason() {
    require_kvm!();
    let snapshots = Snapshots::new();
    let machine = ApiMachine::new();
    for kind in ["Full", "Diff"] {
        let create = snapshots.create("a", kind);
        assert_eq!(
            machine.refused("PUT", "/snapshot/create", &create),
            BEFORE_START
        );
    }
    machine.add_drive("data", &json!({}));
    let address = counting(&machine, &json!({}));
    go_to(&machine, "Paused");
    let drive = machine.path("data");
    for (members, reason) in [
        (json!({"mem_file_path": drive}), "it is a disk"),
        (json!({"snapshot_path": drive}), "it is a disk"),
        (
            json!({"snapshot_path": snapshots.memory("a")}),
            "snapshot_path is the same file",
        ),
        (
            json!({"mem_file_path": snapshots.path("no/memory")}),
            "Create snapshot error: cannot write '",
        ),
    ] {
        let body = with(snapshots.create("a", "Full"), &members);
        let refused = machine.refused("PUT", "/snapshot/create", &body);
        assert!(refused.contains(reason), "{refused}");
    }
    assert_eq!(fs::read_dir(snapshots.0.path()).unwrap().count(), 0);
    snapshots.take(&machine, "a", "Full");
    snapshots.take(&machine, "b", "Full");
    count_on(&machine, &snapshots, &[], address, 0);
    machine.stop();

    let machine = ApiMachine::new();
    let refused = |body: Value| machine.refused("PUT", "/snapshot/load", &body);
    let prefix = "Load snapshot error: Failed to restore from snapshot: ";
    let unknown = "Failed to get snapshot state from file: Unknown ";
    for (body, reason) in [
        (snapshots.load("c"), "No such file or directory".to_owned()),
        (
            with(
                snapshots.load("a"),
                &json!({"snapshot_path": snapshots.memory("a")}),
            ),
            "is not the state file of a snapshot".to_owned(),
        ),
        (
            with(
                snapshots.load("a"),
                &json!({"mem_backend": {"backend_type": "File", "backend_path": snapshots.memory("b")}}),
            ),
            "it is that of another snapshot".to_owned(),
        ),
        (
            with(
                snapshots.load("a"),
                &json!({"network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap0"}]}),
            ),
            format!("{unknown}Network Device: the snapshot has no network interface 'eth0'"),
        ),
        (
            with(
                snapshots.load("a"),
                &json!({"vsock_override": {"uds_path": "v.sock"}}),
            ),
            format!("{unknown}Vsock Device: the snapshot has no vsock"),
        ),
    ] {
        let refused = refused(body);
        assert!(
            refused.starts_with(prefix) && refused.contains(&reason),
            "{refused}"
        );
    }
    // Its drive is gone with its folder.
    let gone = refused(snapshots.load("a"));
    assert!(gone.starts_with(prefix) && gone.contains("data"), "{gone}");
    // What was refused has left nothing behind.
    assert_eq!(machine.api.get("/")["state"], "Not started");
    machine.start_hello();
    machine.stop();
}

#[test]
fn a_snapshot_is_loaded_before_anything_that_it_has_is_configured() {
    require_kvm!();
    let snapshots = Snapshots::new();
    let machine = ApiMachine::new();
    let address = counting(&machine, &json!({}));
    go_to(&machine, "Paused");
    snapshots.take(&machine, "a", "Full");
    machine.kill();

    for (path, body) in [
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": MIB}),
        ),
        ("/entropy", json!({})),
        (
            "/balloon",
            json!({"amount_mib": 1, "deflate_on_oom": false}),
        ),
        ("/vsock", json!({"guest_cid": 3, "uds_path": "v.sock"})),
    ] {
        let machine = ApiMachine::new();
        machine.api.put(path, &body);
        assert_eq!(
            machine.refused("PUT", "/snapshot/load", &snapshots.load("a")),
            "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
             boot-specific resources."
        );
        machine.stop();
    }

    let machine = ApiMachine::new();
    let api = &machine.api;
    let (metrics, serial) = (machine.path("metrics"), machine.path("serial"));
    api.put("/logger", &json!({"level": "Info"}));
    api.put("/metrics", &json!({"metrics_path": metrics}));
    api.put("/serial", &json!({"serial_out_path": serial}));
    api.put("/mmds", &json!({"name": "clone"}));
    // Both names of fields that clients are to do without.
    let load = json!({"snapshot_path": snapshots.state("a"), "mem_file_path": snapshots.memory("a"),
                      "enable_diff_snapshots": true, "clock_realtime": true, "huge_pages": "Transparent"});
    api.put("/snapshot/load", &load);
    let configuration = api.get("/vm/config");
    assert_eq!(configuration["metrics"]["metrics_path"], json!(metrics));
    assert_eq!(configuration["logger"]["level"], "Info");
    assert_eq!(configuration["serial"]["serial_out_path"], json!(serial));
    assert_eq!(configuration["machine-config"]["track_dirty_pages"], true);
    assert_eq!(configuration["machine-config"]["huge_pages"], "Transparent");
    assert_eq!(api.get("/mmds"), json!({"name": "clone"}));
    count_on(&machine, &snapshots, &[("d", "Diff")], address, 0);
    api.act("FlushMetrics");
    let line = |text: &str| serde_json::from_str::<Value>(text.lines().last().unwrap()).unwrap();
    let written = line(&fs::read_to_string(&metrics).unwrap());
    assert_eq!(written["deprecated_api"]["deprecated_http_api_calls"], 1);
    let latencies = &written["latencies_us"];
    for name in [
        "full_create_snapshot",
        "diff_create_snapshot",
        "load_snapshot",
        "pause_vm",
        "resume_vm",
    ] {
        let [of_request, of_machine] =
            [name.to_owned(), format!("vmm_{name}")].map(|name| latencies[name].as_u64().unwrap());
        assert!((1..=of_request).contains(&of_machine), "{latencies}");
    }
    // They are those of the last request, not sums since the last line.
    api.act("FlushMetrics");
    let again = line(&fs::read_to_string(&metrics).unwrap());
    assert_eq!(again["latencies_us"], *latencies);
    machine.stop();
}

/// Takes differential snapshots, merges them as Firecracker's clients do, and compares the result with a full snapshot of
/// the same moment.
fn check_differential(config: &Value, load: &Value) {
    let snapshots = Snapshots::new();
    let machine = ApiMachine::new();
    let address = counting(&machine, config);
    go_to(&machine, "Paused");
    snapshots.take(&machine, "base", "Full");
    let first = count(&snapshots.content("base"), address);
    let round = |machine: &ApiMachine, from: u64| {
        // Without a full snapshot in between, which would be the last one.
        let deadline = Instant::now() + PATIENCE;
        loop {
            go_to(machine, "Resumed");
            thread::sleep(Duration::from_millis(20));
            go_to(machine, "Paused");
            snapshots.take(machine, "diff", "Diff");
            rebase(&snapshots.memory("base"), &snapshots.memory("diff"));
            fs::copy(snapshots.state("diff"), snapshots.state("base")).unwrap();
            fs::remove_file(snapshots.memory("diff")).unwrap();
            let now = count(&snapshots.content("base"), address);
            assert!(Instant::now() < deadline, "the guest stands still at {now}");
            if now > from {
                break now;
            }
        }
    };
    let mut now = first;
    for _ in 0..3 {
        now = round(&machine, now);
    }
    // Into the memory file of the last snapshot, where it is.
    go_to(&machine, "Resumed");
    thread::sleep(Duration::from_millis(20));
    go_to(&machine, "Paused");
    snapshots.take(&machine, "base", "Diff");
    snapshots.take(&machine, "full", "Full");
    assert!(snapshots.content("base") == snapshots.content("full"));
    machine.stop();

    for _ in 0..2 {
        let machine = snapshots.restored("base", load);
        go_to(&machine, "Paused");
        now = round(&machine, now);
        let now = round(&machine, now);
        snapshots.take(&machine, "full", "Full");
        assert!(snapshots.content("base") == snapshots.content("full"));
        machine.kill();
        let machine = snapshots.restored("base", &json!({}));
        count_on(&machine, &snapshots, &[], address, now);
        machine.kill();
    }
}

#[test]
fn differential_snapshots_are_merged_by_their_data_with_a_log() {
    require_kvm!();
    let log = json!({"track_dirty_pages": true});
    check_differential(&log, &log);
}

#[test]
fn differential_snapshots_are_merged_by_their_data_without_a_log() {
    require_kvm!();
    check_differential(&json!({}), &json!({}));
}

#[test]
fn a_differential_snapshot_is_refused_until_its_memory_is_complete() {
    require_kvm!();
    let snapshots = Snapshots::new();
    let machine = ApiMachine::new();
    let address = counting(&machine, &json!({"track_dirty_pages": true}));
    go_to(&machine, "Paused");
    snapshots.take(&machine, "base", "Full");
    go_to(&machine, "Resumed");
    thread::sleep(Duration::from_millis(20));
    go_to(&machine, "Paused");
    snapshots.take(&machine, "diff", "Diff");
    let changed = data_size(&snapshots.memory("diff"));
    assert!(changed < 200 * PAGE_SIZE, "{changed}");
    // More changes go into a file that is not complete.
    go_to(&machine, "Resumed");
    thread::sleep(Duration::from_millis(20));
    go_to(&machine, "Paused");
    snapshots.take(&machine, "diff", "Diff");
    let refused = |load: Value| {
        let machine = ApiMachine::new();
        let reason = machine.refused("PUT", "/snapshot/load", &load);
        assert!(
            reason.contains("has only what changed since another"),
            "{reason}"
        );
        machine.stop();
    };
    refused(snapshots.load("diff"));
    // Without its holes it is not complete either.
    let bytes = fs::read(snapshots.memory("diff")).unwrap();
    fs::write(snapshots.memory("dense"), bytes).unwrap();
    let dense = json!({"backend_type": "File", "backend_path": snapshots.memory("dense")});
    refused(with(
        snapshots.load("diff"),
        &json!({ "mem_backend": dense }),
    ));
    rebase(&snapshots.memory("base"), &snapshots.memory("diff"));
    fs::copy(snapshots.state("diff"), snapshots.state("base")).unwrap();
    snapshots.take(&machine, "full", "Full");
    assert!(snapshots.content("base") == snapshots.content("full"));
    machine.kill();
    let machine = snapshots.restored("base", &json!({}));
    count_on(&machine, &snapshots, &[], address, 0);
    machine.stop();
}

/// Returns how many bytes the file has that are not holes.
fn data_size(path: &str) -> u64 {
    let file = File::open(path).unwrap();
    let (mut size, mut end) = (0, 0);
    while let Ok(start) = lseek64(file.as_fd(), end, Whence::SeekData) {
        end = lseek64(file.as_fd(), start, Whence::SeekHole).unwrap();
        size += (end - start) as u64;
    }
    size
}

#[test]
fn devices_go_on_and_can_be_changed() {
    require_kvm!();
    let snapshots = Snapshots::new();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let balloon = json!({"amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 1,
                         "free_page_hinting": false, "free_page_reporting": false});
    api.put("/balloon", &balloon);
    let socket = machine.path("v.sock");
    api.put("/vsock", &json!({"guest_cid": 3, "uds_path": socket}));
    machine.boot("balloon", "follow");
    api.act("InstanceStart");
    machine.running.wait_for_output("actual 2048");
    go_to(&machine, "Paused");
    snapshots.take(&machine, "a", "Full");

    // The first machine still has its socket.
    let clone_socket = machine.path("clone.sock");
    let clone = snapshots.restored(
        "a",
        &json!({"vsock_override": {"uds_path": clone_socket}, "resume_vm": true}),
    );
    assert!(clone_socket.exists());
    assert_eq!(
        clone.api.get("/vm/config")["vsock"]["uds_path"],
        json!(clone_socket)
    );
    assert_eq!(clone.api.get("/balloon"), balloon);
    assert_eq!(clone.api.get("/balloon/statistics")["actual_mib"], 8);
    clone.api.patch("/balloon", &json!({"amount_mib": 16}));
    clone.running.wait_for_output("actual 4096");
    clone.api.patch(
        "/balloon/statistics",
        &json!({"stats_polling_interval_s": 2}),
    );
    assert_eq!(clone.api.get("/balloon")["stats_polling_interval_s"], 2);
    clone.stop();
    machine.stop();
}

#[test]
fn relative_paths_are_those_of_the_process_that_loads_a_snapshot() {
    require_kvm!();
    let snapshots = Snapshots::new();
    let started_in = |folder: &Path| {
        fs::write(folder.join("disk"), [0; 8192]).unwrap();
        let launcher = ["env", "-C", folder.to_str().unwrap()].map(str::to_owned);
        ApiMachine::with(|bantam, _| bantam.launcher(launcher))
    };
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let machine = started_in(folders[0].path());
    let drive = json!({"drive_id": "disk", "is_root_device": false, "path_on_host": "disk"});
    machine.api.put("/drives/disk", &drive);
    let address = counting(&machine, &json!({}));
    go_to(&machine, "Paused");
    machine.api.put(
        "/snapshot/create",
        &json!({"snapshot_path": "state", "mem_file_path": "memory", "sync_snapshot_files": false}),
    );
    for (file, copy) in [
        ("state", snapshots.state("a")),
        ("memory", snapshots.memory("a")),
    ] {
        fs::copy(folders[0].path().join(file), copy).unwrap();
    }
    // The first machine goes on with its disk, which is locked.
    let clone = started_in(folders[1].path());
    clone.api.put("/snapshot/load", &snapshots.load("a"));
    assert_eq!(
        clone.api.get("/vm/config")["drives"][0]["path_on_host"],
        "disk"
    );
    count_on(&clone, &snapshots, &[], address, 0);
    clone.stop();
    machine.stop();
}

#[test]
fn a_clone_has_its_own_tap_and_metadata() {
    require_taps!();
    let snapshots = Snapshots::new();
    let taps = [(); 2].map(|()| HostTap::new());
    let machine = ApiMachine::new();
    let api = &machine.api;
    let interface = json!({"iface_id": "eth0", "host_dev_name": taps[0].name});
    api.put("/network-interfaces/eth0", &interface);
    let config = json!({"version": "V2", "network_interfaces": ["eth0"],
                        "ipv4_address": "169.254.170.2", "imds_compat": false});
    api.put("/mmds/config", &config);
    api.put("/mmds", &json!({"secret": "of the first"}));
    machine.start_hello();
    go_to(&machine, "Paused");
    snapshots.take(&machine, "a", "Full");

    let overrides = json!([{"iface_id": "eth0", "host_dev_name": taps[1].name}]);
    let clone = snapshots.restored(
        "a",
        &json!({"network_overrides": overrides, "resume_vm": true}),
    );
    let configuration = clone.api.get("/vm/config");
    let interface = &configuration["network-interfaces"][0];
    assert_eq!(interface["host_dev_name"], json!(taps[1].name));
    assert_eq!(configuration["mmds-config"], config);
    // As in Firecracker, a snapshot does not carry them.
    assert_eq!(clone.api.get("/mmds"), json!({}));
    clone.api.put("/mmds", &json!({"name": "clone"}));
    assert_eq!(clone.api.get("/mmds"), json!({"name": "clone"}));
    let bucket = json!({"size": 1_000_000, "refill_time": 100});
    let limits = json!({"iface_id": "eth0", "rx_rate_limiter": {"bandwidth": bucket}});
    clone.api.patch("/network-interfaces/eth0", &limits);
    clone.stop();
    machine.stop();
}
