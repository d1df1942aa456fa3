//! The API: what each resource takes and refuses, before and after the start of the machine, and what
//! the machine is like that is made of it. Every answer is checked against `docs/openapi.yaml`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{ApiClient, Bantam, Ended, Running, elf_kernel, monitor, payload, require_kvm};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

const AFTER_START: &str = "The requested operation is not supported after starting the microVM";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM";

/// How long a test waits for what should come at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing must change where nothing should.
const STILL_TIME: Duration = Duration::from_millis(200);

/// A monitor that serves the API, and a folder for files of its machine.
struct Machine {
    running: Running,
    api: ApiClient,
    folder: TempDir,
}

impl Machine {
    fn new() -> Machine {
        Machine::with(|bantam, _| bantam)
    }

    /// One whose command line `prepare` has added to, given the folder.
    fn with(prepare: impl FnOnce(Bantam, &Path) -> Bantam) -> Machine {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.socket");
        let running = prepare(Bantam::api(&socket), folder.path()).start();
        Machine {
            running,
            api: ApiClient::new(&socket),
            folder,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts a bare-metal guest with this command line into the boot source.
    fn boot(&self, name: &str, boot_args: &str) {
        let boot_source = boot_source(name, boot_args);
        self.api.put("/boot-source", &boot_source);
    }

    /// Starts `hello`, which then does nothing.
    fn start_hello(&self) {
        self.boot("hello", "finish=hang");
        self.api.act("InstanceStart");
        self.running.wait_for_output("PASS\n");
    }

    /// Adds a drive on an empty image.
    fn add_drive(&self, id: &str, members: Value) {
        let image = self.path(id);
        fs::write(&image, [0; 8192]).unwrap();
        let mut drive = json!({"drive_id": id, "is_root_device": false, "path_on_host": image});
        drive
            .as_object_mut()
            .unwrap()
            .extend(members.as_object().unwrap().clone());
        self.api.put(&format!("/drives/{id}"), &drive);
    }

    /// Waits until the guest has ended the process, and checks that nothing is left.
    #[track_caller]
    fn ended_well(self) -> Ended {
        let ended = self.running.wait();
        ended.succeeded();
        assert!(!self.folder.path().join("api.socket").exists(), "{ended}");
        ended
    }

    /// Ends the process by a signal, which must leave nothing either.
    #[track_caller]
    fn stop(self) -> Ended {
        self.running.signal(Signal::SIGTERM);
        self.ended_well()
    }
}

fn boot_source(name: &str, boot_args: &str) -> Value {
    json!({"kernel_image_path": payload(name), "boot_args": boot_args})
}

/// Lines of JSON.
fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

#[test]
fn an_instance_says_what_it_is_before_anything_is_configured() {
    let machine = Machine::with(|bantam, _| bantam.option("--id", "web-1"));
    assert_eq!(
        machine.api.get("/"),
        json!({
            "app_name": "Bantam",
            "id": "web-1",
            "state": "Not started",
            "vmm_version": "1.17.0",
        })
    );
    let version = machine.api.get("/version");
    assert_eq!(version, json!({"firecracker_version": "1.17.0"}));
    let config = machine.api.get("/machine-config");
    assert_eq!(config["vcpu_count"], 1);
    assert_eq!(config["mem_size_mib"], 128);
    assert_eq!(machine.api.get("/vm/config")["machine-config"], config);
    machine.stop();
}

#[test]
fn a_machine_is_put_together_started_and_ended_by_its_guest() {
    require_kvm!();
    let machine = Machine::new();
    let api = &machine.api;
    let config = json!({"vcpu_count": 2, "mem_size_mib": 64});
    api.put("/machine-config", &config);
    machine.boot("cpus", "expect=2 finish=poweroff");
    api.put("/entropy", &json!({}));
    assert_eq!(api.get("/")["state"], "Not started");
    api.act("InstanceStart");
    let ended = machine.ended_well();
    ended.passed();
    assert!(ended.stderr.contains("has ended: PowerOff"), "{ended}");
}

#[test]
fn memory_and_vcpus_are_as_configured() {
    require_kvm!();
    let machine = Machine::new();
    let config = json!({"vcpu_count": 1, "mem_size_mib": 17});
    machine.api.put("/machine-config", &config);
    let update = json!({"mem_size_mib": 48});
    machine.api.patch("/machine-config", &update);
    machine.boot("memory", "expect-mib=48 finish=reset");
    machine.api.act("InstanceStart");
    machine.ended_well().passed();
}

#[test]
fn what_is_configured_is_told_again() {
    require_kvm!();
    let machine = Machine::new();
    let api = &machine.api;
    let limiter = json!({
        "bandwidth": {"size": 1000, "one_time_burst": 2000, "refill_time": 100},
        "ops": {"size": 10, "one_time_burst": null, "refill_time": 1000},
    });
    machine.boot("hello", "finish=hang");
    api.put(
        "/machine-config",
        &json!({"vcpu_count": 2, "mem_size_mib": 64, "smt": true, "track_dirty_pages": true,
                "cpu_template": "None", "huge_pages": "None"}),
    );
    machine.add_drive("data", json!({"io_engine": "Async"}));
    machine.add_drive(
        "root",
        json!({"is_root_device": true, "is_read_only": true, "cache_type": "Writeback",
               "partuuid": "0eaa91a0-01"}),
    );
    api.put("/entropy", &json!({"rate_limiter": limiter}));
    api.put(
        "/serial",
        &json!({"serial_out_path": machine.path("serial")}),
    );
    api.put(
        "/cpu-config",
        &json!({"cpuid_modifiers": [], "msr_modifiers": []}),
    );
    let check = || {
        let config = api.get("/vm/config");
        assert_eq!(config["boot-source"]["boot_args"], "finish=hang");
        assert_eq!(config["machine-config"]["smt"], true);
        let ids: Vec<&Value> = config["drives"]
            .as_array()
            .unwrap()
            .iter()
            .map(|drive| &drive["drive_id"])
            .collect();
        assert_eq!(ids, ["data", "root"]);
        assert_eq!(config["drives"][0]["cache_type"], "Unsafe");
        assert_eq!(config["drives"][0]["io_engine"], "Async");
        assert_eq!(config["drives"][1]["partuuid"], "0eaa91a0-01");
        assert_eq!(config["entropy"]["rate_limiter"], limiter);
    };
    check();
    // Of the same name, in the same place.
    machine.add_drive(
        "data",
        json!({"io_engine": "Async", "cache_type": "Writeback"}),
    );
    let drives = &api.get("/vm/config")["drives"];
    assert_eq!(drives[0]["cache_type"], "Writeback");
    assert_eq!(drives.as_array().unwrap().len(), 2);
    machine.add_drive("data", json!({"io_engine": "Async"}));
    api.act("InstanceStart");
    check();
    let serial = machine.path("serial");
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string(&serial).unwrap().contains("PASS\n") {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(machine.stop().text(), "");
}

#[test]
fn resources_are_put_before_the_start_only_and_changed_after_it_only() {
    require_kvm!();
    let machine = Machine::new();
    let api = &machine.api;
    let image = machine.path("image");
    fs::write(&image, [0; 4096]).unwrap();
    let only_after = [
        ("PATCH", "/vm", json!({"state": "Paused"})),
        ("PATCH", "/vm", json!({"state": "Resumed"})),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"})),
        ("PUT", "/actions", json!({"action_type": "FlushMetrics"})),
    ];
    for (method, path, body) in &only_after {
        let reason = api.refused(method, path, &body.to_string());
        assert_eq!(reason, BEFORE_START, "{method} {path} {body}");
    }
    let reason = api.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert!(reason.contains("PUT /boot-source first"), "{reason}");
    // That start has changed nothing.
    machine.start_hello();
    let before = api.get("/vm/config");
    for (method, path, body) in [
        ("PUT", "/actions", json!({"action_type": "InstanceStart"})),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 256}),
        ),
        ("PATCH", "/machine-config", json!({"mem_size_mib": 256})),
        ("PUT", "/boot-source", boot_source("hello", "")),
        (
            "PUT",
            "/drives/a",
            json!({"drive_id": "a", "is_root_device": false, "path_on_host": image}),
        ),
        (
            "PUT",
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "tap0"}),
        ),
        ("PUT", "/entropy", json!({})),
        ("PUT", "/serial", json!({})),
        ("PUT", "/logger", json!({"level": "Off"})),
        (
            "PUT",
            "/metrics",
            json!({"metrics_path": machine.path("metrics")}),
        ),
        ("PUT", "/cpu-config", json!({})),
    ] {
        let reason = api.refused(method, path, &body.to_string());
        assert_eq!(reason, AFTER_START, "{method} {path} {body}");
    }
    assert_eq!(api.get("/vm/config"), before);
    assert!(!machine.path("metrics").exists());
    for (method, path, body) in &only_after {
        let answer = api.request(method, path, &body.to_string());
        assert_eq!(answer.status, 204, "{method} {path} {body}: {answer:?}");
    }
    machine.stop();
}

#[test]
fn a_start_that_fails_can_be_tried_again() {
    require_kvm!();
    let machine = Machine::new();
    let api = &machine.api;
    let kernel = machine.path("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    api.put("/boot-source", &json!({"kernel_image_path": kernel}));
    let reason = api.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert!(reason.contains(&kernel.display().to_string()), "{reason}");
    assert_eq!(api.get("/")["state"], "Not started");
    machine.start_hello();
    assert_eq!(api.get("/")["state"], "Running");
    machine.stop().passed();
}

#[test]
fn every_spelling_of_a_choice_is_known_and_no_other() {
    let machine = Machine::new();
    let api = &machine.api;
    let image = machine.path("image");
    fs::write(&image, [0; 4096]).unwrap();
    let drive = |member: &str, value: &str| json!({"drive_id": "a", "is_root_device": false, "path_on_host": image, member: value});
    let machine_config =
        |member: &str, value: &str| json!({"vcpu_count": 1, "mem_size_mib": 128, member: value});
    let templates = ["None", "C3", "T2", "T2S", "T2CL", "T2A", "V1N1"];
    for (path, known, body) in [
        ("/drives/a", &["Unsafe", "Writeback"][..], &|value: &str| {
            drive("cache_type", value) as Value
        }),
        ("/drives/a", &["Sync", "Async"], &|value: &str| {
            drive("io_engine", value)
        }),
        (
            "/machine-config",
            &["None", "Transparent", "2M"],
            &|value: &str| machine_config("huge_pages", value),
        ),
        ("/machine-config", &templates, &|value: &str| {
            machine_config("cpu_template", value)
        }),
        (
            "/logger",
            &["Off", "Error", "Warning", "Warn", "Info", "Debug", "Trace"],
            &|value: &str| json!({"level": value}),
        ),
        (
            "/logger",
            &["off", "ERROR", "warning", "wArN", "info", "debug", "trace"],
            &|value: &str| json!({"level": value}),
        ),
    ] as [(&str, &[&str], &dyn Fn(&str) -> Value); 6]
    {
        for value in known {
            let body = body(value);
            if body["cpu_template"]
                .as_str()
                .is_some_and(|name| name != "None")
            {
                let reason = api.refused("PUT", path, &body.to_string());
                assert!(reason.contains("not supported"), "{reason}");
            } else {
                api.put(path, &body);
            }
        }
        let reason = api.refused("PUT", path, &body("Other").to_string());
        assert!(reason.starts_with("Invalid JSON body: "), "{reason}");
        assert!(reason.contains("at line 1 column "), "{reason}");
        assert!(reason.contains(known[0]) || path == "/logger", "{reason}");
    }
    for (method, path, body) in [
        ("PUT", "/actions", r#"{"action_type": "instancestart"}"#),
        ("PUT", "/actions", r#"{"action_type": "BlockDeviceRescan"}"#),
        ("PATCH", "/vm", r#"{"state": "Running"}"#),
        ("PATCH", "/vm", r#"{"state": "paused"}"#),
        (
            "PUT",
            "/mmds/config",
            r#"{"network_interfaces": [], "version": "v1"}"#,
        ),
    ] {
        let reason = api.refused(method, path, body);
        assert!(reason.contains("unknown variant"), "{reason}");
    }
    machine.stop();
}

#[test]
fn what_is_not_listed_and_what_is_no_json_is_refused_with_field_and_place() {
    let machine = Machine::new();
    let api = &machine.api;
    for (method, path, body) in [
        (
            "PUT",
            "/actions",
            r#"{"action_type": "InstanceStart", "x": 1}"#,
        ),
        ("PATCH", "/vm", r#"{"state": "Paused", "x": 1}"#),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 1, "mem_size_mib": 64, "x": 1}"#,
        ),
        ("PATCH", "/machine-config", r#"{"vcpu_count": 1, "x": 1}"#),
        (
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path": "/k", "x": 1}"#,
        ),
        (
            "PUT",
            "/drives/a",
            r#"{"drive_id": "a", "is_root_device": false, "x": 1}"#,
        ),
        ("PATCH", "/drives/a", r#"{"drive_id": "a", "x": 1}"#),
        (
            "PUT",
            "/network-interfaces/a",
            r#"{"iface_id": "a", "host_dev_name": "t", "x": 1}"#,
        ),
        (
            "PATCH",
            "/network-interfaces/a",
            r#"{"iface_id": "a", "x": 1}"#,
        ),
        (
            "PUT",
            "/balloon",
            r#"{"amount_mib": 1, "deflate_on_oom": true, "x": 1}"#,
        ),
        ("PATCH", "/balloon", r#"{"amount_mib": 1, "x": 1}"#),
        (
            "PATCH",
            "/balloon/statistics",
            r#"{"stats_polling_interval_s": 1, "x": 1}"#,
        ),
        (
            "PUT",
            "/vsock",
            r#"{"guest_cid": 3, "uds_path": "/v", "x": 1}"#,
        ),
        ("PUT", "/entropy", r#"{"x": 1}"#),
        ("PUT", "/serial", r#"{"x": 1}"#),
        ("PUT", "/logger", r#"{"x": 1}"#),
        ("PUT", "/metrics", r#"{"metrics_path": "/m", "x": 1}"#),
        (
            "PUT",
            "/mmds/config",
            r#"{"network_interfaces": [], "x": 1}"#,
        ),
    ] {
        let reason = api.refused(method, path, body);
        assert!(
            reason.starts_with("Invalid JSON body: x: unknown field `x`, expected "),
            "{method} {path}: {reason}"
        );
        assert!(
            reason.contains(" at line 1 column "),
            "{method} {path}: {reason}"
        );
        for (body, complaint) in [
            ("{", "EOF while parsing an object at line 1 column 1"),
            ("{\n}x", ""),
            ("[]", ""),
            ("null", ""),
            ("{\"a\": 1e999}", ""),
            ("\u{feff}{}", "expected value at line 1 column 1"),
        ] {
            let reason = api.refused(method, path, body);
            assert!(
                reason.starts_with("Invalid JSON body: "),
                "{method} {path}: {reason}"
            );
            assert!(
                reason.contains(complaint),
                "{method} {path} {body}: {reason}"
            );
        }
        let reason = api.refused(method, path, "");
        assert_eq!(
            reason,
            format!("Empty {method} request: a JSON body is needed")
        );
    }
    // Members of members, and members that come twice or have the wrong type.
    for (path, body, complaint) in [
        (
            "/entropy",
            r#"{"rate_limiter": {"ops": {"size": -1, "refill_time": 2}}}"#,
            "rate_limiter.ops.size: invalid value: integer `-1`, expected u64 at line 1 column ",
        ),
        (
            "/entropy",
            r#"{"rate_limiter": {"bandwidth": {"size": 1}}}"#,
            "rate_limiter.bandwidth: missing field `refill_time` at line 1 column ",
        ),
        (
            "/machine-config",
            "{\"vcpu_count\": 1,\n \"vcpu_count\": 1}",
            "duplicate field `vcpu_count` at line 2 column ",
        ),
        (
            "/machine-config",
            r#"{"vcpu_count": 256, "mem_size_mib": 64}"#,
            "vcpu_count: invalid value: integer `256`, expected u8 at line 1 column ",
        ),
        (
            "/drives/a",
            r#"{"drive_id": "a", "is_root_device": "no"}"#,
            "is_root_device: invalid type: string \"no\", expected a boolean at line 1 column ",
        ),
    ] {
        let reason = api.refused("PUT", path, body);
        assert!(reason.contains(complaint), "{reason}");
    }
    // Deep enough for a parser that recurses without end.
    let deep = format!("{{\"rate_limiter\": {}", "[".repeat(40_000));
    api.refused("PUT", "/entropy", &deep);
    api.refused("PUT", "/cpu-config", &"[".repeat(50_000));
    machine.stop();
}

#[test]
fn values_out_of_range_are_refused_and_change_nothing() {
    let machine = Machine::new();
    let api = &machine.api;
    let missing = machine.path("missing").display().to_string();
    let before = api.get("/vm/config");
    let (low, high) = (json!(0), json!(33));
    for (path, body, complaint) in [
        (
            "/machine-config",
            json!({"vcpu_count": low, "mem_size_mib": 64}),
            "vcpu_count",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": high, "mem_size_mib": 64}),
            "vcpu_count",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 0}),
            "mem_size_mib",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 15}),
            "mem_size_mib",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": u64::MAX}),
            "mem_size_mib",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 3, "mem_size_mib": 64, "smt": true}),
            "vcpu_count",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 65, "huge_pages": "2M"}),
            "mem_size_mib",
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": missing}),
            missing.as_str(),
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": payload("hello"), "initrd_path": missing}),
            &missing,
        ),
        (
            "/drives/a",
            json!({"drive_id": "a", "is_root_device": false, "path_on_host": missing}),
            &missing,
        ),
        (
            "/drives/a",
            json!({"drive_id": "a", "is_root_device": false}),
            "path_on_host",
        ),
        (
            "/drives/a",
            json!({"drive_id": "a", "is_root_device": false, "socket": missing}),
            "not supported",
        ),
        (
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "a name that is too long"}),
            "host_dev_name",
        ),
        (
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "tap0", "guest_mac": "06:00"}),
            "guest_mac",
        ),
        (
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "tap0", "mtu": 67}),
            "mtu",
        ),
        (
            "/metrics",
            json!({"metrics_path": machine.path("no/folder")}),
            "no/folder",
        ),
        (
            "/logger",
            json!({"log_path": machine.path("no/folder")}),
            "no/folder",
        ),
        (
            "/cpu-config",
            json!({"cpuid_modifiers": [{"leaf": "0x1"}]}),
            "CPU",
        ),
    ] {
        let reason = api.refused("PUT", path, &body.to_string());
        assert!(reason.contains(complaint), "PUT {path} {body}: {reason}");
    }
    assert_eq!(api.get("/vm/config"), before);
    machine.stop();
}

#[test]
fn devices_have_names_which_path_and_body_agree_on() {
    let machine = Machine::new();
    let api = &machine.api;
    let image = machine.path("image");
    fs::write(&image, [0; 4096]).unwrap();
    let drive = |id: &str| {
        json!({"drive_id": id, "is_root_device": false, "path_on_host": image}).to_string()
    };
    let interface = |id: &str| json!({"iface_id": id, "host_dev_name": "tap0"}).to_string();
    for (folder, body) in [
        ("drives", &drive as &dyn Fn(&str) -> String),
        ("network-interfaces", &interface),
    ] {
        for id in [
            "a",
            "B_2",
            "0",
            "a_name_that_is_longer_than_the_serial_number_of_a_disk",
        ] {
            api.put(
                &format!("/{folder}/{id}"),
                &serde_json::from_str(&body(id)).unwrap(),
            );
            let reason = api.refused("PUT", &format!("/{folder}/{id}"), &body("other"));
            let expected =
                format!("The id from the path '{id}' does not match the id from the body 'other'");
            assert_eq!(reason, expected);
            if folder == "network-interfaces" {
                // Two interfaces cannot have the same tap.
                break;
            }
        }
        for id in ["a-b", "a.b", "a%20b", "%2e%2e"] {
            let reason = api.refused("PUT", &format!("/{folder}/{id}"), &body(id));
            assert_eq!(
                reason,
                format!("Invalid id '{id}': only letters, digits and underscores are allowed")
            );
        }
        for path in ["", "/", "/a/b"] {
            let reason = api.refused("PUT", &format!("/{folder}{path}"), &body(""));
            assert!(
                reason.starts_with("Invalid request method and/or path: PUT "),
                "{reason}"
            );
        }
    }
    let second = json!({"iface_id": "b", "host_dev_name": "tap0"}).to_string();
    let reason = api.refused("PUT", "/network-interfaces/b", &second);
    assert!(reason.contains("'a'"), "{reason}");
    machine.stop();
}

#[test]
fn other_methods_and_paths_are_refused() {
    let machine = Machine::new();
    let api = &machine.api;
    for method in ["DELETE", "POST", "OPTIONS", "TRACE", "BREW"] {
        let reason = api.refused(method, "/machine-config", "");
        assert_eq!(
            reason,
            format!("Invalid request method and/or path: {method} /machine-config")
        );
    }
    for (method, path) in [
        ("GET", "/drives/a"),
        ("GET", "/actions"),
        ("GET", "/nothing"),
        ("GET", "/vm/config/more"),
        ("PUT", "/"),
        ("PUT", "/vm/config"),
        ("PATCH", "/boot-source"),
    ] {
        let body = if method == "GET" { "" } else { "{}" };
        let reason = api.refused(method, path, body);
        let expected = format!("Invalid request method and/or path: {method} {path}");
        assert_eq!(reason, expected);
    }
    for (method, path) in [
        ("PUT", "/snapshot/create"),
        ("PUT", "/snapshot/load"),
        ("PUT", "/pmem/a"),
        ("GET", "/hotplug/memory"),
        ("GET", "/balloon/hinting/status"),
    ] {
        let body = if method == "GET" { "" } else { "{}" };
        let reason = api.refused(method, path, body);
        assert!(
            reason.ends_with("not supported by this version of Bantam"),
            "{reason}"
        );
    }
    assert_eq!(
        api.refused("GET", "/", "{}"),
        "GET request cannot have a body"
    );
    machine.stop();
}

#[test]
fn bodies_have_a_largest_size() {
    let machine = Machine::with(|bantam, _| bantam.option("--http-api-max-payload-size", "200"));
    let api = &machine.api;
    let logger = |size: usize| {
        let body = r#"{"level": "Info"}"#.to_owned();
        format!("{body}{}", " ".repeat(size - body.len()))
    };
    assert_eq!(api.request("PUT", "/logger", &logger(200)).status, 204);
    for size in [201, 1 << 20] {
        let answer = api.request("PUT", "/logger", &logger(size));
        assert_eq!(answer.status, 413);
        let reason = answer.body.unwrap()["fault_message"].to_string();
        assert!(reason.contains("200 bytes"), "{reason}");
    }
    machine.stop();
}

#[test]
fn the_guest_finds_drives_in_their_order_with_the_root_device_first() {
    require_kvm!();
    let machine = Machine::new();
    machine.boot("devices", "expect-devices=2,2,2,4 finish=poweroff");
    machine.add_drive("first", json!({}));
    machine.add_drive("second", json!({"is_read_only": true}));
    machine.add_drive("root", json!({"is_root_device": true}));
    machine.api.put("/entropy", &json!({}));
    let other = json!({"drive_id": "other", "is_root_device": true,
                       "path_on_host": machine.path("first")});
    let reason = machine
        .api
        .refused("PUT", "/drives/other", &other.to_string());
    assert!(reason.contains("'root'"), "{reason}");
    machine.api.act("InstanceStart");
    let ended = machine.ended_well();
    ended.passed();
    let text = ended.text();
    let ids: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("block: id "))
        .collect();
    assert_eq!(ids, ["'root'", "'first'", "'second'"], "{ended}");
}

#[test]
fn the_command_line_names_the_root_device() {
    require_kvm!();
    for (members, words) in [
        (json!({"is_root_device": false}), None),
        (json!({"is_root_device": true}), Some("root=/dev/vda rw")),
        (
            json!({"is_root_device": true, "is_read_only": true}),
            Some("root=/dev/vda ro"),
        ),
        (
            json!({"is_root_device": true, "is_read_only": true, "partuuid": "0eaa91a0-01"}),
            Some("root=PARTUUID=0eaa91a0-01 ro"),
        ),
    ] {
        let machine = Machine::new();
        machine.boot("hello", "a=b finish=poweroff");
        machine.add_drive("data", json!({}));
        machine.add_drive("drive", members);
        machine.api.act("InstanceStart");
        let ended = machine.ended_well();
        ended.passed().printed("command line: a=b finish=poweroff");
        match words {
            Some(words) => {
                ended.printed(&format!("finish=poweroff {words}"));
            }
            None => assert!(!ended.text().contains("root="), "{ended}"),
        }
    }
}

#[test]
fn without_boot_args_a_guest_gets_the_usual_ones() {
    require_kvm!();
    let machine = Machine::new();
    let boot_source = json!({"kernel_image_path": payload("hello")});
    machine.api.put("/boot-source", &boot_source);
    machine.api.act("InstanceStart");
    let text = machine.running.wait_for_output("PASS\n");
    for word in [
        "reboot=k",
        "panic=1",
        "nomodule",
        "8250.nr_uarts=0",
        "swiotlb=noforce",
    ] {
        assert!(text.contains(word), "{text}");
    }
    drop(machine);
}

#[test]
fn a_configuration_file_starts_a_machine_without_an_api() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("image"), [0; 4096]).unwrap();
    let config = json!({
        "boot-source": boot_source("devices", "expect-devices=2,4 finish=poweroff"),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "drives": [{"drive_id": "a", "is_root_device": true, "path_on_host": path("image")}],
        "entropy": {},
        "logger": {"log_path": path("log"), "level": "Info"},
        "metrics": {"metrics_path": path("metrics")},
        "balloon": null,
        "network-interfaces": [],
    });
    fs::write(path("config.json"), config.to_string()).unwrap();
    let ended = Bantam::api(&path("api.socket"))
        .argument("--no-api")
        .option("--config-file", path("config.json"))
        .finish();
    ended.passed();
    assert!(!path("api.socket").exists());
    assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
    let log = fs::read_to_string(path("log")).unwrap();
    assert!(log.contains("has ended: PowerOff"), "{log}");
    // One line is written in the end.
    let metrics = lines(&fs::read_to_string(path("metrics")).unwrap());
    assert_eq!(metrics.len(), 1);
}

#[test]
fn a_configuration_file_and_clients_go_together() {
    require_kvm!();
    let config = json!({
        "boot-source": boot_source("hello", "finish=hang"),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    });
    let machine = Machine::with(|bantam, folder| {
        let file = folder.join("config.json");
        fs::write(&file, config.to_string()).unwrap();
        bantam.option("--config-file", file)
    });
    machine.running.wait_for_output("PASS\n");
    assert_eq!(machine.api.get("/")["state"], "Running");
    assert_eq!(machine.api.get("/machine-config")["mem_size_mib"], 64);
    let whole = machine.api.get("/vm/config");
    assert_eq!(whole["boot-source"]["boot_args"], "finish=hang");
    machine.stop();

    // What a client is told makes the same machine again.
    let machine = Machine::with(|bantam, folder| {
        let file = folder.join("config.json");
        fs::write(&file, whole.to_string()).unwrap();
        bantam.option("--config-file", file)
    });
    assert_eq!(machine.api.get("/vm/config"), whole);
    machine.stop();
}

#[test]
fn a_configuration_file_that_cannot_be_used_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let good = boot_source("hello", "finish=hang");
    for (config, complaint) in [
        (
            "{".to_owned(),
            "config.json': Invalid JSON body: EOF while parsing",
        ),
        (
            json!({"boot-source": good, "x": 1}).to_string(),
            "unknown field `x`",
        ),
        (json!({}).to_string(), "without a kernel"),
        (
            json!({"boot-source": {"kernel_image_path": "/missing"}}).to_string(),
            "'/missing'",
        ),
        (
            json!({"boot-source": good,
                   "drives": [{"drive_id": "a-b", "is_root_device": true, "path_on_host": "/"}]})
            .to_string(),
            "'a-b'",
        ),
        (
            json!({"boot-source": good, "machine-config": {"vcpu_count": 64, "mem_size_mib": 64}})
                .to_string(),
            "vcpu_count",
        ),
        (" ".repeat(2 << 20), "larger than 1 MiB"),
    ] {
        fs::write(path("config.json"), config).unwrap();
        let ended = Bantam::api(&path("api.socket"))
            .option("--config-file", path("config.json"))
            .option("--level", "Error")
            .finish();
        let reason = ended.failed_with_one_line();
        assert!(reason.contains(complaint), "{ended}");
        assert!(!path("api.socket").exists(), "{ended}");
    }
    let ended = Bantam::api(&path("api.socket"))
        .argument("--no-api")
        .finish();
    assert!(
        ended.failed_with_one_line().contains("--config-file"),
        "{ended}"
    );
}

#[test]
fn a_socket_that_is_there_already_is_an_error_and_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api.socket");
    fs::write(&socket, "mine").unwrap();
    let ended = Bantam::api(&socket).option("--level", "Error").finish();
    let reason = ended.failed_with_one_line();
    assert!(
        reason.contains("api.socket' for the API: Address already in use"),
        "{ended}"
    );
    assert!(reason.contains("--api-sock"), "{ended}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "mine");
}

#[test]
fn metrics_are_lines_of_what_has_been_added() {
    require_kvm!();
    let machine = Machine::with(|bantam, _| {
        bantam
            .option("--start-time-us", "1")
            .option("--start-time-cpu-us", "2")
    });
    let api = &machine.api;
    let file = machine.path("metrics");
    api.put("/metrics", &json!({"metrics_path": file}));
    let again = json!({"metrics_path": machine.path("other")}).to_string();
    let reason = api.refused("PUT", "/metrics", &again);
    assert!(reason.contains("already"), "{reason}");
    assert_eq!(
        api.get("/vm/config")["metrics"]["metrics_path"],
        json!(file)
    );
    api.put(
        "/machine-config",
        &json!({"vcpu_count": 2, "mem_size_mib": 64}),
    );
    machine.start_hello();
    api.act("FlushMetrics");
    api.act("FlushMetrics");
    let written = lines(&fs::read_to_string(&file).unwrap());
    assert_eq!(written.len(), 2);
    assert!(written[0]["utc_timestamp_ms"].as_u64() <= written[1]["utc_timestamp_ms"].as_u64());
    let exits = |line: &Value| {
        let vcpus = line["vcpus"].as_array().unwrap();
        assert_eq!(vcpus.len(), 2);
        let count = |vcpu: &Value| vcpu["exit_io_out"].as_u64().unwrap();
        vcpus.iter().map(count).sum::<u64>()
    };
    // It has printed some lines, a port write for each character, and then nothing.
    assert!(exits(&written[0]) > 50, "{}", written[0]);
    assert_eq!(exits(&written[1]), 0, "{}", written[1]);
    for line in &written {
        assert!(
            line["api_server"]["process_startup_time_us"]
                .as_u64()
                .unwrap()
                > 0
        );
    }
    machine.stop();
}

#[test]
fn metrics_go_to_a_pipe_that_nobody_reads_without_harm() {
    require_kvm!();
    let machine = Machine::with(|bantam, folder| {
        let pipe = folder.join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        bantam.option("--metrics-path", pipe)
    });
    machine.start_hello();
    // More than a pipe holds.
    for _ in 0..600 {
        machine.api.act("FlushMetrics");
    }
    assert_eq!(machine.api.get("/")["state"], "Running");
    machine.stop();
}

#[test]
fn the_log_is_as_clients_set_it() {
    let machine = Machine::with(|bantam, _| bantam.option("--id", "web-1"));
    let api = &machine.api;
    let file = machine.path("log");
    api.put("/logger", &json!({"log_path": file}));
    api.get("/version");
    let text = fs::read_to_string(&file).unwrap();
    let line = text
        .lines()
        .find(|line| line.contains("GET /version"))
        .unwrap();
    assert!(line.contains(" [web-1:bantam-api] "), "{line}");

    api.put(
        "/logger",
        &json!({"show_level": true, "show_log_origin": true}),
    );
    api.refused("GET", "/nothing", "");
    let text = fs::read_to_string(&file).unwrap();
    let line = text
        .lines()
        .find(|line| line.contains("GET /nothing"))
        .unwrap();
    assert!(
        line.contains(":WARN:") && line.contains("server.rs:"),
        "{line}"
    );

    api.put("/logger", &json!({"level": "Error"}));
    let size = fs::metadata(&file).unwrap().len();
    api.get("/version");
    api.refused("GET", "/nothing", "");
    assert_eq!(fs::metadata(&file).unwrap().len(), size);

    api.put("/logger", &json!({"level": "Info", "module": "bantam_vmm"}));
    api.get("/version");
    assert_eq!(fs::metadata(&file).unwrap().len(), size);
    assert_eq!(api.get("/vm/config")["logger"]["module"], "bantam_vmm");
    machine.stop();
}

#[test]
fn a_guest_tells_the_boot_timer() {
    require_kvm!();
    for (timer, logged) in [(true, true), (false, false)] {
        let machine = Machine::with(|bantam, _| {
            let options = timer.then_some("--boot-timer");
            options
                .iter()
                .fold(bantam, |bantam, option| bantam.argument(option))
        });
        machine.boot("hello", "boot-timer finish=poweroff");
        machine.api.act("InstanceStart");
        let ended = machine.ended_well();
        ended.passed();
        let line = ended
            .stderr
            .lines()
            .find(|line| line.contains("Guest-boot-time = "));
        assert_eq!(line.is_some(), logged, "{ended}");
    }
}

#[test]
fn a_paused_guest_stands_still() {
    require_kvm!();
    let machine = Machine::new();
    let api = &machine.api;
    let output = machine.path("serial");
    api.put("/serial", &json!({"serial_out_path": output}));
    api.put(
        "/machine-config",
        &json!({"vcpu_count": 2, "mem_size_mib": 64}),
    );
    machine.boot("serial", "print-kib=1000000");
    api.act("InstanceStart");
    let size = || fs::metadata(&output).unwrap().len();
    let wait_for_more = |than: u64| {
        let deadline = Instant::now() + PATIENCE;
        while size() <= than {
            assert!(Instant::now() < deadline, "it prints no more");
            thread::sleep(Duration::from_millis(1));
        }
    };
    wait_for_more(0);
    for _ in 0..3 {
        api.patch("/vm", &json!({"state": "Paused"}));
        // It may be said twice.
        api.patch("/vm", &json!({"state": "Paused"}));
        assert_eq!(api.get("/")["state"], "Paused");
        // What the guest has printed before is still being written.
        thread::sleep(STILL_TIME);
        let before = size();
        thread::sleep(STILL_TIME);
        assert_eq!(size(), before);
        api.patch("/vm", &json!({"state": "Resumed"}));
        api.patch("/vm", &json!({"state": "Resumed"}));
        assert_eq!(api.get("/")["state"], "Running");
        wait_for_more(before);
    }
    // It ends from a pause as well.
    api.patch("/vm", &json!({"state": "Paused"}));
    machine.stop();
}

#[test]
fn signals_end_the_process_in_every_state() {
    require_kvm!();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        for started in [false, true] {
            let machine = Machine::new();
            if started {
                machine.start_hello();
            }
            machine.running.signal(signal);
            machine.ended_well();
        }
    }
}

#[test]
fn a_guest_that_fails_fails_the_process() {
    require_kvm!();
    let machine = Machine::new();
    machine.boot("hello", "finish=triple-fault");
    machine.api.act("InstanceStart");
    let socket = machine.path("api.socket");
    let ended = machine.running.wait();
    assert!(ended.failed().contains("triple fault"), "{ended}");
    assert!(!socket.exists(), "{ended}");
}

#[test]
fn clients_are_answered_while_a_guest_uses_the_processor_without_end() {
    require_kvm!();
    let machine = Machine::new();
    let kernel = machine.path("kernel");
    // stay: jmp stay
    fs::write(&kernel, elf_kernel(&[0xeb, 0xfe])).unwrap();
    machine
        .api
        .put("/boot-source", &json!({"kernel_image_path": kernel}));
    machine.api.act("InstanceStart");
    for _ in 0..20 {
        assert_eq!(machine.api.get("/")["state"], "Running");
    }
    machine.api.act("SendCtrlAltDel");
    machine.stop();
}

#[test]
fn under_the_name_firecracker_it_takes_the_same_options_without_a_command() {
    let folder = tempfile::tempdir().unwrap();
    let firecracker = folder.path().join("firecracker");
    symlink(monitor(), &firecracker).unwrap();
    let output = Command::new(&firecracker)
        .arg("--version")
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("Firecracker v1.17.0\n"), "{text}");
    let socket = folder.path().join("api.socket");
    let running = Bantam::new(["--api-sock"])
        .argument(&socket)
        .launcher([
            "sh".as_ref(),
            "-c".as_ref(),
            // The program itself is the first argument, in place of which its other name is used.
            "shift; exec \"$0\" \"$@\"".as_ref(),
            firecracker.as_os_str(),
        ])
        .start();
    let api = ApiClient::new(&socket);
    assert_eq!(api.get("/")["id"], "anonymous-instance");
    running.signal(Signal::SIGTERM);
    running.wait().succeeded();
    assert!(!socket.exists());
}
