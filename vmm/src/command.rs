//! What may be asked of a machine, in which states, and the answers.

use std::time::Duration;

use bantam_devices::virtio::owner::{DeviceAnswer, DeviceCommand};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{DeviceName, MachineConfig};
use crate::state::State;

/// What can be asked of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Says what the machine is made of, in place of what was said before. Before the start only.
    Configure(Box<MachineConfig>),
    /// Builds the machine and lets its vCPUs run. A machine that cannot be built stays configured; one for
    /// whose vCPUs the host has no threads has ended.
    Start,
    /// Takes the vCPUs out of the guest.
    Pause,
    /// Lets paused vCPUs go on.
    Resume,
    /// Presses the ACPI power button: a guest that listens to it shuts itself down, in its own time.
    PressPowerButton,
    /// Presses Ctrl-Alt-Del on the keyboard: a guest with a driver for it reboots, or does what it is
    /// set up to do then.
    PressCtrlAltDel,
    /// Asks the guest to shut itself down, and ends the machine as [`Command::Stop`] does if it has not by
    /// then. The guest is asked by the ACPI power button if it takes that interrupt, otherwise by
    /// Ctrl-Alt-Del if it has enabled its keyboard; one that listens to neither, and a machine that does
    /// not run, is stopped at once. Asking again presses again, and the earlier end counts.
    ShutDown {
        /// How long the guest may take.
        timeout: Duration,
    },
    /// Ends the machine as if its power were cut: what the guest has not flushed is lost to it, but no
    /// request is left half done. A machine that has ended stays as it is.
    Stop,
    /// Asks for the state.
    Query,
    /// Asks for the configuration with all changes since the start: a machine that is made by it is like this
    /// one.
    Configuration,
    /// Changes a device or asks it something.
    Device {
        /// Its name in the configuration, or that of its kind.
        name: DeviceName,
        /// What is asked of it.
        command: DeviceCommand,
    },
    /// Puts other metadata in the place of what the guest is told.
    PutMetadata(Value),
    /// Changes the metadata by a merge patch (RFC 7396).
    PatchMetadata(Value),
    /// Asks for the metadata.
    Metadata,
    /// Asks for the counters.
    Metrics,
}

/// What [`Command::ShutDown`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutDown {
    /// It has pressed the power button.
    PowerButton,
    /// It has pressed Ctrl-Alt-Del.
    CtrlAltDel,
    /// There was nobody to ask, or no time: it has cut the power.
    PowerCut,
}

/// What a command gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// To [`Command::Query`].
    State(State),
    /// To [`Command::ShutDown`].
    ShutDown(ShutDown),
    /// To [`Command::Configuration`].
    Configuration(Box<MachineConfig>),
    /// To [`Command::Device`].
    Device(DeviceAnswer),
    /// To [`Command::Metadata`]; none where nothing was put yet.
    Metadata(Option<Value>),
    /// To [`Command::Metrics`]: what [`MachineMetrics`](crate::MachineMetrics) serializes to.
    Metrics(Value),
}

#[cfg(test)]
mod tests;
