//! Copies of a disk that its guest goes on using.
//!
//! A job works on the open image of a disk, beside the requests of the guest. It has no thread: its owner calls
//! `run` on one, and watches and ends it by its [`Control`].
//!
//! - A [`CopyJob`] makes another image equal to the disk, and keeps it equal until the disk goes on with it. The
//!   requests of the guest go through its filter meanwhile.
//! - A [`CommitJob`] copies what the image itself holds into one of its backing files, with which the disk goes on.
//! - A [`PullJob`] copies into the image what its backing files hold, so that it needs them no more.

mod commit;
mod copy;
mod filter;
mod pull;

use std::any::Any;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::Image;
use crate::qcow2::{self, Qcow2};
use crate::raw::DiskError;

pub use commit::CommitJob;
pub use copy::{CopyJob, CopyJobOptions};
pub use pull::PullJob;

/// Most bytes of data that are copied at a time. The guest's writes to them wait meanwhile, and a job that is
/// cancelled ends after them.
const CHUNK: u64 = 1 << 20;

/// How much of a disk is looked at at a time, to find what has to be copied. Requests that change where the guest's bytes
/// are wait meanwhile.
const WINDOW: u64 = 64 << 20;

/// What has become of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobState {
    /// It copies, or has not begun.
    Copying,
    /// Everything has been copied.
    Ready,
    /// It was cancelled.
    Cancelled,
    /// It has failed, for this reason.
    Failed(String),
}

/// How much of a disk a job has been through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobProgress {
    /// Bytes that are done.
    pub done: u64,
    /// Bytes of the disk.
    pub total: u64,
}

/// Why a job cannot begin.
#[derive(Debug, Error)]
pub enum JobError {
    /// The target has no room for the disk.
    #[error("the target has {target} bytes, fewer than the {source_size} of the disk")]
    TargetSize {
        /// Size of the target in bytes.
        target: u64,
        /// Size of the disk in bytes.
        source_size: u64,
    },

    /// The image, or the target, takes no writes.
    #[error("{0} is read-only")]
    ReadOnly(&'static str),

    /// The image is not in the format qcow2.
    #[error("the image is not a qcow2 image, so it has no backing file")]
    NotQcow2,

    /// There is no such layer.
    #[error("{}", match .0 { 1 => "the image has no backing file".to_owned(), count => format!("the image has fewer than {count} backing files") })]
    Depth(usize),

    /// A backing file cannot be opened to be written.
    #[error(transparent)]
    Disk(#[from] DiskError),

    /// The image does not allow this.
    #[error(transparent)]
    Qcow2(#[from] qcow2::Error),
}

/// Watches and ends a job, from any thread.
#[derive(Debug)]
pub struct Control {
    done: AtomicU64,
    total: u64,
    /// Whether the state is [`JobState::Copying`] or [`JobState::Ready`].
    is_live: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    state: JobState,
    /// Whether the job cannot be cancelled.
    is_sealed: bool,
}

impl Control {
    fn new(total: u64) -> Control {
        Control {
            done: AtomicU64::new(0),
            total,
            is_live: AtomicBool::new(true),
            state: Mutex::new(State {
                state: JobState::Copying,
                is_sealed: false,
            }),
        }
    }

    /// Returns how far the job is.
    pub fn progress(&self) -> JobProgress {
        JobProgress {
            done: self.done.load(Ordering::Relaxed),
            total: self.total,
        }
    }

    /// Returns what has become of the job.
    pub fn state(&self) -> JobState {
        self.lock().state.clone()
    }

    /// Cancels the job if it copies or is ready. `run` returns after at most a chunk of a mebibyte. Returns whether
    /// the job is cancelled now: one that has ended otherwise, whose target is about to become the disk
    /// ([`CopyJob::begin_switch`]), or that is removing backing files from the image, is not.
    pub fn cancel(&self) -> bool {
        let mut state = self.lock();
        if !state.is_sealed {
            self.end(&mut state, JobState::Cancelled);
        }
        state.state == JobState::Cancelled
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the job still has something to do.
    fn is_live(&self) -> bool {
        self.is_live.load(Ordering::Acquire)
    }

    /// Ends the job with `new`, unless it has ended before.
    fn end(&self, state: &mut State, new: JobState) {
        if matches!(state.state, JobState::Copying | JobState::Ready) {
            state.state = new;
            self.is_live.store(false, Ordering::Release);
        }
    }

    fn fail(&self, reason: &str) {
        let reason = JobState::Failed(reason.to_owned());
        self.end(&mut self.lock(), reason);
    }

    /// Has the job not be cancelled from now on. Returns whether it has not ended before.
    fn seal(&self) -> bool {
        let mut state = self.lock();
        state.is_sealed = self.is_live();
        state.is_sealed
    }

    /// Notes that everything has been copied.
    fn become_ready(&self) {
        let mut state = self.lock();
        if state.state == JobState::Copying {
            state.state = JobState::Ready;
        }
    }

    fn set_done(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
    }
}

/// Returns an image as one of the format qcow2, if it is one.
fn as_qcow2(image: &dyn Image) -> Option<&Qcow2> {
    let image: &dyn Any = image;
    image.downcast_ref()
}

/// Says in which of two images a request has failed, and where.
fn cannot(action: &str, image: &str, offset: u64) -> impl FnOnce(io::Error) -> io::Error {
    let what = format!("cannot {action} {image} at offset {offset}");
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}
