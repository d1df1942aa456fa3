//! What may be asked of a machine, in which states, and the answers.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bantam_devices::rate_limiter::Limits;
use bantam_devices::virtio::balloon::{BalloonStatistics, HintingCommand};
use bantam_devices::virtio::net::NetLimits;
use serde_json::Value;

use crate::config::MachineConfig;
use crate::console::Console;
use crate::metrics::MachineMetrics;
use crate::state::State;

/// What can be asked of a machine.
#[derive(Debug)]
pub enum Command {
    /// Says what the machine is made of, in place of what was said before. `console` is the program's
    /// end of what is configured as `stdio`: serial port, console or a channel. Before the start only.
    Configure {
        /// What the machine is made of.
        config: Box<MachineConfig>,
        /// The program's end.
        console: Console,
    },
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
    /// Looks how large the image of a disk is now, and lets the guest know if that has changed.
    UpdateDiskSize {
        /// Which disk, counted from zero as in the configuration.
        disk: usize,
    },
    /// Puts another image in the place of that of a disk, with the same cache mode, and lets the guest
    /// know. Of the image that is there already, the size is looked at anew.
    ReplaceDisk {
        /// Which disk, counted from zero as in the configuration.
        disk: usize,
        /// The other image.
        path: PathBuf,
    },
    /// Sets other limits of a disk.
    SetDiskLimits {
        /// Which disk, counted from zero as in the configuration.
        disk: usize,
        /// The limits.
        limits: Limits,
    },
    /// Sets other limits of a network device.
    SetNetworkLimits {
        /// Which network device, counted from zero as in the configuration.
        network: usize,
        /// The limits.
        limits: NetLimits,
    },
    /// Tells the guest that its virtio console has this size in characters; 0 stands for a size that is
    /// not known.
    ResizeConsole {
        /// Characters of a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Asks the guest to give up so much memory in all. It does so in its own time and as far as it can.
    SetBalloonTarget {
        /// How much in MiB.
        mib: u32,
    },
    /// Changes how often the guest is asked for statistics of its memory, and asks it for the first.
    SetBalloonInterval {
        /// How often.
        seconds: NonZeroU32,
    },
    /// Asks the guest which memory it does not use (free page hinting), or lets it use all of it again.
    HintBalloon(HintingCommand),
    /// Asks for the size of the balloon, and what the guest said last of its memory.
    BalloonStatistics,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutDown {
    /// It has pressed the power button.
    PowerButton,
    /// It has pressed Ctrl-Alt-Del.
    CtrlAltDel,
    /// There was nobody to ask, or no time: it has cut the power.
    PowerCut,
}

/// What a command gives.
#[derive(Debug)]
pub enum Answer {
    /// It is done.
    Done,
    /// To [`Command::Query`].
    State(State),
    /// To [`Command::ShutDown`].
    ShutDown(ShutDown),
    /// To [`Command::UpdateDiskSize`]: the size in bytes.
    DiskSize(u64),
    /// To [`Command::BalloonStatistics`].
    BalloonStatistics(Box<BalloonStatistics>),
    /// To [`Command::Metadata`]; none where nothing was put yet.
    Metadata(Option<Value>),
    /// To [`Command::Metrics`].
    Metrics(Arc<MachineMetrics>),
}
