//! Requests that the API refuses: with which reason, and without a change. Every answer is checked
//! against `docs/openapi.yaml`.

use std::fs;

use bantam_tests::{ApiMachine, payload};
use serde_json::{Value, json};

#[test]
fn every_spelling_of_a_choice_is_known_and_no_other() {
    let machine = ApiMachine::new();
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
fn unknown_fields_and_invalid_json_are_refused_with_field_and_place() {
    let machine = ApiMachine::new();
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
    // Deep enough to overflow the stack of a parser without a limit.
    let deep = format!("{{\"rate_limiter\": {}", "[".repeat(40_000));
    api.refused("PUT", "/entropy", &deep);
    api.refused("PUT", "/cpu-config", &"[".repeat(50_000));
    machine.stop();
}

#[test]
fn values_out_of_range_are_refused_and_change_nothing() {
    let machine = ApiMachine::new();
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
            "cpuid_modifiers[0]: missing field `subleaf`",
        ),
        (
            "/cpu-config",
            json!({"msr_modifiers": [{"addr": "0x100000000", "bitmap": "0b1"}]}),
            "msr_modifiers[0].addr: invalid number '0x100000000'",
        ),
        (
            "/cpu-config",
            json!({"reg_modifiers": [{"addr": "0x603000000013c020", "bitmap": "0b1"}]}),
            "reg_modifiers: x86-64 has none",
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
    let machine = ApiMachine::new();
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
    let machine = ApiMachine::new();
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
        ("PUT", "/snapshot"),
        ("PUT", "/snapshot/delete"),
        ("GET", "/snapshot/create"),
    ] {
        let body = if method == "GET" { "" } else { "{}" };
        let reason = api.refused(method, path, body);
        let expected = format!("Invalid request method and/or path: {method} {path}");
        assert_eq!(reason, expected);
    }
    for (method, path) in [("PUT", "/pmem/a"), ("GET", "/hotplug/memory")] {
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
fn slashes_around_a_path_do_not_count() {
    let machine = ApiMachine::new();
    for (path, member) in [
        ("//", "vmm_version"),
        ("///", "vmm_version"),
        ("//machine-config/", "vcpu_count"),
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n");
        let answer = machine.api.raw(request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains(member), "{answer}");
    }
    machine.stop();
}

#[test]
fn a_command_line_that_is_too_long_is_refused_at_once() {
    let machine = ApiMachine::new();
    let kernel = machine.image("kernel", 1);
    let boot_source = |length: usize| {
        json!({"kernel_image_path": kernel, "boot_args": "x".repeat(length)}).to_string()
    };
    let api = &machine.api;
    assert_eq!(
        api.request("PUT", "/boot-source", &boot_source(2047))
            .status,
        204
    );
    let reason = api.refused("PUT", "/boot-source", &boot_source(2048));
    assert!(reason.contains("2048 bytes"), "{reason}");
    machine.stop();
}

#[test]
fn bodies_have_a_largest_size() {
    let machine = ApiMachine::with(|bantam, _| bantam.option("--http-api-max-payload-size", "200"));
    let api = &machine.api;
    let logger = |size: usize| {
        let body = r#"{"level": "Info"}"#.to_owned();
        format!("{body}{}", " ".repeat(size - body.len()))
    };
    assert_eq!(api.request("PUT", "/logger", &logger(200)).status, 204);
    for size in [201, 1 << 20] {
        let answer = api.request("PUT", "/logger", &logger(size));
        assert_eq!(answer.status, 400);
        let reason = answer.body.unwrap()["fault_message"].to_string();
        assert!(reason.contains("200 bytes"), "{reason}");
    }
    machine.stop();
}
