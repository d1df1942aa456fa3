//! The files of a monitor that serves the API: configuration, socket, metrics and log.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{ApiMachine, Bantam, bare_metal_boot_source, require_kvm};
use serde_json::{Value, json};

/// Lines of JSON.
fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

#[test]
fn a_configuration_file_starts_a_machine_without_an_api() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("image"), [0; 4096]).unwrap();
    let config = json!({
        "boot-source": bare_metal_boot_source("devices", "expect-devices=2,4 finish=poweroff"),
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
    assert!(
        log.contains("has ended: the guest has powered off"),
        "{log}"
    );
    // One line is written at the end.
    let metrics = lines(&fs::read_to_string(path("metrics")).unwrap());
    assert_eq!(metrics.len(), 1);
}

#[test]
fn a_configuration_file_and_clients_go_together() {
    require_kvm!();
    let config = json!({
        "boot-source": bare_metal_boot_source("hello", "finish=hang"),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    });
    let machine = ApiMachine::with(|bantam, folder| {
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

    // The configuration that a client reads makes the same machine again.
    let machine = ApiMachine::with(|bantam, folder| {
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
    let good = bare_metal_boot_source("hello", "finish=hang");
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
        reason.contains("api.socket' for the API (--api-sock): a file that is not a socket"),
        "{ended}"
    );
    assert_eq!(fs::read_to_string(&socket).unwrap(), "mine");
}

#[test]
fn metrics_are_lines_of_what_has_been_added() {
    require_kvm!();
    let machine = ApiMachine::with(|bantam, _| {
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
    let exits = |line: &Value, group: &str| line[group]["exit_io_out"].as_u64().unwrap();
    // It has printed some lines, with a port write for each character, and then nothing more.
    assert!(exits(&written[0], "vcpu") > 50, "{}", written[0]);
    let each = exits(&written[0], "vcpu_0") + exits(&written[0], "vcpu_1");
    assert_eq!(exits(&written[0], "vcpu"), each);
    assert_eq!(exits(&written[1], "vcpu"), 0, "{}", written[1]);
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
    let machine = ApiMachine::with(|bantam, folder| {
        let pipe = folder.join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        bantam.option("--metrics-path", pipe)
    });
    machine.start_hello();
    // More than a pipe holds.
    let flush = r#"{"action_type": "FlushMetrics"}"#;
    let answers = (0..600).map(|_| machine.api.request("PUT", "/actions", flush).status);
    let refused = answers.filter(|status| *status == 400).count();
    assert!((1..600).contains(&refused), "{refused}");
    assert_eq!(machine.api.get("/")["state"], "Running");
    machine.stop();
}

#[test]
fn the_log_is_as_clients_set_it() {
    let machine = ApiMachine::with(|bantam, _| bantam.option("--id", "web-1"));
    let api = &machine.api;
    let file = machine.path("log");
    api.put("/logger", &json!({"log_path": file, "level": "Debug"}));
    api.get("/version");
    let line = wait_for_line(&file, "GET /version");
    assert!(line.contains(" [web-1:bantam-api] "), "{line}");

    // Successful requests are not logged at other levels.
    api.put(
        "/logger",
        &json!({"level": "Info", "show_level": true, "show_log_origin": true}),
    );
    api.get("/");
    api.refused("GET", "/nothing", "");
    let line = wait_for_line(&file, "GET /nothing");
    assert!(
        line.contains(":WARN:") && line.contains("answers.rs:"),
        "{line}"
    );
    assert!(!fs::read_to_string(&file).unwrap().contains("GET / "));

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

/// Waits until a line of `file` contains `text`, and returns the line.
#[track_caller]
fn wait_for_line(file: &Path, text: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let lines = fs::read_to_string(file).expect("the file is there");
        if let Some(line) = lines.lines().find(|line| line.contains(text)) {
            return line.to_string();
        }
        assert!(Instant::now() < deadline, "no '{text}' in\n{lines}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn log_and_metrics_do_not_go_into_a_file_of_the_machine() {
    require_kvm!();
    let machine = ApiMachine::new();
    let (image, log) = (machine.path("image"), machine.path("log"));
    fs::write(&image, [0; 4096]).unwrap();
    let boot_source = bare_metal_boot_source("hello", "finish=hang");
    let api = &machine.api;
    api.put("/boot-source", &boot_source);
    let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": image});
    api.put("/drives/a", &drive);
    for (path, key) in [("/logger", "log_path"), ("/metrics", "metrics_path")] {
        let reason = api.refused("PUT", path, &json!({key: image}).to_string());
        assert!(reason.contains("it is a disk, the kernel"), "{reason}");
    }
    api.put("/logger", &json!({"log_path": log}));
    api.put("/actions", &json!({"action_type": "InstanceStart"}));

    // Nor does a disk become one of these files, or the kernel.
    for (path, part) in [
        (json!(log), "Cannot use log file"),
        (boot_source["kernel_image_path"].clone(), "the kernel"),
    ] {
        let update = json!({"drive_id": "a", "path_on_host": path});
        let reason = api.refused("PATCH", "/drives/a", &update.to_string());
        assert!(reason.starts_with(part), "{reason}");
    }
    assert_eq!(fs::read(&image).unwrap(), [0; 4096]);
    machine.stop();
}
