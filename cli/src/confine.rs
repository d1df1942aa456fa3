//! What this process gives up before it runs a machine (`bantam_jail`).

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use bantam_jail::{Confined, Files, Filter, Networks, Role, Violation, process, report_violations};
use bantam_network::{Networks as HostNetworks, accounts};
use bantam_vmm::config::{GdbConfig, MachineConfig, NetEnd, Seccomp, SerialConfig};
use bantam_vmm::{PlaceKeeper, ThreadHook, ThreadRole, disk_files, host};
use nix::libc;

use crate::place_keeper;

/// The variables that the process keeps: how other programs and the time zone are found.
const KEPT_VARIABLES: [&str; 2] = ["PATH", "TZ"];
/// Variables of Bantam itself begin so.
const OWN_VARIABLES: &str = "BANTAM_";

/// The filters of this process, if it has any.
static FILTERS: OnceLock<Arc<Filters>> = OnceLock::new();

/// The process that takes places on networks of the host for this one, if there is one.
static PLACE_KEEPER: OnceLock<Arc<PlaceKeeper>> = OnceLock::new();

/// What a process that runs a machine can give up.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// What happens at a call that no thread makes.
    pub seccomp: Seccomp,
    /// What the machine needs of networks.
    pub networks: Networks,
    /// The files that the process can open; all if there are no bounds.
    pub files: Option<Files>,
    /// Whether the host may write a core dump of the process.
    pub coredump: bool,
    /// Whether other processes of the user may look into this one.
    pub is_visible: bool,
    /// The machine, if it has places on networks of the host that are taken by programs.
    pub with_places: Option<Box<MachineConfig>>,
}

impl Confinement {
    /// Gives up what a machine does not need. `others` are files that the process needs beside those of the
    /// configuration; with `None`, clients can name any file later.
    pub fn of_machine(config: &MachineConfig, others: Option<Files>) -> Confinement {
        let has_clients = others.is_none();
        let is_confined = config.landlock || config.seccomp != Seccomp::Off;
        // Other users get their places of a process of root.
        let takes_places =
            is_confined && has_host_network(config) && host::can_administer_network();
        let files = match others {
            _ if !config.landlock || enters_namespace_of_process(config) => None,
            None => Some(Files::all()),
            Some(others) => Some(of_machine(config, others)),
        };
        Confinement {
            seccomp: config.seccomp,
            networks: networks(config, has_clients),
            files,
            coredump: config.coredump,
            is_visible: config.coredump,
            with_places: takes_places.then(|| Box::new(config.clone())),
        }
    }

    /// Returns whether the process keeps a variable of its environment. A backtrace takes files, and memory that can be
    /// executed, which a filter refuses while a panic is reported.
    fn keeps(&self, name: &OsStr) -> bool {
        let bytes = name.as_encoded_bytes();
        bytes.starts_with(OWN_VARIABLES.as_bytes())
            || KEPT_VARIABLES.iter().any(|kept| name == *kept)
            || self.seccomp != Seccomp::Kill && name == "RUST_BACKTRACE"
    }

    /// Gives up all else, for good. The threads that are started from now on are confined with this one, the
    /// only one until now.
    pub fn enter(&self) -> anyhow::Result<()> {
        if let Some(config) = &self.with_places {
            // Only the first machine of a process confines it.
            let _ = PLACE_KEEPER.set(Arc::new(place_keeper::start(config)?));
        }
        // SAFETY: there is no other thread yet.
        unsafe { process::clear_environment(|name| self.keeps(name)) };
        if !self.coredump {
            process::refuse_core_dumps().context("cannot forbid core dumps")?;
        }
        if !self.is_visible {
            // The kernel shows it to nobody afterwards, not even to this process. It is missed only if it is needed.
            let _ = host::open_page_map();
            process::hide_memory().context("cannot hide the memory of this process")?;
        }
        if let Some(files) = &self.files {
            match files.confine()? {
                Confined::Fully => {}
                Confined::InPart => tracing::info!(
                    "this kernel has only a part of Landlock: the process can reach more than it should"
                ),
                Confined::NotAtAll => tracing::warn!(
                    "this kernel has no Landlock, or it is switched off: the process can open any file that its user may \
                     open (--landlock off ends this warning)"
                ),
            }
        }
        let violation = match self.seccomp {
            Seccomp::Kill => Violation::Kill,
            Seccomp::Log => Violation::Log,
            Seccomp::Off => return Ok(()),
        };
        if !Filter::are_available() {
            tracing::warn!(
                "this kernel has no filters of system calls (CONFIG_SECCOMP_FILTER), or does not allow them: the process \
                 can make any call (--seccomp off ends this warning)"
            );
            return Ok(());
        }
        report_violations()?;
        let filters = Filters {
            networks: self.networks,
            violation,
            compiled: Default::default(),
        };
        filters.apply(Role::Program)?;
        // Only the first machine of a process confines it.
        let _ = FILTERS.set(Arc::new(filters));
        Ok(())
    }
}

/// Confines the calling thread, which does this from now on, if the process is confined.
pub fn enter(role: Role) -> io::Result<()> {
    match FILTERS.get() {
        Some(filters) => filters.apply(role),
        None => Ok(()),
    }
}

/// Returns what takes the machine's places on networks of the host, if this process cannot do it.
pub fn place_keeper() -> Option<Arc<PlaceKeeper>> {
    PLACE_KEEPER.get().cloned()
}

/// Returns what confines the threads of machines, if the process is confined.
pub fn thread_hook() -> Option<Arc<dyn ThreadHook>> {
    FILTERS.get().map(|filters| filters.clone() as _)
}

/// The filters of all roles, each compiled when a thread needs it first.
struct Filters {
    networks: Networks,
    violation: Violation,
    compiled: [OnceLock<Filter>; Role::ALL.len()],
}

impl Filters {
    fn apply(&self, role: Role) -> io::Result<()> {
        let compile = || Filter::new(role, self.networks, self.violation);
        let filter = self.compiled[role as usize].get_or_init(compile);
        filter.apply().map_err(io::Error::other)
    }
}

impl ThreadHook for Filters {
    fn enter(&self, role: &ThreadRole) -> io::Result<()> {
        self.apply(match role {
            ThreadRole::Vcpu(_) => Role::Vcpu,
            ThreadRole::Devices | ThreadRole::Device(_) => Role::Devices,
            ThreadRole::Image(_) => Role::Image,
            ThreadRole::Job(_) => Role::Job,
            ThreadRole::Memory => Role::Memory,
            ThreadRole::Debugger => Role::Debugger,
            // A recorder, which writes a file: it is confined as the process is.
            _ => return Ok(()),
        })
    }
}

/// Returns whether a machine enters the network namespace that another process has. Landlock keeps a process from all that
/// `/proc` shows of others.
fn enters_namespace_of_process(config: &MachineConfig) -> bool {
    let mut namespaces = config.nets.iter().filter_map(|net| net.netns.as_ref());
    namespaces.any(|namespace| namespace.path().starts_with("/proc"))
}

/// Returns whether a machine has a place on a network of the host.
fn has_host_network(config: &MachineConfig) -> bool {
    let mut ends = config.nets.iter().map(|net| net.end());
    ends.any(|end| matches!(end, NetEnd::Host(_)))
}

/// Returns what a machine needs of networks. Clients of a control socket can have it moved to another host.
fn networks(config: &MachineConfig, has_clients: bool) -> Networks {
    let ends = || config.nets.iter().map(|net| net.end());
    Networks {
        user: ends().any(|end| end == NetEnd::User),
        interfaces: ends().any(|end| {
            matches!(
                end,
                NetEnd::Tap(_) | NetEnd::Descriptor(_) | NetEnd::Host(_)
            )
        }),
        namespace: config.nets.iter().any(|net| net.netns.is_some()),
        program: has_clients || matches!(config.gdb, Some(GdbConfig::Tcp(_))),
        streams: config.vsock.is_some() || ends().any(|end| matches!(end, NetEnd::Passt(_))),
        sockets: has_sockets(config),
    }
}

/// Returns whether a machine listens on Unix sockets.
fn has_sockets(config: &MachineConfig) -> bool {
    let channels = config.channels.iter().map(|channel| &channel.end);
    let mut ends = [&config.serial, &config.console]
        .into_iter()
        .chain(channels);
    ends.any(|end| matches!(end, SerialConfig::Socket(_)))
        || config.vsock.is_some()
        || matches!(config.gdb, Some(GdbConfig::Unix(_)))
}

/// Adds the files of a machine to `files`.
fn of_machine(config: &MachineConfig, mut files: Files) -> Files {
    for path in [
        "/dev/kvm",
        "/dev/net/tun",
        "/dev/userfaultfd",
        "/dev/ptmx",
        "/dev/pts",
    ] {
        files = files.write(path);
    }
    for path in [
        "/dev/urandom",
        "/dev/null",
        "/sys",
        "/proc/self",
        "/etc/localtime",
    ] {
        files = files.read(path);
    }
    files = files.read(&config.kernel);
    if let Some(initrd) = &config.initrd {
        files = files.read(initrd);
    }
    for disk in &config.disks {
        for path in disk_files(disk) {
            files = match disk.readonly || path != disk.path {
                true => files.read(path),
                false => files.write(path),
            };
        }
    }
    let channels = config.channels.iter().map(|channel| &channel.end);
    for end in [&config.serial, &config.console]
        .into_iter()
        .chain(channels)
    {
        match end {
            SerialConfig::File(path) => files = files.write(created(path)),
            SerialConfig::Socket(path) => files = files.folder(folder(path)),
            SerialConfig::Stdio | SerialConfig::Pty | SerialConfig::None => {}
        }
    }
    if let Some(vsock) = &config.vsock {
        files = files.folder(folder(&vsock.socket));
    }
    match &config.gdb {
        Some(GdbConfig::Unix(path)) => files = files.folder(folder(path)),
        Some(GdbConfig::Tcp(_)) => files = files.tcp(),
        None => {}
    }
    for net in &config.nets {
        if net.end() == NetEnd::User {
            // The name servers of the host, which can change.
            files = files.tcp();
            for path in [
                "/etc/resolv.conf",
                "/run/systemd/resolve",
                "/run/NetworkManager",
                "/run/resolvconf",
            ] {
                files = files.read(path);
            }
        }
        if let Some(namespace) = &net.netns {
            files = files.read(namespace.path());
        }
        if let NetEnd::Host(_) = net.end() {
            // What a user may use, and why not.
            for path in HostNetworks::of_host().folders() {
                files = files.read(path);
            }
            for path in [accounts::USERS, accounts::GROUPS] {
                files = files.read(path);
            }
        }
    }
    files
}

/// Creates a file if there is none, so that there can be a rule for it. If that fails, the machine will say why.
fn created(path: &Path) -> PathBuf {
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    let _ = options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    path.to_owned()
}

fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => ".".into(),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    }
}
