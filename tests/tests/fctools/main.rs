//! Machines driven by `fctools`, a third-party library for Firecracker, which finds Bantam under
//! that name.

#![expect(clippy::unwrap_used, reason = "every step of a test has to succeed")]

mod devices;
mod jailed;
mod metadata;
mod snapshots;
mod workshop;

use std::fs;
use std::time::Duration;

use bantam_tests::{HostTap, Kernel, RootFileSystem, linux_slot, require_kvm, require_taps};
use fctools::extension::metrics::Metrics;
use fctools::vm::VmState;
use fctools::vm::api::{VmApi, VmApiError};
use fctools::vm::configuration::InitMethod;
use fctools::vm::models::{
    Drive, DriveCacheType, DriveIoEngine, EntropyDevice, HugePages, LoggerSystem, MetricsSystem,
    NetworkInterface,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vmm::arguments::VmmLogLevel;
use tokio::time::timeout;

use workshop::{
    LINUX_PATIENCE, Machine, PATIENCE, Workshop, drive, limiter, pause_then_kill, read_until,
};

/// Sends all requests that any running machine answers.
async fn use_api(machine: &mut Machine) {
    assert_eq!(machine.get_state(), VmState::Running);
    let info = machine.get_info().await.unwrap();
    assert_eq!(info.app_name, "Bantam");
    assert_eq!(info.id, "fctools-1");
    assert_eq!(info.vmm_version, "1.17.0");
    assert!(!info.is_paused);
    assert_eq!(machine.get_firecracker_version().await.unwrap(), "1.17.0");
    let configuration = machine.get_machine_configuration().await.unwrap();
    assert_eq!(configuration.vcpu_count, 2);
    assert_eq!(configuration.mem_size_mib, 64);
    assert_eq!(configuration.huge_pages, Some(HugePages::None));
    machine.pause().await.unwrap();
    assert!(machine.get_info().await.unwrap().is_paused);
    machine.resume().await.unwrap();
    assert!(!machine.get_info().await.unwrap().is_paused);
    machine.flush_metrics().await.unwrap();
    // A refusal comes with its reason.
    match machine.get_memory_hotplug_status().await {
        Err(VmApiError::ReceivedErrorResponse {
            status_code,
            fault_message,
        }) => {
            assert_eq!(status_code.as_u16(), 400);
            assert!(fault_message.contains("hotplug"), "{fault_message}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_machine_with_every_device_is_driven_from_start_to_end() {
    require_taps!();
    for init_method in [
        InitMethod::ViaApiCalls,
        InitMethod::ViaJsonConfiguration("config.json".into()),
    ] {
        let tap = HostTap::new();
        let mut workshop = Workshop::new();
        let init_method = match init_method {
            InitMethod::ViaJsonConfiguration(name) => {
                InitMethod::ViaJsonConfiguration(workshop.path(name.to_str().unwrap()))
            }
            other => other,
        };
        let arguments = "expect-devices=2,2,1,4 finish=hang";
        let mut data = workshop.configuration("devices", arguments);
        data.machine_configuration.vcpu_count = 2;
        data.machine_configuration.huge_pages = Some(HugePages::None);
        let (root, scratch) = (workshop.image("root"), workshop.image("scratch"));
        data.drives = vec![
            Drive {
                is_root_device: true,
                is_read_only: Some(true),
                cache_type: Some(DriveCacheType::Writeback),
                io_engine: Some(DriveIoEngine::Async),
                rate_limiter: Some(limiter(100_000_000)),
                ..drive("root", root)
            },
            Drive {
                cache_type: Some(DriveCacheType::Unsafe),
                io_engine: Some(DriveIoEngine::Sync),
                ..drive("scratch", scratch)
            },
        ];
        data.network_interfaces = vec![NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: tap.name.clone(),
            guest_mac: Some("06:00:c0:00:02:01".to_owned()),
            rx_rate_limiter: Some(limiter(100_000_000)),
            tx_rate_limiter: Some(limiter(100_000_000)),
        }];
        data.entropy_device = Some(EntropyDevice {
            rate_limiter: Some(limiter(100_000_000)),
        });
        data.logger_system = Some(LoggerSystem {
            logs: Some(workshop.new_file("log")),
            level: Some(VmmLogLevel::Info),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: None,
        });
        data.metrics_system = Some(MetricsSystem {
            metrics: workshop.new_file("metrics"),
        });
        let (mut machine, folder) = workshop.start(init_method, data).await;
        let mut output = machine.take_pipes().unwrap();
        let text = read_until(&mut output.stdout, "PASS\n").await;
        assert!(text.contains("ok: the devices are 2,2,1,4"), "{text}");
        use_api(&mut machine).await;
        let metrics = fs::read_to_string(folder.path().join("metrics")).unwrap();
        let first: Metrics = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
        assert!(first.vcpu.exit_io_out > 0, "{first:?}");
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        // The thread of the API builds what a configuration file starts.
        let built_by = |thread| log.contains(&format!("[fctools-1:{thread}:INFO:"));
        assert!(
            built_by("bantam-api") || built_by("bantam-api-work"),
            "{log}"
        );
        pause_then_kill(&mut machine).await;
    }
}

#[tokio::test]
async fn a_guest_that_powers_off_ends_the_machine() {
    require_kvm!();
    let mut workshop = Workshop::new();
    let data = workshop.configuration("hello", "boot-timer finish=poweroff");
    let (mut machine, _folder) = workshop.start(InitMethod::ViaApiCalls, data).await;
    let ended = async {
        while machine.get_state() == VmState::Running {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, ended).await.expect("it ends");
    assert_eq!(machine.get_state(), VmState::Exited);
    machine.cleanup().await.unwrap();
}

#[tokio::test]
async fn linux_shuts_down_when_the_button_is_pressed() {
    require_kvm!();
    let _slot = linux_slot();
    let mut workshop = Workshop::new();
    let image = workshop.path("root.ext4");
    fs::copy(RootFileSystem::new().ext4, &image).unwrap();
    let mut data = workshop.configuration(
        "hello",
        "console=ttyS0 reboot=k panic=-1 bantam.mode=test bantam.test=power-button",
    );
    data.boot_source.kernel_image = workshop.file(Kernel::Full.vmlinux());
    data.machine_configuration.mem_size_mib = 256;
    let root = workshop.file(image);
    data.drives = vec![Drive {
        is_root_device: true,
        ..drive("root", root)
    }];
    let (mut machine, _folder) = workshop.start(InitMethod::ViaApiCalls, data).await;
    let mut output = machine.take_pipes().unwrap();
    read_until(&mut output.stdout, "bantam: power-button waiting").await;
    machine.pause().await.unwrap();
    machine.resume().await.unwrap();
    let outcome = machine
        .shutdown([VmShutdownAction {
            method: VmShutdownMethod::CtrlAltDel,
            timeout: Some(LINUX_PATIENCE),
            graceful: true,
        }])
        .await
        .unwrap();
    assert!(outcome.is_fully_graceful(), "{outcome:?}");
    machine.cleanup().await.unwrap();
}

#[test]
#[ignore = "it is the process of a page server"]
fn page_server() {
    bantam_tests::page_server::serve();
}
