//! Machines as fctools configures them.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use bantam_tests::{monitor, payload};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{BootSource, Drive, MachineConfiguration, RateLimiter, TokenBucket};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownError, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::command_modifier::CommandModifier;
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments, VmmLogLevel};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use futures_util::{AsyncRead, AsyncReadExt};
use tempfile::TempDir;
use tokio::time::timeout;

/// How long a bare-metal guest may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How long a Linux guest may take.
pub const LINUX_PATIENCE: Duration = Duration::from_secs(300);

/// fctools' type for the files of a machine.
pub type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;
/// fctools' type for a machine.
pub type Machine = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

/// A folder for the files of a machine.
pub struct Workshop {
    folder: TempDir,
    resources: Resources,
}

impl Workshop {
    /// Makes an empty folder.
    pub fn new() -> Workshop {
        Workshop::with_owner(VmmOwnershipModel::Shared)
    }

    /// Makes an empty folder for a machine whose files have this owner.
    pub fn with_owner(owner: VmmOwnershipModel) -> Workshop {
        Workshop {
            folder: tempfile::tempdir().unwrap(),
            resources: ResourceSystem::new(DirectProcessSpawner, TokioRuntime, owner),
        }
    }

    /// Returns fctools' record of the files.
    pub fn resources(&mut self) -> &mut Resources {
        &mut self.resources
    }

    /// Returns the record and the folder.
    pub fn into_parts(self) -> (Resources, TempDir) {
        (self.resources, self.folder)
    }

    /// Returns the record alone.
    pub fn into_resources(self) -> Resources {
        self.resources
    }

    /// Returns the path of a file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Registers a file that exists already.
    pub fn file(&mut self, path: PathBuf) -> Resource {
        let kind = ResourceType::Moved(MovedResourceType::Copied);
        self.resources.create_resource(path, kind).unwrap()
    }

    /// Registers a file that fctools leaves where it is.
    pub fn present(&mut self, path: PathBuf) -> Resource {
        self.resources
            .create_resource(path, ResourceType::Produced)
            .unwrap()
    }

    /// Registers a file that fctools creates and removes.
    pub fn new_file(&mut self, name: &str) -> Resource {
        let kind = ResourceType::Created(CreatedResourceType::File);
        let path = self.path(name);
        self.resources.create_resource(path, kind).unwrap()
    }

    /// Makes a disk image.
    pub fn image(&mut self, name: &str) -> Resource {
        let path = self.path(name);
        fs::write(&path, [0; 1 << 16]).unwrap();
        self.file(path)
    }

    /// Returns a minimal machine with a bare-metal guest.
    pub fn configuration(&mut self, guest: &str, boot_args: &str) -> VmConfigurationData {
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

    /// Returns what starts a monitor with its API on this socket in the folder.
    pub fn executor(&self, socket: &str) -> UnrestrictedVmmExecutor {
        let socket = VmmApiSocket::Enabled(self.path(socket));
        let arguments = VmmArguments::new(socket)
            .log_level(VmmLogLevel::Info)
            .show_log_level()
            .enable_boot_timer()
            .api_max_payload_bytes(100_000)
            .mmds_size_limit(100_000);
        UnrestrictedVmmExecutor::new(arguments)
            .command_modifier(EndWithTest)
            .id(VmmId::new("fctools-1").unwrap())
    }

    /// Returns the monitor under the name that fctools expects.
    pub fn installation(&self) -> VmmInstallation {
        let firecracker = self.path("firecracker");
        if !firecracker.exists() {
            symlink(monitor(), &firecracker).unwrap();
        }
        VmmInstallation::new(&firecracker, &firecracker, &firecracker)
    }

    /// Starts a machine, and returns it with the folder of its files.
    pub async fn start(
        self,
        init_method: InitMethod,
        data: VmConfigurationData,
    ) -> (Machine, TempDir) {
        let installation = self.installation();
        let executor = self.executor("api.socket");
        let configuration = VmConfiguration::New { init_method, data };
        let machine = Vm::prepare(executor, self.resources, installation, configuration);
        let mut machine = machine.await.unwrap();
        machine.start(PATIENCE).await.unwrap();
        (machine, self.folder)
    }
}

/// Makes the kernel kill a monitor when the thread of its test ends, so that a failing test leaves
/// none behind.
#[derive(Debug)]
pub struct EndWithTest;

impl CommandModifier for EndWithTest {
    fn apply(&self, program: &mut PathBuf, arguments: &mut Vec<OsString>) {
        let program = std::mem::replace(program, "setpriv".into());
        let before = ["--pdeathsig", "KILL", "--"].map(OsString::from);
        arguments.splice(0..0, before.into_iter().chain([program.into()]));
    }
}

/// Returns limits of bytes and operations in a tenth of a second.
pub fn limiter(size: u64) -> RateLimiter {
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

/// Returns a drive without further options.
pub fn drive(id: &str, block: Resource) -> Drive {
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

/// Kills a machine.
pub async fn pause_then_kill(machine: &mut Machine) {
    let outcome = machine
        .shutdown([VmShutdownAction {
            method: VmShutdownMethod::PauseThenKill,
            timeout: Some(PATIENCE),
            graceful: false,
        }])
        .await;
    // fctools treats it as an error if the process has ended before fctools waits for it.
    assert!(
        matches!(outcome, Ok(_) | Err(VmShutdownError::WaitForExitError(_))),
        "{outcome:?}"
    );
    assert!(
        matches!(machine.get_state(), VmState::Crashed(_)),
        "{outcome:?}"
    );
    machine.cleanup().await.unwrap();
}

/// Reads the guest's output until it has `text`.
pub async fn read_until(output: &mut (impl AsyncRead + Unpin), text: &str) -> String {
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
