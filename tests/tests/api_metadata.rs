//! The API's metadata for the guest. Every answer is checked against `docs/openapi.yaml`.

use std::fs;

use bantam_tests::{ApiMachine, HostTap, require_kvm, require_taps};
use serde_json::json;

const AFTER_START: &str = "The requested operation is not supported after starting the microVM";

#[test]
fn metadata_are_set_merged_and_returned_before_and_after_the_start() {
    require_taps!();
    let tap = HostTap::new();
    let machine = ApiMachine::with(|bantam, _| bantam.option("--mmds-size-limit", "200"));
    let api = &machine.api;
    let config = json!({"version": "V2", "network_interfaces": ["eth0"],
                        "ipv4_address": "169.254.170.2", "imds_compat": true});
    // This interface does not exist yet.
    machine.refused("PUT", "/mmds/config", &config);
    let interface = json!({"iface_id": "eth0", "host_dev_name": tap.name});
    api.put("/network-interfaces/eth0", &interface);
    machine.refused("PUT", "/mmds/config", &json!({"network_interfaces": []}));
    let elsewhere = json!({"network_interfaces": ["eth0"], "ipv4_address": "10.0.0.1"});
    machine.refused("PUT", "/mmds/config", &elsewhere);
    api.put("/mmds/config", &config);
    assert_eq!(api.get("/vm/config")["mmds-config"], config);
    let data = json!({"latest": {"name": "web", "number": 1, "gone": true}});
    for started in [false, true] {
        if started {
            machine.start_hello();
            assert_eq!(machine.refused("PUT", "/mmds/config", &config), AFTER_START);
        }
        api.put("/mmds", &data);
        assert_eq!(api.get("/mmds"), data);
        api.patch(
            "/mmds",
            &json!({"latest": {"number": 2, "gone": null}, "more": []}),
        );
        let merged = json!({"latest": {"name": "web", "number": 2}, "more": []});
        assert_eq!(api.get("/mmds"), merged);
        let large = json!({"text": "x".repeat(200)}).to_string();
        for method in ["PUT", "PATCH"] {
            assert_eq!(api.request(method, "/mmds", &large).status, 413);
        }
        assert_eq!(api.get("/mmds"), merged);
    }
    machine.stop();
}

#[test]
fn metadata_are_any_value() {
    require_taps!();
    let tap = HostTap::new();
    let machine = ApiMachine::new();
    let api = &machine.api;
    let interface = json!({"iface_id": "eth0", "host_dev_name": tap.name});
    api.put("/network-interfaces/eth0", &interface);
    api.put("/mmds/config", &json!({"network_interfaces": ["eth0"]}));
    for started in [false, true] {
        if started {
            machine.start_hello();
        }
        for value in [
            json!("text"),
            json!([1, {"a": null}]),
            json!(7),
            json!(false),
        ] {
            api.put("/mmds", &value);
            assert_eq!(api.get("/mmds"), value);
        }
        api.patch("/mmds", &json!({"a": 1, "b": null}));
        assert_eq!(api.get("/mmds"), json!({"a": 1}));
        api.patch("/mmds", &json!(["b"]));
        assert_eq!(api.get("/mmds"), json!(["b"]));
        api.put("/mmds", &json!(null));
        assert_eq!(api.get("/mmds"), json!({}));
    }
    machine.stop();
}

#[test]
fn metadata_come_from_a_file() {
    require_kvm!();
    let data = json!({"latest": {"name": "web"}});
    let machine = ApiMachine::with(|bantam, folder| {
        let file = folder.join("metadata.json");
        fs::write(&file, data.to_string()).unwrap();
        bantam.option("--metadata", file)
    });
    assert_eq!(machine.api.get("/mmds"), data);
    machine.stop();
}
