//! What goes wrong with named machines.

use std::fmt::Display;
use std::io;
use std::path::Path;

use bantam_control::ControlError;
use bantam_vmm::config::ConfigError;

use crate::name::{MachineName, NameError};

/// Why a command to a named machine has failed: one line with the reason and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A text is not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is no machine of that name.
    #[error("there is no machine '{name}'; `bantam list --all` shows those that there are")]
    NotFound {
        /// The name.
        name: MachineName,
    },
    /// There is a machine of that name, or of one that differs only by case.
    #[error("there is a machine '{found}' already; choose another name, or undefine it first")]
    Exists {
        /// The name of the machine that is there.
        found: String,
    },
    /// The machine runs, and must not for this.
    #[error("cannot {action} machine '{name}': it is running; {remedy}")]
    Running {
        /// What was to be done.
        action: &'static str,
        /// The machine.
        name: MachineName,
        /// What to do.
        remedy: String,
    },
    /// The machine does not run, and must for this.
    #[error(
        "cannot {action} machine '{name}': it is not running; start it first (bantam start {name})"
    )]
    NotRunning {
        /// What was to be done.
        action: &'static str,
        /// The machine.
        name: MachineName,
    },
    /// Another command is at work on the machine.
    #[error(
        "cannot {action} machine '{name}': {holder} is at work on it; try again when that is done"
    )]
    Busy {
        /// What was to be done.
        action: &'static str,
        /// The machine.
        name: MachineName,
        /// The other command, and its process.
        holder: String,
    },
    /// The machine's process did not get it to run.
    #[error("cannot start machine '{name}': {reason}")]
    Start {
        /// The machine.
        name: MachineName,
        /// Why not.
        reason: String,
    },
    /// The guest of the machine cannot be asked to reboot.
    #[error(
        "cannot reboot machine '{name}': it is paused, or its guest listens neither to the power button nor to \
         Ctrl-Alt-Del, or not yet; try again later, or reset it (bantam reset {name})"
    )]
    Unheard {
        /// The machine.
        name: MachineName,
    },
    /// The machine has not done in time what it was asked for.
    #[error("machine '{name}' {state}; {remedy}")]
    Late {
        /// The machine.
        name: MachineName,
        /// What it still does, or has not done.
        state: String,
        /// What to do.
        remedy: String,
    },
    /// The machine's process cannot be reached, or has refused a command.
    #[error("cannot {action} machine '{name}': {source}")]
    Control {
        /// What was to be done.
        action: &'static str,
        /// The machine.
        name: MachineName,
        /// Why not.
        source: ControlError,
    },
    /// The machine file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Something cannot be done, for a reason that no other variant has.
    #[error("cannot {action} machine '{name}': {reason}")]
    Refused {
        /// What was to be done.
        action: &'static str,
        /// The machine.
        name: MachineName,
        /// Why not, and what to do.
        reason: String,
    },
    /// A part of the monitor has refused something, such as a snapshot that is damaged.
    #[error(transparent)]
    Machine(#[from] bantam_vmm::Error),
    /// A disk image cannot be made or opened.
    #[error("cannot make disk image '{path}': {reason}")]
    Image {
        /// The image.
        path: String,
        /// Why not.
        reason: String,
    },
    /// Something cannot be done with an image that is kept for machines.
    #[error("cannot {action} image '{name}': {reason}")]
    Store {
        /// What was to be done.
        action: &'static str,
        /// The image.
        name: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The machine's process cannot be limited.
    #[error(transparent)]
    ControlGroup(#[from] bantam_cgroup::Error),
    /// There is something wrong with what cloud-init is to be told.
    #[error(transparent)]
    Seed(#[from] bantam_seed::Error),
    /// The host has refused an operation.
    #[error("cannot {action}: {source}")]
    Io {
        /// The operation and its object.
        action: String,
        /// Why it was refused.
        source: io::Error,
    },
}

impl Error {
    /// Returns a function that makes an error of a failed operation, such as `create`, on a file.
    pub(crate) fn file(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        Error::io(format!("{verb} '{}'", path.display()))
    }

    /// Returns a function that makes an error of a failed operation.
    pub(crate) fn io(action: impl Display) -> impl FnOnce(io::Error) -> Error {
        let action = action.to_string();
        move |source| Error::Io { action, source }
    }
}
