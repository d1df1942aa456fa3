//! Metadata that a Linux guest reads over its network device.

use std::io::Read;
use std::net::{SocketAddrV4, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    HostTap, Kernel, RootFileSystem, accept, answer, configured, first_difference, linux_slot,
    require_taps,
};
use bantam_vmm::config::{MachineConfig, MetadataConfig, SerialConfig};
use bantam_vmm::{Console, Controller, ExitReason};
use serde_json::json;

const LENGTH: usize = 2 << 20;

fn counter(machine: &Controller, name: &str) -> u64 {
    let metrics = machine.metrics().expect("it was started");
    let metrics = serde_json::to_value(&*metrics).expect("counters are numbers");
    metrics["mmds"][name]
        .as_u64()
        .expect("there is such a counter")
}

/// Metadata of the machine's owner reach the guest, also those set while it runs, in a session and
/// without one, while the same card is busy with other traffic.
#[test]
fn linux_reads_metadata_while_its_card_is_busy() {
    require_taps!();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let tap = HostTap::new();
    let sink = TcpListener::bind(SocketAddrV4::new(tap.host, 0)).unwrap();
    let port = sink.local_addr().unwrap().port();
    let net = format!("net:eth0:{}/{}:{}", tap.guest, HostTap::PREFIX, tap.host);
    let list = "metadata:eth0:/latest/meta-data";
    let session = format!(
        "metadata-session:/latest/changed:{}:{port}:{LENGTH}:41",
        tap.host
    );
    let missing = "metadata:eth0:/nowhere";
    let commands = [&net[..], list, "sleep:1000", &session, missing].join(",");

    let mut config = MachineConfig::new(Kernel::Small.vmlinux());
    config.initrd = Some(RootFileSystem::new().initrd);
    config.append = Some(format!("quiet bantam.mode=test bantam.test={commands}"));
    config.nets = vec![format!("tap={}", tap.name).parse().unwrap()];
    config.serial = SerialConfig::File(log.clone());
    let mut metadata = MetadataConfig::new(vec!["net0".parse().unwrap()]);
    metadata.contents = Some(json!({
        "latest": {"meta-data": {"ami-id": "ami-1", "tags": {"a": "b"}}},
    }));
    config.metadata = Some(metadata);

    let _slot = linux_slot();
    let machine = configured(config, Console::default());
    machine.start().unwrap();
    let deadline = Instant::now() + Duration::from_secs(240);
    while counter(&machine, "rx_no_token") == 0 {
        assert!(Instant::now() < deadline, "the guest asks for nothing");
        thread::sleep(Duration::from_millis(20));
    }
    let change = json!({"latest": {"changed": {"n": 1}}});
    machine.patch_metadata(change).unwrap();
    let mut received = Vec::new();
    accept(&sink).read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), LENGTH);
    assert_eq!(first_difference(41, 0, &received), None);
    while counter(&machine, "rx_no_token") < 2 {
        assert!(Instant::now() < deadline, "the guest asks for no more");
        thread::sleep(Duration::from_millis(20));
    }
    let created = counter(&machine, "connections_created");
    assert_eq!(counter(&machine, "rx_invalid_token"), 0);
    assert_eq!(counter(&machine, "tx_errors"), 0);
    // A kernel without ACPI switches the machine off this way.
    assert_eq!(machine.wait().unwrap(), ExitReason::Reboot);

    let text = std::fs::read_to_string(&log).unwrap();
    answer(&text, &net);
    assert_eq!(answer(&text, list), "status=200 body=ami-id+tags/");
    assert_eq!(
        answer(&text, missing),
        "status=404 body=Resource+not+found:+/nowhere."
    );
    let session = answer(&text, &session);
    assert!(session.contains(r#" body={"n":1} "#), "{session}");
    assert!(session.contains(&format!("bytes={LENGTH}")), "{session}");
    let requests = session.strip_prefix("requests=").unwrap();
    let requests: u64 = requests.split(' ').next().unwrap().parse().unwrap();
    // The request for a token, and those without one.
    assert_eq!(created, requests + 3);
}
