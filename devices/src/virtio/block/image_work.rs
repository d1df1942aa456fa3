//! Requests to an image that take more than a transfer between guest memory and a file: to find a place for
//! data, to decompress it, to change the image's own tables.
//!
//! They may wait for the host, so a thread of the disk does them, one after the other. The worker of the
//! device gives it jobs and finds those that are done when an event is signalled.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bantam_memory::GuestBuffers;
use bantam_storage::Image;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::lock::lock;

/// Most bytes that are copied between guest memory and an image at a time.
const CHUNK_SIZE: usize = 1 << 20;

/// What is to be done with an image.
pub(super) enum Task {
    /// Fills the buffers with the bytes from `offset` on.
    Read {
        buffers: GuestBuffers,
        offset: u64,
    },
    /// Writes the buffers to `offset`.
    Write {
        buffers: GuestBuffers,
        offset: u64,
    },
    Discard(Range<u64>),
    WriteZeroes {
        range: Range<u64>,
        unmap: bool,
    },
    Flush,
}

/// A task of a request.
pub(super) struct Job {
    /// Identifies the request.
    pub(super) token: usize,
    pub(super) image: Arc<dyn Image>,
    pub(super) task: Task,
    /// Whether a flush follows.
    pub(super) flushes: bool,
}

/// A job that has ended.
pub(super) struct Done {
    pub(super) token: usize,
    pub(super) result: io::Result<()>,
    /// The buffers of a transfer. None are left in them if it has succeeded.
    pub(super) buffers: Option<GuestBuffers>,
}

/// The jobs of one disk, shared by the worker of its device and the thread that does them.
///
/// The owner of the machine calls [`ImageWork::run`] on a thread of its own, and ends it by
/// [`ImageWork::end`].
pub struct ImageWork {
    jobs: Mutex<Jobs>,
    /// Notified when there is another job, or there will be no more.
    wanted: Condvar,
    done: Mutex<Vec<Done>>,
    /// Signalled when there are jobs that have ended.
    event: EventFd,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// An image that is to be prepared for later writes.
    unprepared: Option<Arc<dyn Image>>,
    has_ended: bool,
}

impl AsRawFd for ImageWork {
    /// Returns the event that is readable when a job has ended.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl ImageWork {
    /// # Errors
    /// If the host is out of file descriptors.
    pub(super) fn new() -> io::Result<ImageWork> {
        Ok(ImageWork {
            jobs: Mutex::default(),
            wanted: Condvar::new(),
            done: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Does the jobs of the device until [`ImageWork::end`] is called.
    pub fn run(&self) {
        let _refusal = RefuseOnExit(self);
        // Kept only while there is work, as most disks rarely have any.
        let mut chunk = Vec::new();
        loop {
            let mut jobs = lock(&self.jobs);
            let job = loop {
                if let Some(job) = jobs.waiting.pop_front() {
                    break job;
                }
                if jobs.has_ended {
                    return;
                }
                if let Some(image) = jobs.unprepared.take() {
                    drop(jobs);
                    // A failure shows again when a write finds no room.
                    let _ = image.prepare();
                    drop(image);
                    jobs = lock(&self.jobs);
                    continue;
                }
                chunk = Vec::new();
                jobs = self
                    .wanted
                    .wait(jobs)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(jobs);
            let mut unfinished = Unfinished {
                work: self,
                token: job.token,
                is_done: false,
            };
            let done = job.perform(&mut chunk);
            unfinished.is_done = true;
            self.report(done);
        }
    }

    /// Has [`ImageWork::run`] return when it has done all jobs. Later ones fail.
    pub fn end(&self) {
        let mut jobs = lock(&self.jobs);
        jobs.has_ended = true;
        // It is not prepared any more, and can be closed.
        let unprepared = jobs.unprepared.take();
        drop(jobs);
        drop(unprepared);
        self.wanted.notify_all();
    }

    /// Has `job` done.
    pub(super) fn push(&self, job: Job) {
        let mut jobs = lock(&self.jobs);
        if jobs.has_ended {
            drop(jobs);
            self.report(job.refuse());
            return;
        }
        jobs.waiting.push_back(job);
        self.wanted.notify_one();
    }

    /// Has `image` prepared for later writes when there is no job.
    pub(super) fn prepare(&self, image: Arc<dyn Image>) {
        let mut jobs = lock(&self.jobs);
        if !jobs.has_ended {
            jobs.unprepared = Some(image);
            self.wanted.notify_one();
        }
    }

    /// Moves the jobs that have ended to the end of `done`.
    pub(super) fn take_done(&self, done: &mut Vec<Done>) {
        done.append(&mut lock(&self.done));
    }

    /// Takes the signal back that there are jobs that have ended. They are taken after that.
    pub(super) fn clear_event(&self) {
        // The event is non-blocking: the read fails only if it was not signalled.
        let _ = self.event.read();
    }

    fn report(&self, done: Done) {
        lock(&self.done).push(done);
        // It fails only if the counter is full, and then the event is readable already.
        let _ = self.event.write(1);
    }
}

/// Refuses the jobs that are left when the thread ends, also by a panic, as the worker waits for each.
struct RefuseOnExit<'a>(&'a ImageWork);

impl Drop for RefuseOnExit<'_> {
    fn drop(&mut self) {
        let mut jobs = lock(&self.0.jobs);
        jobs.has_ended = true;
        let waiting = std::mem::take(&mut jobs.waiting);
        let unprepared = jobs.unprepared.take();
        drop(jobs);
        drop(unprepared);
        for job in waiting {
            self.0.report(job.refuse());
        }
    }
}

/// Reports a job during which the thread panics, as the worker waits for it.
struct Unfinished<'a> {
    work: &'a ImageWork,
    token: usize,
    is_done: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            self.work.report(Done {
                token: self.token,
                result: Err(thread_has_ended()),
                buffers: None,
            });
        }
    }
}

fn thread_has_ended() -> io::Error {
    io::Error::other("the thread of the disk has ended")
}

impl Job {
    /// Does the job, with data on its way in `chunk`.
    fn perform(self, chunk: &mut Vec<u8>) -> Done {
        let Job {
            token,
            image,
            task,
            flushes,
        } = self;
        let (result, buffers) = match task {
            Task::Read {
                mut buffers,
                offset,
            } => {
                let result = copy(chunk, &mut buffers, offset, |chunk, buffers, offset| {
                    image.read_at(chunk, offset)?;
                    buffers.write(chunk);
                    Ok(())
                });
                (result, Some(buffers))
            }
            Task::Write {
                mut buffers,
                offset,
            } => {
                let result = copy(chunk, &mut buffers, offset, |chunk, buffers, offset| {
                    buffers.read(chunk);
                    image.write_at(chunk, offset)
                });
                (result, Some(buffers))
            }
            Task::Discard(range) | Task::WriteZeroes { range, .. } if range.is_empty() => {
                (Ok(()), None)
            }
            Task::Discard(range) => (image.discard(range), None),
            Task::WriteZeroes { range, unmap } => (image.write_zeroes(range, unmap), None),
            Task::Flush => (image.flush(), None),
        };
        let result = match flushes {
            true => result.and_then(|()| image.flush()),
            false => result,
        };
        Done {
            token,
            result,
            buffers,
        }
    }

    fn refuse(self) -> Done {
        Done {
            token: self.token,
            result: Err(thread_has_ended()),
            buffers: match self.task {
                Task::Read { buffers, .. } | Task::Write { buffers, .. } => Some(buffers),
                _ => None,
            },
        }
    }
}

/// Calls `transfer` for one part of `buffers` after the other, each with as much of `chunk` and its offset.
fn copy(
    chunk: &mut Vec<u8>,
    buffers: &mut GuestBuffers,
    mut offset: u64,
    mut transfer: impl FnMut(&mut [u8], &mut GuestBuffers, u64) -> io::Result<()>,
) -> io::Result<()> {
    let size = buffers.len().min(CHUNK_SIZE);
    if chunk.len() < size {
        chunk.resize(size, 0);
    }
    while !buffers.is_empty() {
        let count = buffers.len().min(size);
        transfer(&mut chunk[..count], buffers, offset)?;
        offset += count as u64;
    }
    Ok(())
}
