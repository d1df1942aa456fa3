//! The API: the machine that clients configure, from its start to its end. Every answer is checked
//! against `docs/openapi.yaml`.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    ApiClient, ApiMachine, Bantam, bare_metal_boot_source, elf_kernel, monitor, payload,
    require_kvm,
};
use bantam_vmm::host::{Virtualization, virtualization};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const AFTER_START: &str = "The requested operation is not supported after starting the microVM";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM";

/// How long a test waits for an event that should happen at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a test watches that nothing changes.
const STILL_TIME: Duration = Duration::from_millis(200);

#[test]
fn an_instance_says_what_it_is_before_anything_is_configured() {
    let machine = ApiMachine::with(|bantam, _| bantam.option("--id", "web-1"));
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
    let machine = ApiMachine::new();
    let api = &machine.api;
    let config = json!({"vcpu_count": 2, "mem_size_mib": 64});
    api.put("/machine-config", &config);
    machine.boot("cpus", "expect=2 finish=poweroff");
    api.put("/entropy", &json!({}));
    assert_eq!(api.get("/")["state"], "Not started");
    api.act("InstanceStart");
    let ended = machine.ended_well();
    ended.passed();
    assert!(
        ended
            .stderr
            .contains("has ended: the guest has powered off"),
        "{ended}"
    );
}

#[test]
fn memory_and_vcpus_are_as_configured() {
    require_kvm!();
    let machine = ApiMachine::new();
    let config = json!({"vcpu_count": 1, "mem_size_mib": 17});
    machine.api.put("/machine-config", &config);
    let update = json!({"mem_size_mib": 48});
    machine.api.patch("/machine-config", &update);
    machine.boot("memory", "expect-mib=48 finish=reset");
    machine.api.act("InstanceStart");
    machine.ended_well().passed();
}

#[test]
fn the_configuration_can_be_read_back() {
    require_kvm!();
    let machine = ApiMachine::new();
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
    machine.add_drive("data", &json!({"io_engine": "Async"}));
    machine.add_drive(
        "root",
        &json!({"is_root_device": true, "is_read_only": true, "cache_type": "Writeback",
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
    // A drive of the same name keeps its place.
    machine.add_drive(
        "data",
        &json!({"io_engine": "Async", "cache_type": "Writeback"}),
    );
    let drives = &api.get("/vm/config")["drives"];
    assert_eq!(drives[0]["cache_type"], "Writeback");
    assert_eq!(drives.as_array().unwrap().len(), 2);
    machine.add_drive("data", &json!({"io_engine": "Async"}));
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
    let machine = ApiMachine::new();
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
    // The failed start has changed nothing.
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
        ("PUT", "/boot-source", bare_metal_boot_source("hello", "")),
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
fn processors_are_as_configured_or_the_start_fails() {
    require_kvm!();
    let machine = ApiMachine::new();
    let api = &machine.api;
    machine.boot("hello", "finish=hang");
    let start_refused = || api.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    for (config, complaint) in [
        (
            json!({"kvm_capabilities": ["4000000000"]}),
            "KVM lacks capability 4000000000,",
        ),
        (
            json!({"msr_modifiers": [{"addr": "0x12345678", "bitmap": "0b1"}]}),
            "cannot change MSR 0x12345678: KVM does not have it",
        ),
    ] {
        api.put("/cpu-config", &config);
        let reason = start_refused();
        assert!(reason.starts_with(complaint), "{reason}");
    }
    let no_leaf = json!({"cpuid_modifiers": [{"leaf": "0x2fffffff", "subleaf": "0", "flags": 0,
        "modifiers": [{"register": "eax", "bitmap": "0b1"}]}]});
    match virtualization() {
        Virtualization::Vmx | Virtualization::Svm => {
            api.put("/cpu-config", &no_leaf);
            let reason = start_refused();
            assert!(
                reason.contains("cannot change CPUID leaf 0x2fffffff"),
                "{reason}"
            );
        }
        Virtualization::Pvm | Virtualization::None => {
            let reason = machine.refused("PUT", "/cpu-config", &no_leaf);
            assert!(reason.starts_with("Invalid cpuid_modifiers: "), "{reason}");
        }
    }
    let bitmap = format!("0b{}110101xx0", "x".repeat(55));
    api.put(
        "/cpu-config",
        &json!({
            "kvm_capabilities": ["3", "!4000000000"],
            "msr_modifiers": [{"addr": "0b101110110", "bitmap": "0b1_1010_1xx0"}],
            "reg_modifiers": [],
        }),
    );
    assert_eq!(
        api.get("/vm/config")["cpu-config"],
        json!({
            "kvm_capabilities": ["3", "!4000000000"],
            "cpuid_modifiers": [],
            "msr_modifiers": [{"addr": "0x176", "bitmap": bitmap}],
        })
    );
    machine.boot("hello", "msr=374 finish=poweroff");
    api.act("InstanceStart");
    let ended = machine.ended_well();
    ended.passed();
    assert!(ended.text().contains("MSR 0x176: 0x1a8\n"), "{ended}");
}

#[test]
fn a_start_that_fails_can_be_tried_again() {
    require_kvm!();
    let machine = ApiMachine::new();
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
fn the_guest_finds_drives_in_their_order_with_the_root_device_first() {
    require_kvm!();
    let machine = ApiMachine::new();
    machine.boot("devices", "expect-devices=2,2,2,4 finish=poweroff");
    machine.add_drive("first", &json!({}));
    machine.add_drive("second", &json!({"is_read_only": true}));
    machine.add_drive("root", &json!({"is_root_device": true}));
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
        let machine = ApiMachine::new();
        machine.boot("hello", "a=b finish=poweroff");
        machine.add_drive("data", &json!({}));
        machine.add_drive("drive", &members);
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
    let machine = ApiMachine::new();
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
fn a_guest_tells_the_boot_timer() {
    require_kvm!();
    for (timer, logged) in [(true, true), (false, false)] {
        let machine = ApiMachine::with(|bantam, _| {
            let options = timer.then_some("--boot-timer");
            options.iter().fold(bantam, Bantam::argument)
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
    let machine = ApiMachine::new();
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
        // The request may be repeated.
        api.patch("/vm", &json!({"state": "Paused"}));
        assert_eq!(api.get("/")["state"], "Paused");
        // Earlier output of the guest is still being written.
        thread::sleep(STILL_TIME);
        let before = size();
        thread::sleep(STILL_TIME);
        assert_eq!(size(), before);
        api.patch("/vm", &json!({"state": "Resumed"}));
        api.patch("/vm", &json!({"state": "Resumed"}));
        assert_eq!(api.get("/")["state"], "Running");
        wait_for_more(before);
    }
    // A paused machine ends as well.
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
            let machine = ApiMachine::new();
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
    let machine = ApiMachine::new();
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
    let machine = ApiMachine::new();
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
            // The first argument is the program itself, which is replaced by its other name.
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
