//! Commands from the owner of a machine to its virtio devices while the guest uses them.

use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bantam_storage::{Disk, DiskError, DiskOptions, FileAccess, ImageFormat};
use serde::{Deserialize, Serialize};

use super::balloon::BalloonHandle;
pub use super::balloon::{
    BalloonError, BalloonMetrics, BalloonStatistics, GuestStatistics, HintingCommand, HintingStatus,
};
use super::block::BlockHandle;
pub use super::block::{
    BlockMetrics, DiskJob, JobCommandError, JobState, JobStatus, PresentImage, ReplaceError,
    SnapshotError,
};
use super::console::ConsoleHandle;
pub use super::console::ConsoleMetrics;
use super::net::NetHandle;
pub use super::net::{NetLimits, NetMetrics};
pub use super::rng::EntropyMetrics;
pub use super::vsock::VsockMetrics;
use crate::opener::Opener;
use crate::rate_limiter::Limits;

/// A command to a device. Each is for devices of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DeviceCommand {
    /// Checks the present size of a disk's image, and tells the guest if it has changed.
    UpdateSize,
    /// Replaces a disk's image by another with the same cache mode, and tells the guest. If it is the same
    /// image, its size is checked again. Requests in progress are finished first.
    ReplaceImage {
        /// The new image.
        path: PathBuf,
        /// Its format, if it has another one than the present image. If the present image is raw and was opened
        /// without a format, the name of the new image says whether it is raw or qcow2.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<ImageFormat>,
    },
    /// Makes a disk's image larger, and tells the guest.
    Grow {
        /// The new size in bytes.
        size: u64,
    },
    /// Begins to copy data of a disk, beside its guest. A disk has one job at a time, and keeps its image and its size
    /// until the job has ended.
    StartJob(DiskJob),
    /// Has the guest of a disk go on with the copy that a job has made. The job must be ready.
    FinishJob,
    /// Ends the job of a disk, whose guest goes on with the image that the disk had before.
    CancelJob,
    /// Asks for the job of a disk, or the last one.
    Job,
    /// Sets the limits of a disk. An unchanged limit keeps its fill level; a changed one begins with a full
    /// bucket.
    SetLimits(Limits),
    /// Sets the limits of a network device, otherwise like [`DeviceCommand::SetLimits`].
    SetNetLimits(NetLimits),
    /// Tells the guest the size of a console in characters; 0 means unknown.
    ResizeConsole {
        /// Characters in a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Asks the guest to give up this much memory in all. It does so over time and as far as it can.
    SetBalloonTarget {
        /// The amount in MiB.
        mib: u32,
    },
    /// Changes how often the guest is asked for statistics on its memory, and asks it at once.
    SetStatisticsInterval {
        /// The interval.
        seconds: NonZeroU32,
    },
    /// Asks the guest which memory it does not use (free page hinting), or lets it use all of it again.
    Hint(HintingCommand),
    /// Asks for the size of a balloon, and the guest's latest statistics on its memory.
    BalloonStatistics,
}

impl DeviceCommand {
    /// Returns the kind of device that the command is for.
    fn kind(&self) -> &'static str {
        match self {
            DeviceCommand::UpdateSize
            | DeviceCommand::ReplaceImage { .. }
            | DeviceCommand::Grow { .. }
            | DeviceCommand::StartJob(_)
            | DeviceCommand::FinishJob
            | DeviceCommand::CancelJob
            | DeviceCommand::Job
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

/// The answer of a device to a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceAnswer {
    /// It is done.
    Done,
    /// Answers [`DeviceCommand::UpdateSize`] and [`DeviceCommand::Grow`]: the size in bytes.
    Size(u64),
    /// Answers [`DeviceCommand::FinishJob`]: the image with which the guest goes on.
    Image(PresentImage),
    /// Answers [`DeviceCommand::Job`]; `None` if there was no job yet.
    Job(Option<JobStatus>),
    /// Answers [`DeviceCommand::BalloonStatistics`].
    Balloon(Box<BalloonStatistics>),
}

/// Why a device cannot carry out a command.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The command is for devices of another kind.
    #[error("it is not {kind}")]
    Kind {
        /// That kind, with an article.
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
    /// A command for a job cannot be carried out.
    #[error(transparent)]
    Job(#[from] JobCommandError),
    /// The host refuses to set a timer for the limits.
    #[error("cannot set a timer for its limits: {0}")]
    Limits(#[source] io::Error),
    /// The host does not answer, so the command is given up.
    #[error("the host does not answer within {seconds} s: try again when it does")]
    NoAnswer {
        /// How many seconds it was waited for.
        seconds: u64,
    },
    /// The balloon cannot have the settings that are asked for.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
}

impl DeviceError {
    /// Whether the command has taken effect all the same: the new image is in place, but data written to the
    /// old one could not be brought to stable storage.
    pub fn is_done(&self) -> bool {
        matches!(self, DeviceError::Replace(ReplaceError::Flush { .. }))
    }
}

/// A handle to a device, for the owner of its machine.
pub enum DeviceHandle {
    /// A handle to a disk.
    Disk(BlockHandle),
    /// A handle to a network device.
    Net(NetHandle),
    /// A handle to a console, or a device of channels.
    Console(ConsoleHandle),
    /// A handle to a balloon.
    Balloon(BalloonHandle),
    /// The counters of the socket device, which takes no commands.
    Vsock(Arc<VsockMetrics>),
    /// The counters of the entropy device, which takes no commands.
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
    /// Returns the device's counters.
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

    /// Whether `command` neither changes anything nor waits, so that it can be executed beside others.
    pub fn is_question(command: &DeviceCommand) -> bool {
        matches!(command, DeviceCommand::Job)
    }

    /// Whether `command` uses files of the host, which may be on storage that does not answer.
    pub fn uses_files(command: &DeviceCommand) -> bool {
        matches!(
            command,
            DeviceCommand::UpdateSize
                | DeviceCommand::ReplaceImage { .. }
                | DeviceCommand::Grow { .. }
                | DeviceCommand::StartJob(_)
                | DeviceCommand::FinishJob
        )
    }

    /// Carries out `command`, with files that `opener` opens. An image that has not been replaced by
    /// `deadline` stays, however late the host answers.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn execute(
        &self,
        command: DeviceCommand,
        opener: &dyn Opener,
        deadline: Instant,
    ) -> Result<DeviceAnswer, DeviceError> {
        match (self, command) {
            (DeviceHandle::Disk(disk), DeviceCommand::UpdateSize) => {
                let size = sized(disk, disk.update_size())?;
                return Ok(DeviceAnswer::Size(size));
            }
            (DeviceHandle::Disk(disk), DeviceCommand::Grow { size }) => {
                let size = sized(disk, disk.grow(size))?;
                return Ok(DeviceAnswer::Size(size));
            }
            (DeviceHandle::Disk(disk), DeviceCommand::ReplaceImage { path, format }) => {
                replace_image(disk, &path, format, opener, deadline)?;
            }
            (DeviceHandle::Disk(disk), DeviceCommand::StartJob(job)) => {
                disk.start_job(job, opener, deadline)?;
            }
            (DeviceHandle::Disk(disk), DeviceCommand::FinishJob) => {
                return Ok(DeviceAnswer::Image(disk.finish_job(deadline)?));
            }
            (DeviceHandle::Disk(disk), DeviceCommand::CancelJob) => disk.cancel_job()?,
            (DeviceHandle::Disk(disk), DeviceCommand::Job) => {
                return Ok(DeviceAnswer::Job(disk.job()));
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

fn sized(disk: &BlockHandle, result: io::Result<u64>) -> Result<u64, DeviceError> {
    result.map_err(|source| DeviceError::Size {
        path: disk.disk().path().to_path_buf(),
        source,
    })
}

fn replace_image(
    disk: &BlockHandle,
    path: &Path,
    format: Option<ImageFormat>,
    opener: &dyn Opener,
    deadline: Instant,
) -> Result<(), DeviceError> {
    let before = disk.disk();
    // An error of opening the image is reported below.
    let is_same = opener
        .file(path, FileAccess::Read)
        .and_then(|file| before.is_same_file(&file));
    let present = match &*before {
        Disk::Raw(_) => ImageFormat::Raw,
        Disk::Formatted(_) => before.options().format.unwrap_or(ImageFormat::Qcow2),
    };
    if is_same.unwrap_or(false) && format.is_none_or(|format| format == present) {
        return sized(disk, disk.update_size()).map(drop);
    }
    let options = DiskOptions {
        format: format.or(before.options().format),
        // The guest knows the block size, and does not read it again.
        block_size: Some(before.logical_block_size()),
        ..before.options().clone()
    };
    // The old image must not be kept open.
    drop(before);
    let image = Disk::open_by(opener, path, &options)?;
    Ok(disk.replace(image, deadline)?)
}
