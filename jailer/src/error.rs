//! Why a monitor cannot be jailed.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why a monitor cannot be jailed: one line with the reason and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller is not root.
    #[error("only root can make a jail; as another user, start the monitor without the jailer")]
    NotRoot,
    /// The monitor's file has a name that Firecracker's jailer would not take either.
    #[error(
        "the name of '{}' must contain 'firecracker'; make a link to bantam of that name",
        path.display()
    )]
    MonitorName {
        /// The file.
        path: PathBuf,
    },
    /// A resource cannot be limited.
    #[error("cannot limit {resource} to {value}: {source}")]
    Limit {
        /// The resource.
        resource: &'static str,
        /// The limit.
        value: u64,
        /// Why not.
        source: Errno,
    },
    /// A control group cannot be entered.
    #[error(transparent)]
    Group(#[from] bantam_cgroup::Error),
    /// The host refuses a step with a file.
    #[error("cannot {action} '{}': {source}", path.display())]
    File {
        /// The step.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host refuses a step of the process itself.
    #[error("cannot {action}: {source}")]
    Process {
        /// The step.
        action: &'static str,
        /// Why not.
        source: Errno,
    },
}

impl Error {
    pub(crate) fn file<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Error {
        let path = path.into();
        move |source| Error::File {
            action,
            path,
            source: source.into(),
        }
    }

    pub(crate) fn process(action: &'static str) -> impl FnOnce(Errno) -> Error {
        move |source| Error::Process { action, source }
    }
}
