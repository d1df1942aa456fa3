//! `/bantam`: what Firecracker does not have. Snapshots of drives, growth of their images, and jobs that copy them.

use std::path::PathBuf;

use bantam_vmm::config::DeviceName;
use bantam_vmm::{DeviceAnswer, DeviceCommand, DiskJob, DiskSnapshot, JobState, JobStatus};
use serde::{Deserialize, Serialize};

use crate::bodies::drives::{Drive, DriveFormat};
use crate::configuration::Configuration;
use crate::device_ids::check_id;
use crate::fault::Fault;
use crate::instance::Instance;
use crate::method::Method;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::resource::Resource;
use crate::view::View;

pub(super) const RESOURCE: Resource = Resource {
    path: "bantam",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, ["snapshot"]) => {
            let snapshot: Snapshot = call.json()?;
            let take = |instance: &mut Instance| snapshot.take(instance);
            Ok(Request::change(Method::Put, "bantam_snapshot", take))
        }
        (Method::Put, ["drives", id, "size"]) => {
            let (id, size) = (id_of(id)?, call.json::<Size>()?);
            let grow = move |instance: &mut Instance| size.apply(&id, instance);
            Ok(Request::change(Method::Put, "bantam_drive_size", grow))
        }
        (Method::Put, ["drives", id, "job"]) => {
            let (id, job) = (id_of(id)?, call.json::<Job>()?);
            let start = move |instance: &mut Instance| job.start(&id, instance);
            Ok(Request::change(Method::Put, "bantam_drive_job", start))
        }
        (Method::Get, ["drives", id, "job"]) => {
            let id = id_of(id)?;
            Ok(Request::get("bantam_drive_job", move |view| job(&id, view)))
        }
        (Method::Patch, ["drives", id, "job"]) => {
            let (id, update) = (id_of(id)?, call.json::<JobUpdate>()?);
            let apply = move |instance: &mut Instance| update.apply(&id, instance);
            Ok(Request::patch("bantam_drive_job", apply))
        }
        _ => Err(call.unknown()),
    },
    groups: &[],
};

/// Body of `PUT /bantam/snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    /// The drives, all of which have the snapshot at one instant.
    drives: Vec<SnapshotDrive>,
}

/// A drive of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotDrive {
    /// Which drive.
    drive_id: String,
    /// Where its new image is made.
    path_on_host: PathBuf,
}

/// Body of `PUT /bantam/drives/{drive_id}/size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    /// The new size.
    size_bytes: u64,
}

/// Body of `PUT /bantam/drives/{drive_id}/job`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "job_type", deny_unknown_fields)]
enum Job {
    /// Copies the drive to a new image.
    Copy {
        /// Where the image is made.
        path_on_host: PathBuf,
        /// Its format.
        #[serde(default)]
        format: DriveFormat,
    },
    /// Copies the image into its backing file.
    Commit {},
    /// Copies the backing files into the image.
    Pull {},
}

/// Body of `PATCH /bantam/drives/{drive_id}/job`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobUpdate {
    /// What the job is to do.
    action: JobAction,
}

/// What a job can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum JobAction {
    /// The guest goes on with the copy.
    Finish,
    /// The guest goes on without the copy.
    Cancel,
}

/// Answer of `GET /bantam/drives/{drive_id}/job`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct JobAnswer {
    /// `Copy`, `Commit` or `Pull`.
    job_type: &'static str,
    /// `Copying`, `Ready`, `Ending`, `Finished`, `Cancelled` or `Failed`.
    state: &'static str,
    /// Why it has failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// How many bytes of the drive it has been through.
    done_bytes: u64,
    /// Size of the drive.
    total_bytes: u64,
}

fn id_of(id: &str) -> Result<String, Fault> {
    check_id(id)?;
    Ok(id.to_owned())
}

/// Returns the drive called `id`, and the machine's name for it.
fn drive(configuration: &Configuration, id: &str) -> Result<(Drive, DeviceName), Fault> {
    let mut drives = configuration.drives.iter();
    let drive = drives.find(|drive| drive.drive_id == id);
    let drive = drive.ok_or_else(|| Fault::NoSuchDevice {
        kind: "drive",
        id: id.to_owned(),
    })?;
    Ok((drive.clone(), configuration.names().drive(id)?))
}

/// Has the drive called `id` do what `command` says.
fn command(id: &str, view: &View, command: DeviceCommand) -> Result<DeviceAnswer, Fault> {
    view.require_started()?;
    let (_, name) = drive(&view.configuration(), id)?;
    Ok(view.controller().device(&name, command)?)
}

impl Snapshot {
    fn take(self, instance: &mut Instance) -> Result<(), Fault> {
        instance.view().require_started()?;
        if self.drives.is_empty() {
            return Err(Fault::Value {
                what: "drives",
                reason: "a snapshot has at least one drive".to_string(),
            });
        }
        let configuration = instance.view().configuration();
        let mut disks = Vec::with_capacity(self.drives.len());
        let mut changed = Vec::with_capacity(self.drives.len());
        for SnapshotDrive {
            drive_id,
            path_on_host: path,
        } in self.drives
        {
            let (drive, disk) = drive(&configuration, &drive_id)?;
            changed.push(Drive {
                path_on_host: Some(path.clone()),
                format: DriveFormat::Qcow2,
                // The image that was there is one now.
                backing: true,
                ..drive
            });
            disks.push(DiskSnapshot { disk, path });
        }
        instance.controller().snapshot_disks(disks)?;
        instance.record(|configuration| {
            for drive in changed {
                configuration.set_drive(drive);
            }
        });
        Ok(())
    }
}

impl Size {
    fn apply(self, id: &str, instance: &Instance) -> Result<(), Fault> {
        let size = self.size_bytes;
        command(id, instance.view(), DeviceCommand::Grow { size })?;
        Ok(())
    }
}

impl Job {
    fn start(self, id: &str, instance: &Instance) -> Result<(), Fault> {
        let job = match self {
            Job::Copy {
                path_on_host: path,
                format,
            } => DiskJob::Copy {
                path,
                format: format.into(),
            },
            Job::Commit {} => DiskJob::Commit,
            Job::Pull {} => DiskJob::Pull,
        };
        command(id, instance.view(), DeviceCommand::StartJob(job))?;
        Ok(())
    }
}

impl JobUpdate {
    fn apply(self, id: &str, instance: &mut Instance) -> Result<(), Fault> {
        let wanted = match self.action {
            JobAction::Finish => DeviceCommand::FinishJob,
            JobAction::Cancel => DeviceCommand::CancelJob,
        };
        if let DeviceAnswer::Image(image) = command(id, instance.view(), wanted)? {
            let (drive, _) = drive(&instance.view().configuration(), id)?;
            let drive = Drive {
                path_on_host: Some(image.path),
                format: image.format.into(),
                ..drive
            };
            instance.record(|configuration| configuration.set_drive(drive));
        }
        Ok(())
    }
}

fn job(id: &str, view: &View) -> Result<Reply, Fault> {
    match command(id, view, DeviceCommand::Job)? {
        DeviceAnswer::Job(Some(status)) => Reply::value(&JobAnswer::from(status)),
        _ => Err(Fault::NotNow("The drive has not had a job yet")),
    }
}

impl From<JobStatus> for JobAnswer {
    fn from(status: JobStatus) -> JobAnswer {
        let (state, reason) = match status.state {
            JobState::Copying => ("Copying", None),
            JobState::Ready => ("Ready", None),
            JobState::Ending => ("Ending", None),
            JobState::Finished => ("Finished", None),
            JobState::Cancelled => ("Cancelled", None),
            JobState::Failed { reason } => ("Failed", Some(reason)),
        };
        JobAnswer {
            job_type: match status.job {
                DiskJob::Copy { .. } => "Copy",
                DiskJob::Commit => "Commit",
                DiskJob::Pull => "Pull",
            },
            state,
            reason,
            done_bytes: status.done,
            total_bytes: status.total,
        }
    }
}
