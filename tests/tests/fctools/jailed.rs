//! Monitors that fctools starts by a jailer.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bantam_tests::{monitor, require_kvm, require_namespaces};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::Vm;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration};
use fctools::vm::models::{CreateSnapshot, SnapshotType};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vmm::arguments::jailer::{JailerArguments, JailerCgroupVersion};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use fctools::vmm::executor::jailed::{
    FlatVirtualPathResolver, JailedVmmExecutor, VirtualPathResolver, VirtualPathResolverError,
};
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::ResourceType;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::workshop::{EndWithTest, PATIENCE, Workshop, drive, read_until};

/// The user and the group of monitors.
const OWNER: u32 = 54_321;

type Machine = Vm<JailedVmmExecutor<InJail>, DirectProcessSpawner, TokioRuntime>;

/// Puts files into the root of a jail, except libraries, which stay where a program looks for them.
#[derive(Debug)]
struct InJail;

impl VirtualPathResolver for InJail {
    fn resolve_virtual_path(&self, path: &Path) -> Result<PathBuf, VirtualPathResolverError> {
        match path.starts_with("/lib") || path.starts_with("/lib64") {
            true => Ok(path.to_owned()),
            false => FlatVirtualPathResolver.resolve_virtual_path(path),
        }
    }
}

/// Returns the libraries that a build for tests needs. One for users is static.
fn libraries() -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(monitor()).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let words = output
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    words.map(PathBuf::from).collect()
}

/// A jailed machine that has printed `PASS`, and what is known of it outside.
struct Jailed {
    machine: Machine,
    monitor: Pid,
    root: PathBuf,
    _folder: TempDir,
}

impl Jailed {
    async fn start(jailer_arguments: JailerArguments) -> Jailed {
        let owner = VmmOwnershipModel::Downgraded {
            uid: OWNER,
            gid: OWNER,
        };
        let mut workshop = Workshop::with_owner(owner);
        let mut data = workshop.configuration("hello", "finish=hang");
        data.drives = vec![drive("data", workshop.image("data.img"))];
        for library in libraries() {
            workshop.file(library);
        }
        let [firecracker, jailer, base] =
            ["firecracker", "jailer", "jails"].map(|name| workshop.path(name));
        symlink(monitor(), &firecracker).unwrap();
        symlink(monitor(), &jailer).unwrap();
        let installation = VmmInstallation::new(&firecracker, &jailer, &firecracker);
        let arguments = VmmArguments::new(VmmApiSocket::Enabled("/run/api.socket".into()));
        let jailer_arguments = jailer_arguments.chroot_base_dir(&base);
        let executor = JailedVmmExecutor::new(arguments, jailer_arguments, InJail)
            .command_modifier(EndWithTest);
        let init_method = InitMethod::ViaApiCalls;
        let configuration = VmConfiguration::New { init_method, data };
        let (resources, folder) = workshop.into_parts();
        let machine = Vm::prepare(executor, resources, installation, configuration);
        let mut machine = machine.await.unwrap();
        machine.start(PATIENCE).await.unwrap();
        let root = base.join("firecracker/jail-1/root");
        let pid = fs::read_to_string(root.join("firecracker.pid")).unwrap();
        Jailed {
            machine,
            monitor: Pid::from_raw(pid.parse().unwrap()),
            root,
            _folder: folder,
        }
    }

    /// Returns a line of the monitor's status (proc_pid_status(5)).
    fn status(&self, key: &str) -> Vec<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.monitor)).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let words = line.unwrap().trim_start_matches(':').split_whitespace();
        words.map(str::to_owned).collect()
    }

    /// Has the machine end, and removes its jail.
    async fn end(mut self) {
        let stop = VmShutdownAction {
            method: VmShutdownMethod::PauseThenKill,
            timeout: Some(PATIENCE),
            graceful: false,
        };
        // fctools treats it as an error if the process has ended before fctools waits for it.
        let _ = self.machine.shutdown([stop]).await;
        self.machine.cleanup().await.unwrap();
        assert!(!self.root.exists());
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        // A failing test leaves no daemon behind.
        let _ = kill(self.monitor, Signal::SIGKILL);
    }
}

fn jail() -> JailerArguments {
    JailerArguments::new(VmmId::new("jail-1").unwrap())
}

#[tokio::test]
async fn a_jailed_machine_sees_its_own_files_only_and_is_snapshot_into_its_jail() {
    require_kvm!();
    require_namespaces!();
    let mut jailed = Jailed::start(jail()).await;
    let mut output = jailed.machine.take_pipes().unwrap();
    read_until(&mut output.stdout, "PASS\n").await;
    let owner = OWNER.to_string();
    for key in ["Uid", "Gid"] {
        assert_eq!(jailed.status(key), [&*owner; 4], "{key}");
    }
    assert!(jailed.status("Groups").is_empty());
    assert_eq!(jailed.status("CapEff"), ["0000000000000000"]);
    assert_eq!(jailed.status("Seccomp"), ["2"]);
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", jailed.monitor)).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let environment = fs::read(format!("/proc/{}/environ", jailed.monitor)).unwrap();
    assert!(environment.is_empty());
    let limits = fs::read_to_string(format!("/proc/{}/limits", jailed.monitor)).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    assert!(files.unwrap().contains(" 2048 "), "{limits}");

    jailed.machine.pause().await.unwrap();
    let [snapshot, mem_file] = ["/state", "/memory"].map(|path| {
        let resources = jailed.machine.get_resource_system_mut();
        let resource = resources.create_resource(path, ResourceType::Produced);
        resource.unwrap()
    });
    let create = CreateSnapshot {
        snapshot_type: Some(SnapshotType::Full),
        snapshot,
        mem_file,
    };
    jailed.machine.create_snapshot(create).await.unwrap();
    for name in ["state", "memory", "run/api.socket"] {
        let metadata = fs::metadata(jailed.root.join(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (OWNER, OWNER), "{name}");
    }
    jailed.machine.resume().await.unwrap();
    jailed.end().await;
}

#[tokio::test]
async fn a_daemon_in_a_jail_has_groups_limits_and_namespaces_of_its_own() {
    require_kvm!();
    require_namespaces!();
    let (version, file, group) = match Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        true => (JailerCgroupVersion::V2, "cpu.weight", "/sys/fs/cgroup"),
        false => (JailerCgroupVersion::V1, "cpu.shares", "/sys/fs/cgroup/cpu"),
    };
    let parent = format!("bantam-test-{}", std::process::id());
    let group = Path::new(group).join(&parent);
    let arguments = jail()
        .daemonize()
        .exec_in_new_pid_ns()
        .cgroup_version(version)
        .cgroup(file, "300")
        .parent_cgroup(&*parent)
        .max_fd_limit(500)
        .max_file_size_limit(1 << 20);
    let jailed = Jailed::start(arguments).await;
    let own = std::process::id().to_string();
    assert_ne!(jailed.status("PPid"), [&*own]);
    assert_eq!(jailed.status("NSpid"), [&*jailed.monitor.to_string(), "1"]);
    let members = fs::read_to_string(group.join("jail-1/cgroup.procs")).unwrap();
    assert_eq!(members.trim(), jailed.monitor.to_string());
    let value = fs::read_to_string(group.join("jail-1").join(file)).unwrap();
    assert_eq!(value.trim(), "300");
    let limits = fs::read_to_string(format!("/proc/{}/limits", jailed.monitor)).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max open files"), "500");
    assert_eq!(limit("Max file size"), "1048576");
    let output = fs::read_link(format!("/proc/{}/fd/1", jailed.monitor)).unwrap();
    assert_eq!(output, Path::new("/dev/null"));
    jailed.end().await;
    // Who makes jails removes their groups, as with Firecracker.
    fs::remove_dir(group.join("jail-1")).unwrap();
    fs::remove_dir(group).unwrap();
}
