//! The API's balloon, sockets, limits and drives that change while the machine runs. Every answer
//! is checked against `docs/openapi.yaml`.

use std::fs;
use std::os::unix::fs::FileTypeExt;

use bantam_tests::{ApiMachine, HostTap, require_kvm, require_taps};
use serde_json::{Value, json};

const AFTER_START: &str = "The requested operation is not supported after starting the microVM";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM";

fn limiter(size: u64) -> Value {
    let bucket = json!({"size": size, "one_time_burst": 2 * size, "refill_time": 100});
    json!({"bandwidth": bucket, "ops": bucket})
}

// --- Balloon --------------------------------------------------------------------------------------

#[test]
fn a_balloon_is_put_before_the_start_and_changes_its_size_after_it() {
    require_kvm!();
    let machine = ApiMachine::new();
    let api = &machine.api;
    for path in ["/balloon", "/balloon/statistics"] {
        api.refused("GET", path, "");
    }
    let (size, interval) = (
        json!({"amount_mib": 16}),
        json!({"stats_polling_interval_s": 2}),
    );
    assert_eq!(machine.refused("PATCH", "/balloon", &size), BEFORE_START);
    assert_eq!(
        machine.refused("PATCH", "/balloon/statistics", &interval),
        BEFORE_START
    );
    for mib in [129, u32::MAX] {
        let large = json!({"amount_mib": mib, "deflate_on_oom": false});
        let reason = machine.refused("PUT", "/balloon", &large);
        assert!(reason.contains("memory of 128 MiB"), "{reason}");
    }
    let balloon = json!({
        "amount_mib": 8,
        "deflate_on_oom": true,
        "stats_polling_interval_s": 1,
        "free_page_hinting": false,
        "free_page_reporting": true,
    });
    api.put("/balloon", &balloon);
    assert_eq!(api.get("/balloon"), balloon);
    let small = json!({"vcpu_count": 1, "mem_size_mib": 16});
    let large = json!({"vcpu_count": 1, "mem_size_mib": 4});
    machine.refused("PUT", "/machine-config", &large);
    api.put("/machine-config", &small);
    api.put(
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 128}),
    );
    machine.boot("balloon", "follow");
    api.act("InstanceStart");
    machine.running.wait_for_output("actual 2048");
    assert_eq!(machine.refused("PUT", "/balloon", &balloon), AFTER_START);
    for (method, path, body) in [
        ("GET", "/balloon/hinting/status", ""),
        ("PATCH", "/balloon/hinting/start", ""),
        ("PATCH", "/balloon/hinting/stop", "{}"),
    ] {
        let reason = api.refused(method, path, body);
        assert!(reason.contains("free page hinting"), "{reason}");
    }
    api.patch("/balloon", &size);
    machine.running.wait_for_output("actual 4096");
    api.patch("/balloon/statistics", &interval);
    let now = api.get("/balloon");
    assert_eq!(now["amount_mib"], 16);
    assert_eq!(now["stats_polling_interval_s"], 2);
    assert_eq!(api.get("/vm/config")["balloon"], now);
    let statistics = api.get("/balloon/statistics");
    assert_eq!(statistics["target_mib"], 16);
    assert_eq!(statistics["target_pages"], 16 * 256);
    assert_eq!(statistics["actual_mib"], 16);
    let off = json!({"stats_polling_interval_s": 0});
    machine.refused("PATCH", "/balloon/statistics", &off);
    machine.stop();
}

#[test]
fn a_machine_without_balloon_or_statistics_says_so() {
    require_kvm!();
    for balloon in [
        None,
        Some(json!({"amount_mib": 8, "deflate_on_oom": false})),
    ] {
        let machine = ApiMachine::new();
        if let Some(balloon) = &balloon {
            machine.api.put("/balloon", balloon);
        }
        machine.start_hello();
        let interval = json!({"stats_polling_interval_s": 1});
        machine.refused("PATCH", "/balloon/statistics", &interval);
        machine.api.refused("GET", "/balloon/statistics", "");
        let size = json!({"amount_mib": 16});
        let reason = machine.refused("PATCH", "/balloon", &size);
        // The guest has no driver for the balloon.
        let expected = if balloon.is_some() {
            "driver"
        } else {
            "balloon"
        };
        assert!(reason.contains(expected), "{reason}");
        machine.stop();
    }
}

#[test]
fn a_guest_gives_up_free_memory_on_request_and_has_it_again() {
    require_kvm!();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let balloon = json!({
        "amount_mib": 1,
        "deflate_on_oom": false,
        "stats_polling_interval_s": 0,
        "free_page_hinting": true,
        "free_page_reporting": false,
    });
    api.put("/balloon", &balloon);
    assert_eq!(api.get("/balloon"), balloon);
    assert_eq!(
        api.refused("PATCH", "/balloon/hinting/start", ""),
        BEFORE_START
    );
    machine.boot("balloon", "follow");
    api.act("InstanceStart");
    machine.running.wait_for_output("actual 256");
    let status = || api.get("/balloon/hinting/status");
    assert_eq!(status(), json!({"host_cmd": 0, "guest_cmd": null}));

    let keep = json!({"acknowledge_on_stop": false});
    api.patch("/balloon/hinting/start", &keep);
    machine.running.wait_for_output("hinted");
    assert_eq!(status(), json!({"host_cmd": 2, "guest_cmd": 0}));
    assert_eq!(
        api.request("PATCH", "/balloon/hinting/stop", "").status,
        204
    );
    machine.running.wait_for_output("done");
    assert_eq!(status(), json!({"host_cmd": 1, "guest_cmd": 0}));

    assert_eq!(
        api.request("PATCH", "/balloon/hinting/start", "").status,
        204
    );
    machine
        .running
        .wait_for_output("hinted\ndone\nhinted\ndone\n");
    assert_eq!(status(), json!({"host_cmd": 1, "guest_cmd": 0}));
    machine.stop();
}

// --- Sockets --------------------------------------------------------------------------------------

#[test]
fn a_socket_device_listens_while_the_machine_runs() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let socket = folder.path().join("vsock");
    // The specification reserves these numbers, and Firecracker accepts them.
    for cid in [0, 1, 2, u32::MAX] {
        api.put("/vsock", &json!({"guest_cid": cid, "uds_path": socket}));
    }
    api.put(
        "/vsock",
        &json!({"guest_cid": 3, "uds_path": socket, "vsock_id": "old"}),
    );
    api.put("/vsock", &json!({"guest_cid": 4, "uds_path": socket}));
    assert_eq!(api.get("/vm/config")["vsock"]["guest_cid"], 4);
    assert!(!socket.exists());
    machine.start_hello();
    assert!(fs::metadata(&socket).unwrap().file_type().is_socket());
    let vsock = json!({"guest_cid": 5, "uds_path": socket});
    assert_eq!(machine.refused("PUT", "/vsock", &vsock), AFTER_START);
    machine.stop();
    assert!(!socket.exists());
}

#[test]
fn a_socket_that_cannot_be_bound_is_reported_at_the_start() {
    require_kvm!();
    let machine = ApiMachine::new();
    let socket = machine.image("taken", 1);
    machine
        .api
        .put("/vsock", &json!({"guest_cid": 3, "uds_path": socket}));
    machine.boot("hello", "finish=hang");
    let start = json!({"action_type": "InstanceStart"});
    let reason = machine.refused("PUT", "/actions", &start);
    assert!(reason.contains("taken"), "{reason}");
    machine.api.put(
        "/vsock",
        &json!({"guest_cid": 3, "uds_path": machine.path("free")}),
    );
    machine.start_hello();
    machine.stop();
}

// --- Drives and limits ----------------------------------------------------------------------------

#[test]
fn a_drive_gets_another_image_and_other_limits_while_the_machine_runs() {
    require_kvm!();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let (first, second) = (
        machine.image("first", 1 << 16),
        machine.image("second", 1 << 17),
    );
    let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": first,
                       "rate_limiter": limiter(1 << 20)});
    api.put("/drives/a", &drive);
    let swap = json!({"drive_id": "a", "path_on_host": second});
    assert_eq!(machine.refused("PATCH", "/drives/a", &swap), BEFORE_START);
    machine.start_hello();
    api.patch("/drives/a", &swap);
    let told = |member: &str| api.get("/vm/config")["drives"][0][member].clone();
    assert_eq!(told("path_on_host"), json!(second));
    assert_eq!(told("rate_limiter"), limiter(1 << 20));
    api.patch(
        "/drives/a",
        &json!({"drive_id": "a", "rate_limiter": limiter(1 << 10)}),
    );
    assert_eq!(told("rate_limiter"), limiter(1 << 10));
    // Only the limits that change.
    let no_operations = json!({"ops": {"size": 0, "refill_time": 0}});
    api.patch(
        "/drives/a",
        &json!({"drive_id": "a", "rate_limiter": no_operations}),
    );
    assert_eq!(
        told("rate_limiter")["bandwidth"],
        limiter(1 << 10)["bandwidth"]
    );
    assert_eq!(told("rate_limiter")["ops"]["size"], 0);
    // The same image again, which has grown.
    fs::write(&second, vec![0; 1 << 18]).unwrap();
    api.patch("/drives/a", &swap);
    // The first image is free for others, the second is not.
    let other = json!({"drive_id": "b", "path_on_host": first});
    let reason = machine.refused("PATCH", "/drives/b", &other);
    assert!(reason.contains("'b'"), "{reason}");
    let missing = machine.path("missing");
    let swap = json!({"drive_id": "a", "path_on_host": missing});
    let reason = machine.refused("PATCH", "/drives/a", &swap);
    assert!(reason.contains("missing"), "{reason}");
    assert_eq!(told("path_on_host"), json!(second));
    machine.stop();
}

#[test]
fn the_limits_of_a_network_change_while_the_machine_runs() {
    require_taps!();
    let tap = HostTap::new();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let interface = json!({"iface_id": "eth0", "host_dev_name": tap.name,
                           "guest_mac": "06:00:c0:00:02:01", "mtu": 1400,
                           "rx_rate_limiter": limiter(1 << 20)});
    api.put("/network-interfaces/eth0", &interface);
    let update = json!({"iface_id": "eth0", "tx_rate_limiter": limiter(1 << 10)});
    let path = "/network-interfaces/eth0";
    assert_eq!(machine.refused("PATCH", path, &update), BEFORE_START);
    machine.boot("devices", "expect-devices=1 finish=hang");
    api.act("InstanceStart");
    machine.running.wait_for_output("PASS\n");
    api.patch(path, &update);
    let told = &api.get("/vm/config")["network-interfaces"][0];
    assert_eq!(told["rx_rate_limiter"], limiter(1 << 20));
    assert_eq!(told["tx_rate_limiter"], limiter(1 << 10));
    let other = json!({"iface_id": "eth1", "tx_rate_limiter": limiter(1)});
    let reason = machine.refused("PATCH", "/network-interfaces/eth1", &other);
    assert!(reason.contains("'eth1'"), "{reason}");
    assert_eq!(tap.mtu(), 1400);
    machine.stop();
    assert_eq!(tap.mtu(), 1500);
}

#[test]
fn metrics_count_the_work_of_devices() {
    require_taps!();
    let tap = HostTap::new();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let file = machine.path("metrics");
    api.put("/metrics", &json!({"metrics_path": file}));
    let image = machine.image("image", 1 << 16);
    let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": image});
    api.put("/drives/a", &drive);
    let interface = json!({"iface_id": "eth0", "host_dev_name": tap.name});
    api.put("/network-interfaces/eth0", &interface);
    api.put("/entropy", &json!({}));
    machine.boot("devices", "expect-devices=2,1,4 finish=hang");
    api.act("InstanceStart");
    machine.running.wait_for_output("PASS\n");
    api.act("FlushMetrics");
    let text = fs::read_to_string(&file).unwrap();
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let count = |name: &str| numbers(&line, name).iter().sum::<u64>();
    for name in [
        "read_count",
        "read_bytes",
        "entropy_bytes",
        "tx_packets_count",
    ] {
        assert!(count(name) > 0, "{name}: {line}");
    }
    machine.stop();
}

/// Returns all numbers of this name, at any depth.
fn numbers(value: &Value, name: &str) -> Vec<u64> {
    match value {
        Value::Object(members) => members
            .iter()
            .flat_map(|(member, value)| match value.as_u64() {
                Some(number) if member == name => vec![number],
                _ => numbers(value, name),
            })
            .collect(),
        Value::Array(items) => items.iter().flat_map(|item| numbers(item, name)).collect(),
        _ => Vec::new(),
    }
}
