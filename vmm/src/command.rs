//! The commands that a machine executes, the states that allow them, and the answers.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bantam_devices::virtio::owner::{DeviceAnswer, DeviceCommand};
use bantam_migration::Address as MigrationAddress;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{DeviceName, MachineConfig};
use crate::controller::{Migrated, MigrationOptions, MigrationProgress};
use crate::snapshot::{SnapshotDisks, SnapshotOptions, SnapshotTaken};
use crate::state::State;

/// A command to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Sets the configuration, replacing any earlier one. Allowed only before the start.
    Configure(Box<MachineConfig>),
    /// Builds the machine and runs its vCPUs. If it cannot be built, it stays configured; if its threads
    /// cannot be started, it has ended.
    Start,
    /// Takes the vCPUs out of the guest, and brings the devices to rest.
    Pause,
    /// Lets the devices and vCPUs of a paused machine go on.
    Resume,
    /// Presses the ACPI power button: a guest that listens to it shuts itself down, in its own time.
    PressPowerButton,
    /// Presses Ctrl-Alt-Del on the keyboard: a guest with a driver for it reboots, or does whatever it is
    /// configured to do in response.
    PressCtrlAltDel,
    /// Asks the guest to shut itself down, and ends the machine as [`Command::Stop`] does if the guest has
    /// not done so when the time is over. The guest is asked by the ACPI power button if it takes that
    /// interrupt, otherwise by Ctrl-Alt-Del if it has enabled its keyboard. If it listens to neither or is paused,
    /// the machine is stopped at once if there is a time, and otherwise goes on. A machine without a guest is stopped.
    /// Asking again presses again, and the earliest deadline counts.
    ShutDown {
        /// How long the guest may take. Without it, the guest has all the time that it needs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout: Option<Duration>,
    },
    /// Ends the machine as if its power were cut: the guest loses what it has not written out, but no
    /// request is left half done. A machine that has ended stays as it is.
    Stop,
    /// Asks for the state.
    Query,
    /// Asks for the configuration with all changes since the start. A machine built from it is like this one.
    Configuration,
    /// Changes a device or asks it something.
    Device {
        /// Its name in the configuration, or the name of its kind.
        name: DeviceName,
        /// The command to the device.
        command: DeviceCommand,
    },
    /// Takes a snapshot of disks, all at one instant: each goes on with a new qcow2 image whose backing file is the
    /// image that the disk had, and which stays as it is. If this is not possible for one of them, all keep their
    /// images.
    SnapshotDisks(Vec<DiskSnapshot>),
    /// Takes a snapshot of the machine: files from which another goes on. The machine is paused meanwhile.
    Snapshot(Box<SnapshotOptions>),
    /// Takes a snapshot of the machine that is kept in memory, for other machines of this host that share it. The machine
    /// is paused meanwhile, but not while most of its memory is copied.
    Fork(SnapshotDisks),
    /// Moves the machine to another process or host, and ends it here. It runs meanwhile, but for moments.
    Migrate(Box<MigrationOrder>),
    /// Ends the migration that is under way: the machine goes on where it is.
    CancelMigration,
    /// Asks how far the migration is that is under way.
    MigrationProgress,
    /// Lets a machine go on of which nobody knows whether it was moved. Only for someone who has made sure that it was not.
    TakeBack,
    /// Replaces the metadata that the guest is told.
    PutMetadata(Value),
    /// Changes the metadata by a merge patch (RFC 7396).
    PatchMetadata(Value),
    /// Asks for the metadata.
    Metadata,
    /// Asks for the counters.
    Metrics,
}

/// Where a machine is moved, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrationOrder {
    /// The address at which it is received.
    pub destination: MigrationAddress,
    /// Whether its memory may cross a network where others can read and change it.
    #[serde(default)]
    pub insecure: bool,
    /// Whether the other end is only asked if it could run the machine, which stays here. The answer is [`Answer::Done`].
    #[serde(default)]
    pub dry_run: bool,
    /// How it is moved.
    #[serde(default)]
    pub options: MigrationOptions,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskSnapshot {
    /// The disk's name.
    pub disk: DeviceName,
    /// Where the new image is made. There must be no file.
    pub path: PathBuf,
}

/// What [`Command::Fork`] has done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Forked {
    /// For how long the guest did not run.
    pub paused_for: Duration,
    /// The snapshot. A control socket passes it beside the answer.
    #[serde(skip)]
    pub snapshot: ForkDescriptors,
}

/// The descriptors of a fork, from which [`Snapshot::from_descriptors`](crate::Snapshot::from_descriptors) opens it.
#[derive(Debug, Clone, Default)]
pub struct ForkDescriptors(pub Vec<Arc<OwnedFd>>);

impl PartialEq for ForkDescriptors {
    fn eq(&self, other: &ForkDescriptors) -> bool {
        let numbers =
            |it: &ForkDescriptors| it.0.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
        numbers(self) == numbers(other)
    }
}

impl Eq for ForkDescriptors {}

/// What [`Command::ShutDown`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutDown {
    /// It has pressed the power button.
    PowerButton,
    /// It has pressed Ctrl-Alt-Del.
    CtrlAltDel,
    /// It has cut the power, because the guest cannot be asked or was given no time.
    PowerCut,
    /// It has done nothing, because the guest cannot be asked: it listens to neither, or is paused.
    Unheard,
}

/// What a command returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// Answers [`Command::Query`].
    State(State),
    /// Answers [`Command::ShutDown`].
    ShutDown(ShutDown),
    /// Answers [`Command::Configuration`].
    Configuration(Box<MachineConfig>),
    /// Answers [`Command::Device`].
    Device(DeviceAnswer),
    /// Answers [`Command::SnapshotDisks`].
    Snapshot {
        /// For how long requests to the disks had to wait.
        held_up: Duration,
    },
    /// Answers [`Command::Snapshot`].
    SnapshotTaken(SnapshotTaken),
    /// Answers [`Command::Fork`].
    Forked(Forked),
    /// Answers [`Command::Migrate`].
    Migrated(Migrated),
    /// Answers [`Command::MigrationProgress`]; `None` if there is no migration under way.
    MigrationProgress(Option<MigrationProgress>),
    /// Answers [`Command::Metadata`]; `None` if no metadata has been set yet.
    Metadata(Option<Value>),
    /// Answers [`Command::Metrics`] with what [`MachineMetrics`](crate::MachineMetrics) serializes to.
    Metrics(Value),
}

#[cfg(test)]
mod tests;
