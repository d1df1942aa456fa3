//! `/snapshot`: takes a snapshot of the machine, and starts one from it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use bantam_vmm::config::is_same_file;
use bantam_vmm::{
    Error, Snapshot, SnapshotBase, SnapshotDisks, SnapshotFiles, SnapshotOptions, State,
};
use serde::Deserialize;

use crate::bodies::machine_config::HugePages;
use crate::configuration::Configuration;
use crate::fault::Fault;
use crate::instance::Instance;
use crate::json::parse_json;
use crate::method::Method;
use crate::request::Request;
use crate::resources::resource::Resource;
use crate::text::printable;

/// What the files of a snapshot are called in messages.
const SNAPSHOT_FILE: &str = "file of the snapshot";

pub(super) const RESOURCE: Resource = Resource {
    path: "snapshot",
    parse: |call| {
        let received = Instant::now();
        match (call.method, call.rest) {
            (Method::Put, ["create"]) => {
                let create: Create = call.json()?;
                let take = move |instance: &mut Instance| create.take(received, instance);
                Ok(Request::change(Method::Put, "snapshot_create", take))
            }
            (Method::Put, ["load"]) => {
                let load: Load = call.json()?;
                let memory = load.memory()?;
                let restore =
                    move |instance: &mut Instance| load.restore(memory, received, instance);
                Ok(Request::change(Method::Put, "snapshot_load", restore))
            }
            _ => Err(call.unknown()),
        }
    },
    groups: &[],
};

/// Body of `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    /// Which pages of memory are written.
    #[serde(default)]
    snapshot_type: SnapshotType,
    /// Where the state of the machine is written.
    snapshot_path: PathBuf,
    /// Where its memory is written.
    mem_file_path: PathBuf,
    /// Whether the files are on stable storage when the request is answered. They always are.
    #[serde(default, rename = "sync_snapshot_files")]
    _sync_snapshot_files: bool,
}

/// Which pages of memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum SnapshotType {
    /// All.
    #[default]
    Full,
    /// Those that have changed since the last snapshot that was taken or loaded.
    Diff,
}

/// Body of `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Load {
    /// The state of the machine.
    snapshot_path: PathBuf,
    /// Its memory, in place of [`Load::mem_backend`].
    #[serde(default)]
    mem_file_path: Option<PathBuf>,
    /// Where its memory comes from.
    #[serde(default)]
    mem_backend: Option<MemoryBackend>,
    /// Another name of [`Load::track_dirty_pages`].
    #[serde(default)]
    enable_diff_snapshots: bool,
    /// Whether pages that the guest writes are recorded, for snapshots of type `Diff`.
    #[serde(default)]
    track_dirty_pages: bool,
    /// Whether the machine goes on at once.
    #[serde(default)]
    resume_vm: bool,
    /// Other taps.
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    /// Another socket.
    #[serde(default)]
    vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock goes on as if the machine had run since the snapshot.
    #[serde(default)]
    clock_realtime: bool,
    /// Which pages guest memory is made of.
    #[serde(default)]
    huge_pages: LoadPages,
}

/// Where the memory of a snapshot comes from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryBackend {
    backend_type: BackendType,
    backend_path: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum BackendType {
    /// The memory file.
    File,
    /// A program that serves the page faults of the guest, which listens on a socket.
    Uffd,
}

/// A tap for a network interface of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkOverride {
    iface_id: String,
    host_dev_name: String,
}

/// A socket for the socket device of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockOverride {
    uds_path: PathBuf,
}

/// Which pages of the host the memory of a snapshot gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum LoadPages {
    /// Those that the machine had.
    #[default]
    Snapshot,
    /// Ordinary ones.
    None,
    /// Those that the host may make of ordinary ones.
    Transparent,
    /// Those of 2 MiB that the host has set aside.
    #[serde(rename = "2M")]
    TwoMib,
}

impl Create {
    fn take(self, received: Instant, instance: &Instance) -> Result<(), Fault> {
        let view = instance.view();
        view.require_started()?;
        let controller = view.controller();
        if matches!(controller.state(), State::Running | State::Resuming) {
            return Err(Fault::NotPaused);
        }
        let configuration = view.configuration();
        for path in [&self.snapshot_path, &self.mem_file_path] {
            configuration.check_output(SNAPSHOT_FILE, path)?;
        }
        if is_same_file(&self.snapshot_path, &self.mem_file_path) {
            return Err(Fault::Value {
                what: "mem_file_path",
                reason: "snapshot_path is the same file".to_string(),
            });
        }
        let (latency, base) = match self.snapshot_type {
            SnapshotType::Full => ("full_create_snapshot", None),
            SnapshotType::Diff => ("diff_create_snapshot", Some(SnapshotBase::Last)),
        };
        let options = SnapshotOptions {
            files: SnapshotFiles {
                state: self.snapshot_path,
                memory: self.mem_file_path,
            },
            base,
            // Clients copy the images themselves, as with Firecracker.
            disks: SnapshotDisks::Unprotected,
            stop: false,
            note: Some(note(&configuration)?),
        };
        view.timed(latency, received, || {
            let taken = controller.snapshot(options);
            taken.map_err(Fault::CreateSnapshot)
        })?;
        Ok(())
    }
}

impl Load {
    /// Returns where memory comes from.
    fn memory(&self) -> Result<MemoryBackend, Fault> {
        let refused = |message: &str| {
            Err(Fault::Body {
                field: String::new(),
                message: message.to_string(),
            })
        };
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(_), Some(_)) => refused(
                "too many fields: either `mem_backend` or `mem_file_path` exclusively is required",
            ),
            (None, None) => {
                refused("missing field: either `mem_backend` or `mem_file_path` is required")
            }
            (None, Some(path)) => Ok(MemoryBackend {
                backend_type: BackendType::File,
                backend_path: path.clone(),
            }),
            (Some(backend), None) => Ok(backend.clone()),
        }
    }

    fn restore(
        self,
        memory: MemoryBackend,
        received: Instant,
        instance: &mut Instance,
    ) -> Result<(), Fault> {
        if self.mem_file_path.is_some() || self.enable_diff_snapshots {
            instance.view().count_deprecated();
            tracing::warn!(
                "PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated."
            );
        }
        instance.require_loadable()?;
        let view = instance.view().clone();
        view.timed("load_snapshot", received, || {
            let failed = |fault| Fault::LoadSnapshot(Box::new(fault));
            let mut snapshot = open(&self.snapshot_path, &memory).map_err(failed)?;
            let configuration = configuration(&snapshot, instance).map_err(failed)?;
            let configuration = self.applied_to(configuration)?;
            if self.clock_realtime {
                snapshot.catch_up_clock();
            }
            let restored = instance.restore(&snapshot, configuration);
            restored.map_err(|fault| failed(of_memory(fault)))?;
            if self.resume_vm {
                let resumed = instance.controller().resume();
                resumed.map_err(Fault::ResumeSnapshot)?;
            }
            Ok(())
        })
    }

    /// Changes the configuration of a snapshot as this request wants it.
    fn applied_to(&self, mut configuration: Configuration) -> Result<Configuration, Fault> {
        for NetworkOverride {
            iface_id,
            host_dev_name,
        } in &self.network_overrides
        {
            let mut interfaces = configuration.network_interfaces.iter_mut();
            let interface = interfaces.find(|it| it.iface_id == *iface_id);
            let interface = interface.ok_or_else(|| Fault::NotInSnapshot {
                kind: "Network",
                what: format!("network interface '{}'", printable(iface_id)),
            })?;
            interface.host_dev_name.clone_from(host_dev_name);
        }
        if let Some(VsockOverride { uds_path }) = &self.vsock_override {
            let vsock = configuration.vsock.as_mut();
            let vsock = vsock.ok_or_else(|| Fault::NotInSnapshot {
                kind: "Vsock",
                what: "vsock".to_string(),
            })?;
            vsock.uds_path.clone_from(uds_path);
        }
        let machine = &mut configuration.machine_config;
        machine.track_dirty_pages = self.track_dirty_pages || self.enable_diff_snapshots;
        machine.huge_pages = match self.huge_pages {
            LoadPages::Snapshot => machine.huge_pages,
            LoadPages::None => HugePages::None,
            LoadPages::Transparent => HugePages::Transparent,
            LoadPages::TwoMib => HugePages::TwoMib,
        };
        Ok(configuration)
    }
}

/// Returns what a snapshot keeps of the configuration: as clients put it, with relative paths, which may lead to other files
/// where it is loaded. Log, metrics and serial port are those of the process.
fn note(configuration: &Configuration) -> Result<String, Fault> {
    let kept = Configuration {
        logger: None,
        metrics: None,
        serial: None,
        ..configuration.clone()
    };
    serde_json::to_string(&kept).map_err(|error| Fault::Value {
        what: "configuration",
        reason: error.to_string(),
    })
}

fn open(state: &Path, memory: &MemoryBackend) -> Result<Snapshot, Fault> {
    let path = &memory.backend_path;
    Ok(match memory.backend_type {
        BackendType::File => Snapshot::open_files(&SnapshotFiles {
            state: state.to_path_buf(),
            memory: path.clone(),
        })?,
        BackendType::Uffd => Snapshot::open_served(state, path)?,
    })
}

/// Says, as Firecracker does, that it is the memory that cannot be loaded, if that is why the machine cannot go on.
fn of_memory(fault: Fault) -> Fault {
    match fault {
        Fault::Machine(error) if is_of_memory(&error) => Fault::ServedMemory(error),
        fault => fault,
    }
}

fn is_of_memory(error: &Error) -> bool {
    match error {
        Error::Userfault(_) | Error::MemoryServer(_) => true,
        Error::Shared(error) => is_of_memory(error),
        _ => false,
    }
}

/// Returns the configuration that is kept in a snapshot, with the log, the metrics and the serial port of this process.
fn configuration(snapshot: &Snapshot, instance: &Instance) -> Result<Configuration, Fault> {
    let note = snapshot.note().ok_or(Fault::NotOfApi)?;
    let kept: Configuration = parse_json(note.as_bytes())?;
    let own = instance.view().configuration();
    Ok(Configuration {
        logger: own.logger.clone(),
        metrics: own.metrics.clone(),
        serial: own.serial.clone(),
        ..kept
    })
}
