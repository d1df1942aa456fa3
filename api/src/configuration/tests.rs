use std::path::Path;
use std::time::Duration;

use bantam_vmm::RateLimit;
use bantam_vmm::config::{DeviceName, HugePages, MachineTable};

use super::*;

#[test]
fn what_a_client_says_of_processors_memory_and_serial_port_reaches_the_machine() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "/dev/null"},
        "machine-config":
            {"vcpu_count": 4, "mem_size_mib": 64, "smt": true, "huge_pages": "2M"},
        "serial": {"rate_limiter": {"size": 1000, "refill_time": 500}}
    }"#;
    let configuration: Configuration = serde_json::from_str(text).unwrap();
    let machine = configuration.check().unwrap().machine().unwrap();
    assert_eq!((machine.cpus.get(), machine.smt), (4, true));
    assert_eq!(machine.memory.bytes(), 64 << 20);
    assert_eq!(machine.huge_pages, HugePages::TwoMib);
    let limit = RateLimit {
        size: 1000,
        refill_time: Duration::from_millis(500),
        one_time_burst: 0,
    };
    assert_eq!(machine.serial_limit.rate_limit(), Some(limit));
}

#[test]
fn devices_are_called_by_their_ids_as_far_as_these_differ() {
    let long = "x".repeat(65);
    let drive = |id: &str| {
        format!(r#"{{"drive_id": "{id}", "path_on_host": "/dev/null", "is_root_device": false}}"#)
    };
    let interface =
        |id: &str, tap: &str| format!(r#"{{"iface_id": "{id}", "host_dev_name": "{tap}"}}"#);
    let text = format!(
        r#"{{
            "boot-source": {{"kernel_image_path": "/dev/zero"}},
            "drives": [{}, {}, {}],
            "network-interfaces": [{}, {}],
            "mmds-config": {{"network_interfaces": ["1"]}}
        }}"#,
        drive("1"),
        drive("rng"),
        drive(&long),
        interface("1", "tap0"),
        interface("net0", "tap1"),
    );
    let mut configuration: Configuration = serde_json::from_str(&text).unwrap();
    for drive in &mut configuration.drives {
        drive.is_read_only = true;
    }
    let machine = configuration.machine().unwrap();
    let names: Vec<_> = machine.disk_names().chain(machine.net_names()).collect();
    let names: Vec<_> = names.iter().map(DeviceName::as_str).collect();
    assert_eq!(names, ["1", "drive.1", "drive.2", "interface.0", "net0"]);
    assert_eq!(machine.metadata.unwrap().nets[0].as_str(), "interface.0");
}

#[test]
fn what_clients_say_can_be_written_as_a_machine_file() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "/dev/zero"},
        "drives": [{
            "drive_id": "root", "path_on_host": "/dev/null", "is_root_device": true,
            "rate_limiter": {"bandwidth": {"size": 5, "refill_time": 60000}}
        }],
        "network-interfaces": [{
            "iface_id": "eth0", "host_dev_name": "tap0",
            "tx_rate_limiter": {"ops":
                {"size": 18446744073709551615, "one_time_burst": 7, "refill_time": 1}}
        }],
        "vsock": {"guest_cid": 1, "uds_path": "/v.sock"},
        "entropy": {"rate_limiter": {"bandwidth": {"size": 9, "refill_time": 1500}}},
        "mmds-config": {"network_interfaces": ["eth0"], "version": "V2"},
        "cpu-config": {"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1xx0"}]}
    }"#;
    let configuration: Configuration = serde_json::from_str(text).unwrap();
    let mut machine = configuration.machine().unwrap();
    let metadata = machine.metadata.as_mut().unwrap();
    metadata.contents = Some(serde_json::json!({"a": [null, 1.5, u64::MAX, "b"]}));
    let file = MachineTable::from_toml(&machine.to_toml(), Path::new("/vm.toml"));
    assert_eq!(file.unwrap().into_config().unwrap(), machine);
}

#[test]
fn processors_and_memory_that_do_not_fit_are_refused() {
    let refused = [
        r#"{"vcpu_count": 3, "mem_size_mib": 64, "smt": true}"#,
        r#"{"vcpu_count": 1, "mem_size_mib": 65, "huge_pages": "2M"}"#,
    ];
    for text in refused {
        let mut configuration = Configuration::default();
        let wanted: MachineConfiguration = serde_json::from_str(text).unwrap();
        assert!(configuration.put_machine_config(wanted).is_err(), "{text}");
    }
}

#[test]
fn an_address_in_other_letters_is_the_same() {
    let mut configuration = Configuration::default();
    let mut put = |id: &str, tap: &str, mac: &str| {
        let text =
            format!(r#"{{"iface_id": "{id}", "host_dev_name": "{tap}", "guest_mac": "{mac}"}}"#);
        let interface: NetworkInterface = serde_json::from_str(&text).unwrap();
        let result = configuration.put_network_interface(interface);
        result.map_err(|fault| fault.to_string())
    };
    put("a", "tap0", "06:00:c0:00:02:0a").unwrap();
    let error = put("b", "tap1", "06:00:C0:00:02:0A").unwrap_err();
    assert!(error.contains("'a' has the same"), "{error}");
    put("b", "tap1", "06:00:C0:00:02:0B").unwrap();
    put("a", "tap0", "06:00:c0:00:02:0a").unwrap();
}

#[test]
fn no_output_goes_to_a_file_that_the_machine_uses() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "/dev/null", "initrd_path": "/dev/zero"},
        "drives": [{"drive_id": "1", "path_on_host": "/dev/full", "is_root_device": false}]
    }"#;
    let configuration: Configuration = serde_json::from_str(text).unwrap();
    for path in ["/dev/null", "/dev/zero", "/dev/../dev/full"] {
        let fault = configuration.check_output("log file", Path::new(path));
        let message = fault.unwrap_err().message();
        let start = format!("Cannot use log file '{path}': it is a disk, the kernel or the initrd");
        assert!(message.starts_with(&start), "{message}");
    }
    for path in ["/dev/random", "/dev/bantam-nothing"] {
        configuration
            .check_output("log file", Path::new(path))
            .unwrap();
    }
}
