//! Jobs: copies of a disk's data by a thread, beside the guest's requests.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bantam_storage::job::{CommitJob, Control, CopyJob, CopyJobOptions, JobError, PullJob};
use bantam_storage::{
    Disk, DiskError, FileOpener, FormattedDisk, ImageFormat, job::JobState as CopyState,
};
use serde::{Deserialize, Serialize};

use super::new_files::NewFiles;
use super::{BlockHandle, ReplaceError};
use crate::lock::lock;
use crate::notice::DeviceNotice;

/// How often the thread of a job that is ready looks whether an error of the copy has ended it.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// How long the thread of a job that has ended waits for the guest's requests before it tries again.
const REST_TIME: Duration = Duration::from_secs(5);
/// How often it tries, so that the end of the machine does not wait for it without end.
const RESTORE_ATTEMPTS: usize = 20;

/// What a job does with the data of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DiskJob {
    /// Copies the disk to a new image, with which the guest goes on when the job is finished.
    Copy {
        /// The new image. There must be no file.
        path: PathBuf,
        /// Its format.
        format: ImageFormat,
    },
    /// Copies what the image itself holds into its backing file, with which the guest goes on when the job is
    /// finished.
    Commit,
    /// Copies what comes from backing files into the image, which then has none any more. This job finishes by
    /// itself.
    Pull,
}

/// How far a job is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobStatus {
    /// What the job does.
    pub job: DiskJob,
    /// What has become of it.
    pub state: JobState,
    /// How many bytes of the disk it has been through.
    pub done: u64,
    /// Size of the disk in bytes.
    pub total: u64,
}

/// What has become of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// It copies.
    Copying,
    /// Both images are equal, and remain so until the job is finished or cancelled.
    Ready,
    /// It has failed or was cancelled, and the guest is about to go on without it.
    Ending,
    /// It has done all that it was to do.
    Finished,
    /// It was cancelled. The guest uses the image that it had before.
    Cancelled,
    /// It has failed. The guest uses the image that it had before.
    Failed {
        /// Why.
        reason: String,
    },
}

impl JobState {
    /// Whether the job is over.
    pub fn has_ended(&self) -> bool {
        matches!(
            self,
            JobState::Finished | JobState::Cancelled | JobState::Failed { .. }
        )
    }
}

/// Why a command for a job cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum JobCommandError {
    /// A job is at work on the disk.
    #[error("a job is at work on the disk: finish or cancel it first")]
    Busy,
    /// There is no job.
    #[error("no job is at work on the disk")]
    NoJob,
    /// The job cannot be finished yet.
    #[error("the job is not ready: it has copied {done} of {total} bytes")]
    NotReady {
        /// How many bytes it has been through.
        done: u64,
        /// Size of the disk in bytes.
        total: u64,
    },
    /// The guest is about to go on with the copy.
    #[error("the job is being finished")]
    Finishing,
    /// The image, or that which is to be written, does not allow the job.
    #[error("cannot begin the job: {0}")]
    Begin(#[from] JobError),
    /// An image cannot be used.
    #[error(transparent)]
    Image(#[from] DiskError),
    /// The device cannot use an image.
    #[error(transparent)]
    Device(#[from] ReplaceError),
    /// There is no thread for the job.
    #[error("cannot start a thread for the job: {0}")]
    Thread(#[source] io::Error),
    /// The guest cannot go on with the copy now.
    #[error("cannot finish the job: {0}")]
    Finish(#[source] io::Error),
}

/// An image with which the guest has gone on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PresentImage {
    /// Its path.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Its block size in bytes, which the guest knows.
    pub block_size: u32,
}

/// A job of a disk, shared by the thread that does it and the owner of the machine.
pub(super) struct RunningJob {
    job: DiskJob,
    work: Work,
    /// The disk that the guest had before.
    original: Arc<Disk>,
    stage: Mutex<Stage>,
    /// Notified when the stage has changed.
    changed: Condvar,
}

enum Work {
    Copy {
        copy: Arc<CopyJob>,
        target: Arc<Disk>,
    },
    Commit(CommitJob),
    Pull(PullJob),
}

/// How far a job is for its owner.
enum Stage {
    /// It copies, or waits to be finished.
    Live,
    /// The guest goes on with the copy, or the image needs no backing file any more.
    Finished,
    /// The guest has its former disk again.
    Restored,
}

/// What is left of the job of a disk.
pub(super) enum JobPlace {
    Running(Arc<RunningJob>),
    /// The status with which the last one has ended.
    Over(JobStatus),
}

impl JobPlace {
    fn status(&self) -> JobStatus {
        match self {
            JobPlace::Running(running) => running.status(),
            JobPlace::Over(status) => status.clone(),
        }
    }
}

impl RunningJob {
    fn control(&self) -> &Control {
        match &self.work {
            Work::Copy { copy, .. } => copy.control(),
            Work::Commit(commit) => commit.copy().control(),
            Work::Pull(pull) => pull.control(),
        }
    }

    fn status(&self) -> JobStatus {
        let stage = lock(&self.stage);
        let state = match (&*stage, self.control().state()) {
            (Stage::Finished, _) => JobState::Finished,
            (Stage::Restored, CopyState::Failed(reason)) => JobState::Failed { reason },
            (Stage::Restored, _) => JobState::Cancelled,
            (Stage::Live, CopyState::Copying) => JobState::Copying,
            // It needs nobody to finish it.
            (Stage::Live, CopyState::Ready) if matches!(self.work, Work::Pull(_)) => {
                JobState::Copying
            }
            (Stage::Live, CopyState::Ready) => JobState::Ready,
            (Stage::Live, CopyState::Cancelled | CopyState::Failed(_)) => JobState::Ending,
        };
        drop(stage);
        let progress = self.control().progress();
        JobStatus {
            job: self.job.clone(),
            state,
            done: progress.done,
            total: progress.total,
        }
    }

    /// Copies until the job is ready or has ended.
    fn copy(&self) -> CopyState {
        match &self.work {
            Work::Copy { copy, .. } => copy.run(),
            Work::Commit(commit) => commit.copy().run(),
            Work::Pull(pull) => pull.run(),
        }
    }

    /// Waits until the job, which is ready, is finished or has ended otherwise. Returns whether it is finished.
    fn wait_for_end(&self) -> bool {
        let mut stage = lock(&self.stage);
        loop {
            if let Stage::Finished = *stage {
                return true;
            }
            if self.control().state() != CopyState::Ready {
                return false;
            }
            let waited = self.changed.wait_timeout(stage, LOOK_INTERVAL);
            stage = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn enter(&self, stage: Stage) {
        *lock(&self.stage) = stage;
        self.changed.notify_all();
    }
}

impl BlockHandle {
    /// Returns the status of the job of the disk: that which is at work, or else the last one.
    pub fn job(&self) -> Option<JobStatus> {
        lock(&self.slot.job).as_ref().map(JobPlace::status)
    }

    /// Whether a job is at work on the disk, which then keeps its image and its size.
    pub(super) fn has_job(&self) -> bool {
        self.job().is_some_and(|status| !status.state.has_ended())
    }

    /// Begins a job, which a thread of the disk does.
    ///
    /// # Errors
    /// If there is one, it is not possible with the disk's image, or the device does not switch to it by `deadline`.
    pub fn start_job(
        &self,
        job: DiskJob,
        opener: &dyn FileOpener,
        deadline: Instant,
    ) -> Result<(), JobCommandError> {
        let _change = self.slot.change();
        if self.has_job() {
            return Err(JobCommandError::Busy);
        }
        let mut files = NewFiles::new(opener);
        let original = self.disk();
        let source = original.to_formatted(opener)?;
        let work = match &job {
            DiskJob::Copy { path, format } => {
                if original.is_read_only() {
                    return Err(JobError::ReadOnly("the disk").into());
                }
                let target = original.create_for_copy(opener, path, *format)?;
                files.add(path);
                let (from, to) = (source.image().clone(), target.to_formatted(opener)?);
                let options = CopyJobOptions {
                    target_is_zero: true,
                    layers: None,
                };
                Work::Copy {
                    copy: CopyJob::new(from, to.image().clone(), options)?,
                    target: Arc::new(target),
                }
            }
            DiskJob::Commit => Work::Commit(CommitJob::open(opener, &source, 1)?),
            DiskJob::Pull => Work::Pull(PullJob::new(&source, None)?),
        };
        self.begin(&job, work, original, source, deadline)?;
        files.keep();
        Ok(())
    }

    /// Puts the filter of a job in the place of the disk, and starts its thread.
    fn begin(
        &self,
        job: &DiskJob,
        work: Work,
        original: Arc<Disk>,
        source: FormattedDisk,
        deadline: Instant,
    ) -> Result<(), JobCommandError> {
        let filter = match &work {
            Work::Copy { copy, .. } => Some(copy.filter()),
            Work::Commit(commit) => Some(commit.copy().filter()),
            Work::Pull(_) => None,
        };
        let running = Arc::new(RunningJob {
            job: job.clone(),
            work,
            original,
            stage: Mutex::new(Stage::Live),
            changed: Condvar::new(),
        });
        if let Some(filter) = filter {
            let disk = Arc::new(Disk::Formatted(source.with_image(filter)));
            if let Err(error) = self.switch_to(disk, deadline) {
                running.control().cancel();
                close(&running);
                return Err(error);
            }
        }
        let before = lock(&self.slot.job).replace(JobPlace::Running(running.clone()));
        let (handle, own_running) = (self.clone(), running.clone());
        let work = Box::new(move || handle.run_job(own_running));
        if let Err(error) = self.owner.start_job(work) {
            running.control().cancel();
            self.restore(&running);
            close(&running);
            *lock(&self.slot.job) = before;
            return Err(JobCommandError::Thread(error));
        }
        Ok(())
    }

    /// Does the work of a job until it has ended, and lets the guest go on with its former disk unless the job is
    /// finished.
    fn run_job(&self, running: Arc<RunningJob>) {
        let is_finished = match (&running.work, running.copy()) {
            (Work::Pull(_), CopyState::Ready) => {
                self.leave_backing_files(&running);
                running.enter(Stage::Finished);
                true
            }
            (_, CopyState::Ready) => {
                self.tell(&running.status());
                running.wait_for_end()
            }
            _ => false,
        };
        if !is_finished {
            let _change = self.slot.change();
            self.restore(&running);
            close(&running);
            if let DiskJob::Copy { path, .. } = &running.job
                && let Err(error) = self.owner.remove_file(path)
            {
                let path = path.display();
                tracing::warn!("cannot remove '{path}', an incomplete copy of a disk: {error}");
            }
            running.enter(Stage::Restored);
        }
        let status = running.status();
        if let JobState::Failed { reason } = &status.state {
            let path = running.original.path().display();
            tracing::warn!("the job of disk '{path}' has failed: {reason}");
        }
        let mut place = lock(&self.slot.job);
        // The next job can have begun already.
        if matches!(&*place, Some(JobPlace::Running(present)) if Arc::ptr_eq(present, &running)) {
            *place = Some(JobPlace::Over(status.clone()));
        }
        drop(place);
        // Its images are closed when the owner hears of the end.
        drop(running);
        self.tell(&status);
    }

    fn tell(&self, status: &JobStatus) {
        self.link.notify_owner(DeviceNotice::Job { status });
    }

    /// Has the guest go on with the disk that it had before a job, as soon as its requests have ended.
    fn restore(&self, running: &RunningJob) {
        if let Work::Pull(_) = running.work {
            return;
        }
        for _ in 0..RESTORE_ATTEMPTS {
            match self.switch_to(running.original.clone(), Instant::now() + REST_TIME) {
                Ok(()) => return,
                // The filter passes everything to that disk, so this does the guest no harm.
                Err(error) => tracing::warn!("the guest still uses the filter of a job: {error}"),
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Closes the backing files of an image that needs them no more.
    fn leave_backing_files(&self, running: &RunningJob) {
        let _change = self.slot.change();
        let Disk::Formatted(disk) = &*running.original else {
            return;
        };
        let switched = disk
            .without_backing_files()
            .map_err(JobCommandError::from)
            .and_then(|disk| self.switch_to(Arc::new(disk.into()), Instant::now() + REST_TIME));
        if let Err(error) = switched {
            tracing::warn!("the former backing files of a disk stay open: {error}");
        }
    }

    /// Has the device use `disk`, which holds the same data as the present one.
    fn switch_to(&self, disk: Arc<Disk>, deadline: Instant) -> Result<(), JobCommandError> {
        let path = disk.path().to_path_buf();
        let new = self.prepare(disk)?;
        let exchanged = self.slot.exchange(new, || Ok(()), deadline);
        exchanged.map_err(|source| ReplaceError::ChangeOver { path, source })?;
        Ok(())
    }

    /// Has the guest go on with the copy that a job has made, and ends the job. Returns the image that the disk has
    /// now.
    ///
    /// # Errors
    /// If there is no job that is ready, or the guest cannot go on with the copy by `deadline`.
    pub fn finish_job(&self, deadline: Instant) -> Result<PresentImage, JobCommandError> {
        let _change = self.slot.change();
        let running = self.running_job()?;
        let (copy, target) = match &running.work {
            Work::Copy { copy, target } => (copy, target),
            Work::Commit(commit) => (commit.copy(), commit.disk()),
            Work::Pull(_) => return Err(not_ready(&running)),
        };
        if copy.control().state() != CopyState::Ready {
            return Err(not_ready(&running));
        }
        copy.begin_switch().map_err(JobCommandError::Finish)?;
        let size_before = self.disk().size();
        if let Err(error) = self.switch_to(target.clone(), deadline) {
            copy.abort_switch();
            return Err(error);
        }
        running.enter(Stage::Finished);
        if self.disk().size() != size_before {
            self.link.notify_configuration_change();
        }
        Ok(PresentImage {
            path: target.path().to_path_buf(),
            format: target.options().format.unwrap_or(ImageFormat::Raw),
            block_size: target.logical_block_size(),
        })
    }

    /// Ends the job without finishing it. The guest goes on with the disk that it had before, soon after this
    /// returns.
    ///
    /// # Errors
    /// If there is no job, or the guest is about to go on with the copy.
    pub fn cancel_job(&self) -> Result<(), JobCommandError> {
        let running = self.running_job()?;
        match running.control().cancel() {
            true => {
                running.changed.notify_all();
                Ok(())
            }
            false if matches!(running.control().state(), CopyState::Failed(_)) => Ok(()),
            false => Err(JobCommandError::Finishing),
        }
    }

    fn running_job(&self) -> Result<Arc<RunningJob>, JobCommandError> {
        match &*lock(&self.slot.job) {
            Some(JobPlace::Running(running)) if !running.status().state.has_ended() => {
                Ok(running.clone())
            }
            _ => Err(JobCommandError::NoJob),
        }
    }
}

fn not_ready(running: &RunningJob) -> JobCommandError {
    let JobStatus { done, total, .. } = running.status();
    JobCommandError::NotReady { done, total }
}

/// Gives up what a job that is not finished has opened.
fn close(running: &RunningJob) {
    if let Work::Commit(commit) = &running.work
        && let Err(error) = commit.close()
    {
        tracing::warn!("cannot give the backing file of a disk back to other programs: {error}");
    }
}
