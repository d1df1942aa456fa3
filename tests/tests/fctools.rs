//! Machines driven by `fctools`, a library of others for Firecracker, which finds Bantam under that name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use bantam_tests::{
    HostTap, Kernel, RootFileSystem, linux_slot, monitor, payload, require_kvm, require_taps,
};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::{VmApi, VmApiError};
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, Drive, DriveCacheType, DriveIoEngine, EntropyDevice, HugePages, LoggerSystem,
    MachineConfiguration, MetricsSystem, NetworkInterface, RateLimiter, TokenBucket,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments, VmmLogLevel};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use tempfile::TempDir;
use tokio::time::timeout;

/// How long a bare-metal guest may take for anything.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a Linux guest may take.
const LINUX_PATIENCE: Duration = Duration::from_secs(300);

type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;
type Machine = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

/// A folder in which a machine is put together.
struct Workshop {
    folder: TempDir,
    resources: Resources,
}

impl Workshop {
    fn new() -> Workshop {
        Workshop {
            folder: tempfile::tempdir().unwrap(),
            resources: ResourceSystem::new(
                DirectProcessSpawner,
                TokioRuntime,
                VmmOwnershipModel::Shared,
            ),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file that is there already.
    fn file(&mut self, path: PathBuf) -> Resource {
        let kind = ResourceType::Moved(MovedResourceType::Copied);
        self.resources.create_resource(path, kind).unwrap()
    }

    /// A file that fctools creates and removes.
    fn new_file(&mut self, name: &str) -> Resource {
        let kind = ResourceType::Created(CreatedResourceType::File);
        let path = self.path(name);
        self.resources.create_resource(path, kind).unwrap()
    }

    fn image(&mut self, name: &str) -> Resource {
        let path = self.path(name);
        fs::write(&path, [0; 1 << 16]).unwrap();
        self.file(path)
    }

    /// The least that makes a machine, with a bare-metal guest.
    fn configuration(&mut self, guest: &str, boot_args: &str) -> VmConfigurationData {
        let kernel_image = self.file(payload(guest));
        VmConfigurationData {
            boot_source: BootSource {
                kernel_image,
                boot_args: Some(boot_args.to_owned()),
                initrd: None,
            },
            drives: Vec::new(),
            pmem_devices: Vec::new(),
            machine_configuration: MachineConfiguration {
                vcpu_count: 1,
                mem_size_mib: 64,
                smt: None,
                track_dirty_pages: None,
                huge_pages: None,
            },
            cpu_template: None,
            network_interfaces: Vec::new(),
            balloon_device: None,
            vsock_device: None,
            logger_system: None,
            metrics_system: None,
            memory_hotplug_configuration: None,
            mmds_configuration: None,
            entropy_device: None,
        }
    }

    /// Starts a machine, and gives the folder to whoever looks at its files.
    async fn start(self, init_method: InitMethod, data: VmConfigurationData) -> (Machine, TempDir) {
        let firecracker = self.path("firecracker");
        symlink(monitor(), &firecracker).unwrap();
        let installation = VmmInstallation::new(&firecracker, &firecracker, &firecracker);
        let socket = VmmApiSocket::Enabled(self.path("api.socket"));
        let arguments = VmmArguments::new(socket)
            .log_level(VmmLogLevel::Info)
            .show_log_level()
            .enable_boot_timer()
            .api_max_payload_bytes(100_000)
            .mmds_size_limit(100_000);
        let executor = UnrestrictedVmmExecutor::new(arguments).id(VmmId::new("fctools-1").unwrap());
        let configuration = VmConfiguration::New { init_method, data };
        let machine = Vm::prepare(executor, self.resources, installation, configuration);
        let mut machine = machine.await.unwrap();
        machine.start(PATIENCE).await.unwrap();
        (machine, self.folder)
    }
}

fn limiter(size: u64) -> RateLimiter {
    let bucket = TokenBucket {
        size,
        one_time_burst: Some(size),
        refill_time: 100,
    };
    RateLimiter {
        bandwidth: bucket.clone(),
        ops: bucket,
    }
}

fn drive(id: &str, block: Resource) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        is_root_device: false,
        cache_type: None,
        partuuid: None,
        is_read_only: None,
        block: Some(block),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    }
}

async fn pause_then_kill(machine: &mut Machine) {
    let outcome = machine
        .shutdown([VmShutdownAction {
            method: VmShutdownMethod::PauseThenKill,
            timeout: Some(PATIENCE),
            graceful: false,
        }])
        .await
        .unwrap();
    assert!(outcome.errors.is_empty(), "{outcome:?}");
    machine.cleanup().await.unwrap();
}

/// Asks for everything that can be asked of any machine that runs.
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
    // What is refused is told with its reason.
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
        let first: serde_json::Value =
            serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
        assert!(first["utc_timestamp_ms"].is_u64(), "{first}");
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        assert!(log.contains("[fctools-1:bantam-api:INFO:"), "{log}");
        pause_then_kill(&mut machine).await;
    }
}

/// Reads the guest's output until it has `text`.
async fn read_until(output: &mut (impl futures_util::AsyncRead + Unpin), text: &str) -> String {
    use futures_util::AsyncReadExt;
    let mut content = Vec::new();
    let found = async {
        let mut chunk = [0; 4096];
        while !String::from_utf8_lossy(&content).contains(text) {
            let count = output.read(&mut chunk).await.unwrap();
            assert!(count > 0, "it ends: {}", String::from_utf8_lossy(&content));
            content.extend_from_slice(&chunk[..count]);
        }
    };
    timeout(LINUX_PATIENCE, found).await.expect("it prints");
    String::from_utf8_lossy(&content).into_owned()
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
