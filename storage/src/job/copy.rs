//! Copies a disk to another image.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::filter::Filter;
use super::{CHUNK, Control, JobError, JobState, WINDOW, cannot};
use crate::qcow2::{ALL, RangeLocks};
use crate::{Content, Image};

/// Most bytes that are made zeroes at a time, as a host that has no better way writes them.
const ZEROES: u64 = 16 << 20;

/// How a disk is copied while it is in use.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyJobOptions {
    /// Whether all of the target reads as zeroes, so that none need to be written.
    pub target_is_zero: bool,
    /// The number of layers of the disk that are copied. What deeper ones hold is left out, as the target has it
    /// itself. `None`: all.
    pub layers: Option<usize>,
}

/// Makes an image, the target, equal to a disk that its guest goes on using, the source.
///
/// The copy goes from the beginning of the disk to its end. What lies before its *frontier* is equal in both: the
/// guest's requests go through a [filter](Self::filter), which writes there to both images, and elsewhere to the
/// source alone. So a copy ends, however fast the guest writes, and from then on the target is equal to the source.
///
/// # How its owner uses it
/// 1. It puts the filter in the place of the source. No request to the source, and no transfer by an answer of
///    [`Image::map`], may be under way when the first request goes to the filter, or later beside it. The size of the
///    disk stays what it is as long as the job is there.
/// 2. It calls [`Self::run`] on a thread. When the job is ready, it calls [`Self::begin_switch`], and then replaces
///    the filter by the target, again with no request under way. If it does not do the latter after all, it calls
///    [`Self::abort_switch`].
/// 3. If the job has failed or is cancelled, the filter passes everything to the source, by which it can be replaced
///    at any time.
#[derive(Debug)]
pub struct CopyJob {
    pub(super) source: Arc<dyn Image>,
    pub(super) target: Arc<dyn Image>,
    options: CopyJobOptions,
    size: u64,
    pub(super) control: Control,
    /// The target is equal to the source before this offset. It changes only while a lock is held on the bytes between
    /// its old and its new value.
    frontier: AtomicU64,
    /// Requests that change bytes lock them, so that they change in the same order in both images.
    pub(super) locks: RangeLocks,
    /// Whether the target is about to become the disk.
    pub(super) is_switching: AtomicBool,
    /// Whether the two images have become different meanwhile.
    is_different: AtomicBool,
}

impl CopyJob {
    /// Prepares to copy `source` to `target`.
    ///
    /// # Errors
    /// If the target is smaller than the source, or takes no writes.
    pub fn new(
        source: Arc<dyn Image>,
        target: Arc<dyn Image>,
        options: CopyJobOptions,
    ) -> Result<Arc<CopyJob>, JobError> {
        let size = source.size();
        if target.size() < size {
            return Err(JobError::TargetSize {
                target: target.size(),
                source_size: size,
            });
        }
        if target.is_read_only() {
            return Err(JobError::ReadOnly("the target"));
        }
        Ok(Arc::new(CopyJob {
            source,
            target,
            options,
            size,
            control: Control::new(size),
            frontier: AtomicU64::new(0),
            locks: RangeLocks::default(),
            is_switching: AtomicBool::new(false),
            is_different: AtomicBool::new(false),
        }))
    }

    /// Returns what stands for the disk while the job is there. Its files are those of the source, with the same
    /// numbers.
    pub fn filter(self: &Arc<CopyJob>) -> Arc<dyn Image> {
        Arc::new(Filter(Arc::clone(self)))
    }

    /// Returns what watches and ends the job.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Returns the image that the disk is copied to.
    pub fn target(&self) -> &Arc<dyn Image> {
        &self.target
    }

    /// Copies the disk, until it is copied or the job ends otherwise. Returns the state of the job.
    pub fn run(&self) -> JobState {
        let mut buffer = Vec::new();
        while self.control.is_live() {
            let start = self.frontier();
            if start == self.size {
                self.control.become_ready();
                break;
            }
            if let Err(error) = self.advance(start, &mut buffer) {
                self.control.fail(&error.to_string());
            }
        }
        self.control.state()
    }

    /// Brings the target to stable storage, and has each flush of the filter do so from now on, because the disk is
    /// about to go on with the target. From now on, errors of the target are errors of the guest's requests, as the
    /// target may become the disk at any moment, and the job cannot be cancelled.
    ///
    /// # Errors
    /// If the job is not ready, or the target cannot be flushed, which ends the job.
    pub fn begin_switch(&self) -> io::Result<()> {
        {
            let mut state = self.control.lock();
            if state.state != JobState::Ready {
                return Err(io::Error::other("the copy is not ready"));
            }
            state.is_sealed = true;
            self.is_switching.store(true, Ordering::Release);
        }
        // A request that began before does not report errors of the target. It has ended after this.
        drop(self.locks.exclusive(ALL));
        let flushed = if self.control.is_live() {
            self.target.flush()
        } else {
            Err(io::Error::other("the copy has failed"))
        };
        if let Err(error) = &flushed {
            self.abort_switch();
            self.control
                .fail(&format!("cannot flush the target: {error}"));
        }
        flushed
    }

    /// Has the job be ready again, because the disk does not go on with the target after all. If an error of the
    /// target has reached the guest meanwhile, the job has failed now.
    pub fn abort_switch(&self) {
        self.is_switching.store(false, Ordering::Release);
        // A request that began before can still note a difference. It has ended after this.
        drop(self.locks.exclusive(ALL));
        self.control.lock().is_sealed = false;
        if self.is_different.load(Ordering::Relaxed) {
            self.control.fail("the target could not be written");
        }
    }

    fn frontier(&self) -> u64 {
        self.frontier.load(Ordering::Acquire)
    }

    /// Returns the part of `range` that lies before the frontier. The caller has locked the range.
    pub(super) fn done_part(&self, range: Range<u64>) -> Range<u64> {
        range.start..range.end.min(self.frontier()).max(range.start)
    }

    /// Copies what follows the frontier, as much as is done at a time.
    fn advance(&self, start: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
        let window = start..start.saturating_add(WINDOW).min(self.size);
        let len = match self.work(window)? {
            (Work::Copy, _) => CHUNK - start % CHUNK,
            (Work::Zeroes, len) if !self.options.target_is_zero => len.min(ZEROES),
            (Work::Zeroes | Work::Nothing, len) => len,
        };
        let end = start.saturating_add(len).min(self.size);
        let _guard = self.locks.exclusive(start..end);
        if !self.control.is_live() {
            return Ok(());
        }
        let end = self.copy_some(start..end, self.options.target_is_zero, buffer)?;
        self.frontier.store(end, Ordering::Release);
        self.control.set_done(end);
        Ok(())
    }

    /// Makes a range of the target equal to the source. The caller has locked the range.
    pub(super) fn copy_all(&self, range: Range<u64>) -> io::Result<()> {
        let mut buffer = Vec::new();
        let mut next = range.start;
        while next < range.end {
            next = self.copy_some(next..range.end, false, &mut buffer)?;
        }
        Ok(())
    }

    /// Makes the first bytes of a range of the target equal to the source, and returns where they end. Stops after a
    /// chunk of data.
    fn copy_some(
        &self,
        range: Range<u64>,
        target_is_zero: bool,
        buffer: &mut Vec<u8>,
    ) -> io::Result<u64> {
        let mut next = range.start;
        let mut copied = 0;
        while next < range.end && copied < CHUNK {
            let (work, len) = self.work(next..range.end)?;
            let len = match work {
                Work::Nothing => len,
                Work::Zeroes if target_is_zero => len,
                Work::Zeroes => {
                    let zeroed = self.target.write_zeroes(next..next + len, true);
                    zeroed.map_err(cannot("write", "the target", next))?;
                    len
                }
                Work::Copy => {
                    let len = len.min(CHUNK - copied);
                    buffer.resize(len as usize, 0);
                    let read = self.source.read_at(buffer, next);
                    read.map_err(cannot("read", "the disk", next))?;
                    let written = self.target.write_at(buffer, next);
                    written.map_err(cannot("write", "the target", next))?;
                    copied += len;
                    len
                }
            };
            next += len;
        }
        Ok(next)
    }

    /// Returns what has to be done with the first bytes of a range, and their number.
    fn work(&self, range: Range<u64>) -> io::Result<(Work, u64)> {
        let status = self.source.status(range.clone());
        let status = status.map_err(cannot("read", "the disk", range.start))?;
        let len = status.len.clamp(1, range.end - range.start);
        match (self.options.layers, status.depth) {
            (Some(layers), Some(depth)) if depth >= layers => return Ok((Work::Nothing, len)),
            // No layer has it, because one that is copied ends before, or the target has zeroes itself.
            (Some(_), None) => {
                let hidden = self.target.status(range.start..range.start + len);
                let hidden = hidden.map_err(cannot("read", "the target", range.start))?;
                let work = match hidden.content {
                    Content::Zeroes | Content::Hole { .. } => Work::Nothing,
                    Content::Data { .. } | Content::Compressed => Work::Zeroes,
                };
                return Ok((work, hidden.len.clamp(1, len)));
            }
            _ => {}
        }
        let work = match status.content {
            Content::Data { .. } | Content::Compressed => Work::Copy,
            Content::Hole { .. } | Content::Zeroes => Work::Zeroes,
        };
        Ok((work, len))
    }

    /// Deals with an error of the target: it ends the job, and is an error of the guest's request only if the target
    /// is about to become the disk.
    pub(super) fn mirrored(&self, written: io::Result<()>) -> io::Result<()> {
        let Err(error) = written else {
            return Ok(());
        };
        // The lock makes this and the begin of the switch happen one after the other.
        let mut state = self.control.lock();
        if self.is_switching.load(Ordering::Acquire) {
            self.is_different.store(true, Ordering::Relaxed);
            return Err(error);
        }
        let failed = JobState::Failed(error.to_string());
        self.control.end(&mut state, failed);
        Ok(())
    }
}

/// What is done with a range of the disk.
enum Work {
    Copy,
    Zeroes,
    /// The target has it itself.
    Nothing,
}
