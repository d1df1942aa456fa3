//! Control groups of the host (cgroups(7)) that limit what a process may use.
//!
//! [`ControlGroup::enter`] makes a group for the calling process, with [`Limits`], and moves the process into it. Both versions
//! of control groups will do: each controller is used where the host has mounted it.
//!
//! With version 1 the group is below the one that the process is in. With version 2, a group that has processes cannot limit
//! groups below it, so the new one is below the nearest group above the process that can. A group in which only this process
//! and its parent are is made such a group: both move into the new one.
//!
//! A monitor that is jailed as Firecracker's is enters a group by [`enter_named`] instead.
//!
//! [`ControlGroup::leave`] removes the group. One whose process was killed is empty, and is removed by [`remove`].

#![forbid(unsafe_code)]

mod host;
mod limits;
mod named;

use std::fs;
use std::io;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process;

pub use host::Version;
use host::{Hierarchy, Host};
use limits::Setting;
pub use limits::{CpuQuota, Limits};
pub use named::{FileValue, enter_existing, enter_named};

/// The file that lists the processes of a group, and takes those that move into it.
const PROCESSES: &str = "cgroup.procs";
/// The file that says which controllers limit the groups below a group of version 2.
const SUBTREE: &str = "cgroup.subtree_control";

/// Why a process cannot be limited: one line with the reason and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel does not say which groups there are.
    #[error("cannot read '{}': {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host has not mounted a controller.
    #[error(
        "the host has no control groups with the controller '{controller}'; mount them (cgroup2), or remove the limit"
    )]
    NoController {
        /// The controller.
        controller: String,
    },
    /// A group is not below the root of its hierarchy.
    #[error("the control group '{}' must be a path below the root of the groups, without '..'", path.display())]
    Outside {
        /// Its path.
        path: PathBuf,
    },
    /// This process may not make a group.
    #[error(
        "cannot make a control group in '{}': {source}; be root, or in a group that is delegated to you (systemd-run --user \
         --scope --property=Delegate=yes ...), or remove the limits",
        parent.display()
    )]
    Refused {
        /// The group in which it was to be.
        parent: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel does not take a limit.
    #[error("cannot write '{value}' into '{}': {source}", path.display())]
    Limit {
        /// The file of the limit.
        path: PathBuf,
        /// The limit.
        value: String,
        /// Why not.
        source: io::Error,
    },
}

/// The groups of one process: one in each hierarchy that has a controller for its limits.
#[derive(Debug)]
pub struct ControlGroup {
    /// Where the process was before.
    host: Host,
    folders: Vec<PathBuf>,
}

impl ControlGroup {
    /// Makes groups called `name` with `limits`, and moves this process into them. `note` is told the folder of each before
    /// it is made, so that another process can remove it if this one is killed.
    ///
    /// # Errors
    /// If the host has no control groups with a controller that is needed, or does not let this process make one, or `note`
    /// fails; then nothing is left.
    pub fn enter(
        name: &str,
        limits: &Limits,
        note: &mut dyn FnMut(&Path) -> io::Result<()>,
    ) -> Result<ControlGroup, Error> {
        let host = Host::read()?;
        let plan = host.plan(limits)?;
        let mut group = ControlGroup {
            host,
            folders: Vec::new(),
        };
        for (hierarchy, settings) in plan {
            let made = match hierarchy.version {
                Version::One => {
                    let own = hierarchy.own();
                    make(&own, &own, name, &settings, note)
                }
                Version::Two => make_where_possible(&hierarchy, name, &settings, note),
            };
            match made {
                Ok(folder) => group.folders.push(folder),
                Err(error) => {
                    // The first error says more.
                    let _ = group.leave();
                    return Err(error);
                }
            }
        }
        Ok(group)
    }

    /// Moves the process back to where it was, and removes the groups.
    ///
    /// # Errors
    /// If the kernel refuses it, as for a process that was in the group above: that cannot have processes any more.
    pub fn leave(self) -> io::Result<()> {
        for folder in &self.folders {
            let mut hierarchies = self.host.hierarchies();
            if let Some(former) = hierarchies.find(|it| folder.starts_with(&it.mount)) {
                join(&former.own(), process::id())?;
            }
            remove(folder)?;
        }
        Ok(())
    }
}

/// Removes a group without processes, if it exists.
///
/// # Errors
/// If it has processes, or this process may not remove it.
pub fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes a group of version 2 in the nearest group that can have it.
fn make_where_possible(
    hierarchy: &Hierarchy,
    name: &str,
    settings: &[Setting],
    note: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<PathBuf, Error> {
    let own = hierarchy.own();
    let mut first_error = None;
    for parent in own.ancestors() {
        match make(parent, &own, name, settings, note) {
            // No other group would take it.
            Err(error @ Error::Limit { .. }) => return Err(error),
            Err(error) => {
                first_error.get_or_insert(error);
            }
            made => return made,
        }
        if parent == hierarchy.mount {
            break;
        }
    }
    Err(first_error.unwrap_or(Error::Refused {
        parent: own,
        source: io::ErrorKind::NotFound.into(),
    }))
}

/// Makes a group with limits in `parent`, and moves this process into it, or leaves it in `own`, its group.
fn make(
    parent: &Path,
    own: &Path,
    name: &str,
    settings: &[Setting],
    note: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<PathBuf, Error> {
    let refused = |source| Error::Refused {
        parent: parent.into(),
        source,
    };
    let folder = parent.join(name);
    note(&folder).map_err(refused)?;
    fs::create_dir(&folder).map_err(refused)?;
    let made = enable(parent, &folder, settings)
        .map_err(refused)
        .and_then(|()| limit(&folder, settings))
        .and_then(|()| join(&folder, process::id()).map_err(refused));
    if made.is_err() {
        // The first error says more.
        let _ = join(own, process::id()).and_then(|()| remove(&folder));
    }
    made.map(|()| folder)
}

/// Has the controllers of `settings` limit `folder`, which is in `parent`. With version 1 they do.
fn enable(parent: &Path, folder: &Path, settings: &[Setting]) -> io::Result<()> {
    let subtree = parent.join(SUBTREE);
    let enabled = match fs::read_to_string(&subtree) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text?,
    };
    let missing: Vec<_> = settings
        .iter()
        .filter(|setting| {
            !enabled
                .split_whitespace()
                .any(|it| it == setting.controller)
        })
        .map(|setting| format!("+{}", setting.controller))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.join(" ");
    match fs::write(&subtree, &missing) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        result => return result,
    }
    // The group has processes itself, which is refused unless they are this one and the command that waits for it.
    let processes = fs::read_to_string(parent.join(PROCESSES))?;
    let own = [process::id(), parent_id()];
    let processes: Vec<u32> = processes.lines().flat_map(str::parse).collect();
    if processes.iter().any(|it| !own.contains(it)) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    for process in &processes {
        join(folder, *process)?;
    }
    let enabled = fs::write(&subtree, &missing);
    if enabled.is_err() {
        // The first error says more.
        let _ = processes.iter().try_for_each(|it| join(parent, *it));
    }
    enabled
}

/// Writes the limits of a group.
fn limit(folder: &Path, settings: &[Setting]) -> Result<(), Error> {
    for setting in settings {
        let path = folder.join(setting.file);
        let value = setting.value.clone();
        fs::write(&path, &value).map_err(|source| Error::Limit {
            path,
            value,
            source,
        })?;
    }
    Ok(())
}

/// Moves a process into a group.
fn join(folder: &Path, process: u32) -> io::Result<()> {
    fs::write(folder.join(PROCESSES), process.to_string())
}

#[cfg(test)]
mod tests;
