//! What Firecracker's `jailer` does for `firecracker`, for Bantam under that name: root starts a monitor as another user, in
//! a root folder that has nothing else, and if wanted in control groups and namespaces of its own.
//!
//! [`Jailer::enter`] turns the calling process into the monitor. Options, paths and their order of effects are those of
//! Firecracker's documentation of its jailer, so that programs that drive it find all where they look for it.

mod error;
mod limits;
mod process;
mod root;

use std::convert::Infallible;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bantam_cgroup::{enter_existing, enter_named};
use nix::unistd::{Gid, Uid, geteuid};

pub use bantam_cgroup::{FileValue, Version};
pub use error::Error;
pub use limits::{ResourceLimit, ResourceLimits};

/// Where the folders of jails are by default.
pub const DEFAULT_BASE: &str = "/srv/jailer";
/// What the name of the monitor's file has to contain, as with Firecracker.
const MONITOR: &str = "firecracker";

/// A monitor that is to be jailed.
#[derive(Clone, Debug)]
pub struct Jailer {
    /// The name of the jail: up to 64 letters, digits and dashes.
    pub id: String,
    /// The monitor: a static executable, which is copied into the jail under its name.
    pub exec_file: PathBuf,
    /// The user that the monitor runs as.
    pub uid: u32,
    /// The group that the monitor runs as.
    pub gid: u32,
    /// The folder that has the folders of jails.
    pub base: PathBuf,
    /// A network namespace that the monitor is in.
    pub network_namespace: Option<PathBuf>,
    /// Whether the monitor has a session of its own and no terminal, and the caller's process ends when it starts.
    pub daemonize: bool,
    /// Whether the monitor is the first process of a PID namespace; the caller's process ends when it starts.
    pub new_pid_namespace: bool,
    /// The control groups that the monitor is in.
    pub groups: Groups,
    /// What the monitor may use.
    pub limits: ResourceLimits,
    /// The monitor's own arguments.
    pub arguments: Vec<OsString>,
}

/// Control groups of a monitor.
#[derive(Clone, Debug)]
pub struct Groups {
    /// Which version of control groups.
    pub version: Version,
    /// The group that has the jail's group, by default one with the name of the monitor's file.
    pub parent: Option<PathBuf>,
    /// What the jail's group is told. Without any, the monitor stays in its group, or moves into the group `parent` of
    /// version 2 if that is given.
    pub values: Vec<FileValue>,
}

impl Jailer {
    /// Turns this process, which has one thread, into the monitor. With `daemonize` or `new_pid_namespace`, a process
    /// that it starts becomes the monitor, and this one exits. The file `NAME.pid` in the jail has the monitor's PID. All
    /// descriptors except the standard ones are closed.
    ///
    /// # Errors
    /// If this is not root's process, the monitor's name does not contain `firecracker`, or the host refuses a step. What was
    /// made by then stays.
    pub fn enter(self) -> Result<Infallible, Error> {
        let times = process::Times::now();
        let name = self.name()?.to_owned();
        if !geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        process::close_descriptors();
        let namespace = self.network_namespace.as_deref();
        let namespace = namespace.map(process::open_namespace).transpose()?;
        let root = root::Root::new(self.folder(&name));
        root.make()?;
        root.copy_monitor(&self.exec_file, &name)?;
        if let Some(namespace) = namespace {
            process::join(&namespace)?;
        }
        self.limits.apply()?;
        self.enter_groups(&name)?;
        let null = process::open_null()?;
        let fault_device = root::userfaultfd_number();
        root.enter()?;
        let owner = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        root::furnish(owner, fault_device)?;
        let spent = match self.daemonize {
            true => process::become_daemon(&null)?,
            false => std::time::Duration::ZERO,
        };
        process::run(&self, &name, owner, &times, spent)
    }

    /// Returns the folder that is the root of the monitor, outside the jail.
    fn folder(&self, name: &str) -> PathBuf {
        self.base.join(name).join(&self.id).join("root")
    }

    fn name(&self) -> Result<&str, Error> {
        let name = self.exec_file.file_name().and_then(|name| name.to_str());
        name.filter(|name| name.contains(MONITOR))
            .ok_or_else(|| Error::MonitorName {
                path: self.exec_file.clone(),
            })
    }

    fn enter_groups(&self, name: &str) -> Result<(), Error> {
        let Groups {
            version,
            parent,
            values,
        } = &self.groups;
        if let (Version::Two, Some(parent), true) = (version, parent, values.is_empty()) {
            return Ok(enter_existing(parent)?);
        }
        let parent = parent.as_deref().unwrap_or(Path::new(name));
        Ok(enter_named(*version, &parent.join(&self.id), values)?)
    }
}
