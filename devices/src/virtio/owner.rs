//! What the owner of a machine can do with its virtio devices while the guest uses them.

use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::balloon::BalloonHandle;
pub use super::balloon::{
    BalloonError, BalloonMetrics, BalloonStatistics, GuestStatistics, HintingCommand, HintingStatus,
};
use super::block::BlockHandle;
pub use super::block::{BlockMetrics, ReplaceError};
use super::console::ConsoleHandle;
pub use super::console::ConsoleMetrics;
use super::net::NetHandle;
pub use super::net::{NetLimits, NetMetrics};
pub use super::rng::EntropyMetrics;
pub use super::vsock::VsockMetrics;
use crate::disk::{DiskError, DiskFile, DiskOptions};
use crate::opener::{FileAccess, Opener};
use crate::rate_limiter::Limits;

/// What can be asked of a device. Each is for the devices of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceCommand {
    /// Looks how large the image of a disk is now, and lets the guest know if that has changed.
    UpdateSize,
    /// Puts another image in the place of a disk's, with the same cache mode, and lets the guest know. If that
    /// image is there already, its size is looked at anew. Requests that are under way are finished first.
    ReplaceImage {
        /// The other image.
        path: PathBuf,
    },
    /// Sets other limits of a disk. A limit that is the same as before keeps its fill level; any other begins with
    /// a full bucket.
    SetLimits(Limits),
    /// Sets other limits of a network device, otherwise like [`DeviceCommand::SetLimits`].
    SetNetLimits(NetLimits),
    /// Tells the guest the size of a console in characters; 0 stands for a size that is not known.
    ResizeConsole {
        /// Characters of a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Asks the guest to give up this much memory in all. It does so in its own time and as far as it can.
    SetBalloonTarget {
        /// How much in MiB.
        mib: u32,
    },
    /// Changes how often the guest is asked for statistics of its memory, and asks it for the first.
    SetStatisticsInterval {
        /// How often.
        seconds: NonZeroU32,
    },
    /// Asks the guest which memory it does not use (free page hinting), or lets it use all of it again.
    Hint(HintingCommand),
    /// Asks for the size of a balloon, and what the guest said last of its memory.
    BalloonStatistics,
}

impl DeviceCommand {
    /// The kind of device that it is for.
    fn kind(&self) -> &'static str {
        match self {
            DeviceCommand::UpdateSize
            | DeviceCommand::ReplaceImage { .. }
            | DeviceCommand::SetLimits(_) => "a disk",
            DeviceCommand::SetNetLimits(_) => "a network device",
            DeviceCommand::ResizeConsole { .. } => "a console",
            DeviceCommand::SetBalloonTarget { .. }
            | DeviceCommand::SetStatisticsInterval { .. }
            | DeviceCommand::Hint(_)
            | DeviceCommand::BalloonStatistics => "a balloon",
        }
    }
}

/// What a device gives for a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceAnswer {
    /// It is done.
    Done,
    /// To [`DeviceCommand::UpdateSize`]: the size in bytes.
    Size(u64),
    /// To [`DeviceCommand::BalloonStatistics`].
    Balloon(Box<BalloonStatistics>),
}

/// Why a device cannot do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The command is for devices of another kind.
    #[error("it is not {kind}")]
    Kind {
        /// Of which, with an article.
        kind: &'static str,
    },
    /// The new size of a disk cannot be used; the disk keeps the one it has.
    #[error("cannot change the size of disk '{path}': {source}", path = .path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The new image of a disk cannot be used; the disk keeps the one it has.
    #[error(transparent)]
    Image(#[from] DiskError),
    /// A disk cannot be replaced.
    #[error(transparent)]
    Replace(#[from] ReplaceError),
    /// The host refuses to set a timer for the limits.
    #[error("cannot set a timer for its limits: {0}")]
    Limits(#[source] io::Error),
    /// The balloon cannot be as it is wanted.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
}

impl DeviceError {
    /// Whether what was asked for is done all the same: another image is in place, though what was written to the
    /// one before could not be brought to stable storage.
    pub fn is_done(&self) -> bool {
        matches!(self, DeviceError::Replace(ReplaceError::Flush { .. }))
    }
}

/// A handle to a device, for the owner of its machine.
pub enum DeviceHandle {
    /// To a disk.
    Disk(BlockHandle),
    /// To a network device.
    Net(NetHandle),
    /// To a console, or a device of channels.
    Console(ConsoleHandle),
    /// To a balloon.
    Balloon(BalloonHandle),
    /// To the socket device, which only counts.
    Vsock(Arc<VsockMetrics>),
    /// To the entropy device, which only counts.
    Entropy(Arc<EntropyMetrics>),
}

/// The counters of one device. They serialize as their totals, beside the `kind` of the device.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum DeviceMetrics {
    /// Of a disk.
    Block(Arc<BlockMetrics>),
    /// Of a network device.
    Net(Arc<NetMetrics>),
    /// Of the socket device.
    Vsock(Arc<VsockMetrics>),
    /// Of a console, or of all channels of a device together.
    Console(Arc<ConsoleMetrics>),
    /// Of the entropy device.
    Entropy(Arc<EntropyMetrics>),
    /// Of a balloon.
    Balloon(Arc<BalloonMetrics>),
}

impl DeviceHandle {
    /// What the device counts.
    pub fn metrics(&self) -> DeviceMetrics {
        match self {
            DeviceHandle::Disk(disk) => DeviceMetrics::Block(disk.metrics().clone()),
            DeviceHandle::Net(net) => DeviceMetrics::Net(net.metrics().clone()),
            DeviceHandle::Console(console) => DeviceMetrics::Console(console.metrics().clone()),
            DeviceHandle::Balloon(balloon) => DeviceMetrics::Balloon(balloon.metrics().clone()),
            DeviceHandle::Vsock(metrics) => DeviceMetrics::Vsock(metrics.clone()),
            DeviceHandle::Entropy(metrics) => DeviceMetrics::Entropy(metrics.clone()),
        }
    }

    /// Does what `command` says, with files that `opener` opens.
    ///
    /// # Errors
    /// As [`DeviceError`] says.
    pub fn execute(
        &self,
        command: DeviceCommand,
        opener: &dyn Opener,
    ) -> Result<DeviceAnswer, DeviceError> {
        match (self, command) {
            (DeviceHandle::Disk(disk), DeviceCommand::UpdateSize) => {
                return update_size(disk).map(DeviceAnswer::Size);
            }
            (DeviceHandle::Disk(disk), DeviceCommand::ReplaceImage { path }) => {
                replace_image(disk, &path, opener)?;
            }
            (DeviceHandle::Disk(disk), DeviceCommand::SetLimits(limits)) => {
                disk.set_limits(&limits).map_err(DeviceError::Limits)?;
            }
            (DeviceHandle::Net(net), DeviceCommand::SetNetLimits(limits)) => {
                net.set_limits(&limits).map_err(DeviceError::Limits)?;
            }
            (DeviceHandle::Console(console), DeviceCommand::ResizeConsole { columns, rows }) => {
                console.resize(columns, rows);
            }
            (DeviceHandle::Balloon(balloon), DeviceCommand::SetBalloonTarget { mib }) => {
                balloon.set_target(mib)?;
            }
            (DeviceHandle::Balloon(balloon), DeviceCommand::SetStatisticsInterval { seconds }) => {
                balloon.set_statistics_interval(seconds)?;
            }
            (DeviceHandle::Balloon(balloon), DeviceCommand::Hint(command)) => {
                balloon.hint(command)?;
            }
            (DeviceHandle::Balloon(balloon), DeviceCommand::BalloonStatistics) => {
                return Ok(DeviceAnswer::Balloon(Box::new(balloon.statistics())));
            }
            (_, command) => {
                let kind = command.kind();
                return Err(DeviceError::Kind { kind });
            }
        }
        Ok(DeviceAnswer::Done)
    }
}

fn update_size(disk: &BlockHandle) -> Result<u64, DeviceError> {
    disk.update_size().map_err(|source| DeviceError::Size {
        path: disk.disk().path().to_path_buf(),
        source,
    })
}

fn replace_image(disk: &BlockHandle, path: &Path, opener: &dyn Opener) -> Result<(), DeviceError> {
    let before = disk.disk();
    // An image that cannot be opened for reading is told of below.
    let is_same = opener
        .file(path, FileAccess::Read)
        .and_then(|file| before.is_same_file(&file));
    if is_same.unwrap_or(false) {
        return update_size(disk).map(drop);
    }
    let options = DiskOptions {
        // The guest knows it, and does not look again.
        block_size: Some(before.logical_block_size()),
        ..before.options().clone()
    };
    // The image must be free to be closed.
    drop(before);
    let image = DiskFile::open_by(opener, path, &options)?;
    Ok(disk.replace(image)?)
}
