//! The present disk of a block device, and its replacement by another.

mod exchange;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use bantam_storage::Disk;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(super) use exchange::{Exchanged, exchange_all};

use super::image_work::ImageWork;
use super::job::JobPlace;
use super::ring::Ring;
use super::{BlockMetrics, config_space};
use crate::lock::lock;
use crate::virtio::ConfigSpace;

/// A disk and the ring to use it with.
pub(super) struct OpenDisk {
    pub(super) disk: Arc<Disk>,
    /// A ring over the files of the disk, if the engine uses one.
    pub(super) ring: Option<Ring>,
}

/// State that the front of a block device, its worker and the owner of the machine share.
pub(super) struct DiskSlot {
    /// Held while the disk or its size is changed, so that this happens one at a time.
    changing: Mutex<()>,
    contents: Mutex<Contents>,
    /// Notified when the worker has come further with the next disk, and when it is gone.
    progress: Condvar,
    /// Signalled when the worker is to look at what the owner wants.
    event: EventFd,
    /// Whether there is a disk that the worker has not seen yet. While it waits for the worker, others may be held up.
    /// It is changed while `contents` are locked.
    is_urgent: AtomicBool,
    /// The work for a thread of the disk. Present from the first image on that is not raw.
    image_work: OnceLock<Arc<ImageWork>>,
    /// The job of the disk. It is begun and ended by those who hold the guard of [`DiskSlot::change`].
    pub(super) job: Mutex<Option<JobPlace>>,
    pub(super) config: ConfigSpace,
    queues: u16,
    pub(super) metrics: Arc<BlockMetrics>,
}

struct Contents {
    disk: Arc<Disk>,
    /// Over the files of the disk, for the next worker. It has no operation under way.
    ring: Option<Ring>,
    /// Whether one is at work on the disk.
    has_worker: bool,
    exchange: Exchange,
    /// When a worker has last stopped to begin requests because of an exchange.
    stopped: Option<Instant>,
}

/// The progress of a new disk on its way to the worker.
enum Exchange {
    /// There is none. A worker that has a disk all the same is to forget it.
    None,
    /// The disk is there for the worker to take.
    Wanted(OpenDisk),
    /// The worker has the disk. It begins no requests, and waits for those that are under way.
    Taken,
    /// The worker has the disk. No request is under way, and it begins none until the owner has decided.
    AtRest,
    /// The owner has decided that the worker is to switch to the disk.
    Decided,
    /// The worker is switching to the disk, which takes a moment.
    Committing,
    /// The outcome: the previous disk, or why it is still in use.
    Done(Result<OpenDisk, io::Error>),
}

/// What the owner wants of a worker.
#[expect(clippy::large_enum_variant, reason = "it is taken apart at once")]
pub(super) enum Wish {
    /// The worker is to go on with what it has been told.
    None,
    /// The worker is to end its requests, and then to report with [`DiskLease::is_at_rest`].
    Take(OpenDisk),
    /// The worker is to forget the disk that it has taken, if it has one.
    GiveUp,
}

impl AsRawFd for DiskSlot {
    /// Returns the event that is readable when the worker is to look at what the owner wants.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl DiskSlot {
    /// # Errors
    /// If the host is out of file descriptors.
    pub(super) fn new(open_disk: OpenDisk, queues: u16) -> io::Result<DiskSlot> {
        Ok(DiskSlot {
            config: ConfigSpace::new(config_space(&open_disk.disk, queues)),
            contents: Mutex::new(Contents {
                disk: open_disk.disk,
                ring: open_disk.ring,
                has_worker: false,
                exchange: Exchange::None,
                stopped: None,
            }),
            progress: Condvar::new(),
            changing: Mutex::new(()),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            is_urgent: AtomicBool::new(false),
            image_work: OnceLock::new(),
            job: Mutex::new(None),
            queues,
            metrics: Arc::default(),
        })
    }

    /// Returns the present disk.
    pub(super) fn disk(&self) -> Arc<Disk> {
        self.contents().disk.clone()
    }

    /// Returns the work for a thread of the disk, if the disk has had an image that is not raw.
    pub(super) fn image_work(&self) -> Option<Arc<ImageWork>> {
        self.image_work.get().cloned()
    }

    /// Has a thread do the work of images that are not raw, unless there is one already: `start` starts it. The
    /// caller holds the guard of [`DiskSlot::change`].
    ///
    /// # Errors
    /// Those of `start`, or if the host is out of file descriptors.
    pub(super) fn provide_image_work(
        &self,
        start: impl FnOnce(Arc<ImageWork>) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.image_work.get().is_some() {
            return Ok(());
        }
        let work = Arc::new(ImageWork::new()?);
        start(work.clone())?;
        // Nobody else sets it while the disk is being changed.
        let _ = self.image_work.set(work);
        Ok(())
    }

    /// Returns the disk for a worker, which is told of a replacement from now on, and the disk of a replacement
    /// that is under way already.
    pub(super) fn lease(self: &Arc<Self>) -> (OpenDisk, Option<OpenDisk>, DiskLease) {
        let mut contents = self.contents();
        contents.has_worker = true;
        let open_disk = OpenDisk {
            disk: contents.disk.clone(),
            ring: contents.ring.take(),
        };
        let next = contents.take_wanted();
        if next.is_some() {
            self.wake_worker();
        }
        (open_disk, next, DiskLease(self.clone()))
    }

    /// Whether the worker has another disk, and waits for the requests to the present one.
    #[cfg(test)]
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.contents().exchange, Exchange::Taken)
    }

    /// Keeps other threads from changing the disk or its size.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }

    /// Replaces the present disk by `new`, and returns the old one once no request uses it. `at_rest` is called
    /// when none does, and none is begun before it has returned. The caller holds the guard of
    /// [`DiskSlot::change`].
    ///
    /// # Errors
    /// If the worker cannot switch to `new`, or has not done so by `deadline`, as when requests to the present
    /// disk do not end; also those of `at_rest`. The present disk then stays.
    pub(super) fn exchange(
        &self,
        new: OpenDisk,
        at_rest: impl FnOnce() -> io::Result<()>,
        deadline: Instant,
    ) -> io::Result<OpenDisk> {
        let mut exchanged = exchange_all(vec![(self, new)], at_rest, deadline)?;
        exchanged.old.pop().ok_or_else(given_up)
    }

    /// Waits until no request uses the present disk, and none will before the owner has decided.
    fn wait_for_rest(&self, deadline: Instant) -> io::Result<()> {
        let mut contents = self.contents();
        loop {
            if let Exchange::Done(result) = &mut contents.exchange {
                let result = std::mem::replace(result, Err(given_up()));
                return result.map(drop);
            }
            if contents.is_at_rest() {
                return Ok(());
            }
            contents = self.wait(contents, Some(deadline)).ok_or_else(given_up)?;
        }
    }

    /// Has the worker switch to the next disk, or switches if there is no worker. The present disk is at rest.
    fn decide(&self, contents: &mut Contents) {
        match std::mem::replace(&mut contents.exchange, Exchange::Decided) {
            Exchange::Wanted(new) => {
                let old = self.put(contents, new);
                contents.exchange = Exchange::Done(Ok(old));
            }
            _ => self.wake_worker(),
        }
    }

    /// Returns the outcome of an exchange that is decided; without a `deadline`, after any time.
    fn outcome(&self, deadline: Option<Instant>) -> Option<io::Result<OpenDisk>> {
        let mut contents = self.contents();
        loop {
            match std::mem::replace(&mut contents.exchange, Exchange::None) {
                Exchange::Done(result) => return Some(result),
                other => contents.exchange = other,
            }
            contents = self.wait(contents, deadline)?;
        }
    }

    /// Has the present disk stay, whatever the worker has done so far.
    fn give_up(&self, contents: &mut Contents) {
        contents.exchange = Exchange::None;
        self.wake_worker();
    }

    /// Waits for progress until `deadline`.
    fn wait<'a>(
        &self,
        contents: MutexGuard<'a, Contents>,
        deadline: Option<Instant>,
    ) -> Option<MutexGuard<'a, Contents>> {
        let Some(deadline) = deadline else {
            let waited = self.progress.wait(contents);
            return Some(waited.unwrap_or_else(PoisonError::into_inner));
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        let waited = self.progress.wait_timeout(contents, left);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    fn wake_worker(&self) {
        // It fails only if the counter is full, and then the event is readable already.
        let _ = self.event.write(1);
    }

    /// Makes `new` the present disk, updates the configuration space, and returns the previous disk.
    fn put(&self, contents: &mut Contents, new: OpenDisk) -> OpenDisk {
        self.config.write(0, &config_space(&new.disk, self.queues));
        OpenDisk {
            disk: std::mem::replace(&mut contents.disk, new.disk),
            ring: std::mem::replace(&mut contents.ring, new.ring),
        }
    }

    fn finish(&self, contents: &mut Contents, result: io::Result<OpenDisk>) {
        contents.exchange = Exchange::Done(result);
        self.progress.notify_all();
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        lock(&self.contents)
    }
}

fn given_up() -> io::Error {
    let reason = "requests to the disk that is there do not end";
    io::Error::new(io::ErrorKind::TimedOut, reason)
}

impl Contents {
    fn take_wanted(&mut self) -> Option<OpenDisk> {
        match std::mem::replace(&mut self.exchange, Exchange::Taken) {
            Exchange::Wanted(new) => {
                self.stopped.get_or_insert_with(Instant::now);
                Some(new)
            }
            other => {
                self.exchange = other;
                None
            }
        }
    }

    /// Whether no request uses the present disk, and none will before the owner has decided.
    fn is_at_rest(&self) -> bool {
        match self.exchange {
            Exchange::AtRest => true,
            // The next worker takes it before it begins a request.
            Exchange::Wanted(_) => !self.has_worker,
            _ => false,
        }
    }
}

/// A worker's right to use the disk.
pub(super) struct DiskLease(Arc<DiskSlot>);

impl AsRawFd for DiskLease {
    /// Returns the event of the [`DiskSlot`].
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl DiskLease {
    pub(super) fn metrics(&self) -> &BlockMetrics {
        &self.0.metrics
    }

    /// Returns the work for a thread of the disk, as [`DiskSlot::image_work`] does.
    pub(super) fn image_work(&self) -> Option<Arc<ImageWork>> {
        self.0.image_work()
    }

    /// Whether the worker is to ask for the owner's wish soon.
    pub(super) fn is_urgent(&self) -> bool {
        self.0.is_urgent.load(Ordering::Relaxed)
    }

    /// Returns what the owner wants.
    pub(super) fn wish(&self) -> Wish {
        // The event is non-blocking: the read fails only if it was not signalled.
        let _ = self.0.event.read();
        let mut contents = self.0.contents();
        self.0.is_urgent.store(false, Ordering::Relaxed);
        if let Some(new) = contents.take_wanted() {
            return Wish::Take(new);
        }
        match contents.exchange {
            Exchange::None | Exchange::Done(_) => Wish::GiveUp,
            _ => Wish::None,
        }
    }

    /// Reports that no request uses the present disk, and that the worker can switch to the next one.
    pub(super) fn is_at_rest(&self) {
        let mut contents = self.0.contents();
        if let Exchange::Taken = contents.exchange {
            contents.exchange = Exchange::AtRest;
            self.0.progress.notify_all();
        }
    }

    /// Whether the worker is to switch to the next disk now. If so, it does so at once, and ends with
    /// [`DiskLease::commit`].
    pub(super) fn may_commit(&self) -> bool {
        let mut contents = self.0.contents();
        if let Exchange::Decided = contents.exchange {
            contents.exchange = Exchange::Committing;
        }
        matches!(contents.exchange, Exchange::Committing)
    }

    /// Reports that the worker uses the new disk. `new` has the ring for the next worker, unless this worker
    /// uses that ring; `old_ring` is the ring over the previous disk.
    pub(super) fn commit(&self, new: OpenDisk, old_ring: Option<Ring>) {
        let mut contents = self.0.contents();
        let mut old = self.0.put(&mut contents, new);
        old.ring = old_ring;
        self.0.finish(&mut contents, Ok(old));
    }

    /// Leaves the ring over the disk to the next worker. It must have no operation under way.
    pub(super) fn give_back(&self, ring: Ring) {
        self.0.contents().ring = Some(ring);
    }

    /// Leaves the disk that the worker has taken to the owner, or to the next worker.
    pub(super) fn leave(&self, next: OpenDisk) {
        let mut contents = self.0.contents();
        match contents.exchange {
            Exchange::Taken | Exchange::AtRest => contents.exchange = Exchange::Wanted(next),
            Exchange::Decided | Exchange::Committing => {
                let old = self.0.put(&mut contents, next);
                self.0.finish(&mut contents, Ok(old));
            }
            // The owner no longer wants it.
            Exchange::Wanted(_) | Exchange::Done(_) | Exchange::None => {}
        }
    }

    /// Reports that the worker cannot use the disk that it has taken.
    pub(super) fn reject(&self, error: io::Error) {
        let mut contents = self.0.contents();
        // Otherwise the owner no longer wants it.
        if let Exchange::Taken = contents.exchange {
            self.0.finish(&mut contents, Err(error));
        }
    }
}

impl Drop for DiskLease {
    fn drop(&mut self) {
        self.0.contents().has_worker = false;
        self.0.progress.notify_all();
    }
}

#[cfg(test)]
mod tests;
