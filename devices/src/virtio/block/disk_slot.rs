//! The present disk of a block device, and its replacement by another.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bantam_storage::Disk;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

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
    /// Notified when there is an outcome.
    done: Condvar,
    /// Signalled when there is another disk for the worker to take.
    event: EventFd,
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
}

/// The progress of a new disk on its way to the worker.
enum Exchange {
    None,
    /// The disk is there for the worker to take.
    Wanted(OpenDisk),
    /// The worker has the disk, and waits for the requests to the previous one.
    UnderWay,
    /// The worker has the disk, as in [`Exchange::UnderWay`], but the owner no longer waits for it: the
    /// previous disk stays.
    GivenUp,
    /// The worker is switching to the disk, which takes a moment.
    Committing,
    /// The outcome: the previous disk, or why it is still in use.
    Done(Result<OpenDisk, io::Error>),
}

impl AsRawFd for DiskSlot {
    /// Returns the event that is readable when the worker is to look for another disk.
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
            }),
            done: Condvar::new(),
            changing: Mutex::new(()),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            queues,
            metrics: Arc::default(),
        })
    }

    /// Returns the present disk.
    pub(super) fn disk(&self) -> Arc<Disk> {
        self.contents().disk.clone()
    }

    /// Returns the disk for a worker, which is told of a replacement from now on.
    pub(super) fn lease(self: &Arc<Self>) -> (OpenDisk, DiskLease) {
        let mut contents = self.contents();
        contents.has_worker = true;
        let open_disk = OpenDisk {
            disk: contents.disk.clone(),
            ring: contents.ring.take(),
        };
        (open_disk, DiskLease(self.clone()))
    }

    /// Whether the worker has another disk, and waits for the requests to the present one.
    #[cfg(test)]
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.contents().exchange, Exchange::UnderWay)
    }

    /// Keeps other threads from changing the disk or its size.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }

    /// Replaces the present disk by `new`, and returns the old one once no request uses it. The caller holds
    /// the guard of [`DiskSlot::change`].
    ///
    /// # Errors
    /// If the worker cannot switch to `new`, or has not done so by `deadline`, as when requests to the present
    /// disk do not end. The present disk then stays.
    pub(super) fn exchange(&self, new: OpenDisk, deadline: Instant) -> io::Result<OpenDisk> {
        let mut contents = self.contents();
        if Instant::now() >= deadline {
            return Err(given_up());
        }
        if !contents.has_worker {
            return Ok(self.put(&mut contents, new));
        }
        contents.exchange = Exchange::Wanted(new);
        // It fails only if the counter is full, and then the event is readable already.
        let _ = self.event.write(1);
        loop {
            match std::mem::replace(&mut contents.exchange, Exchange::None) {
                Exchange::Done(result) => return result,
                other => contents.exchange = other,
            }
            if matches!(contents.exchange, Exchange::Committing) {
                let waited = self.done.wait(contents);
                contents = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                contents.exchange = match contents.exchange {
                    Exchange::UnderWay => Exchange::GivenUp,
                    _ => Exchange::None,
                };
                return Err(given_up());
            }
            let waited = self.done.wait_timeout(contents, left);
            contents = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
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
        self.done.notify_all();
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
        match std::mem::replace(&mut self.exchange, Exchange::UnderWay) {
            Exchange::Wanted(new) => Some(new),
            other => {
                self.exchange = other;
                None
            }
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

    /// Takes the disk that is to be used as soon as no request uses the present one, if there is one. The
    /// worker answers with [`DiskLease::commit`] or [`DiskLease::reject`].
    pub(super) fn take_wanted(&self) -> Option<OpenDisk> {
        // The event is non-blocking: the read fails only if it was not signalled.
        let _ = self.0.event.read();
        self.0.contents().take_wanted()
    }

    /// Whether the next disk is still wanted, now that no request uses the previous one. If so, the worker
    /// answers at once.
    pub(super) fn may_commit(&self) -> bool {
        let mut contents = self.0.contents();
        match contents.exchange {
            Exchange::UnderWay => contents.exchange = Exchange::Committing,
            Exchange::GivenUp => contents.exchange = Exchange::None,
            // It was given up, and there is another to be taken.
            _ => {}
        }
        matches!(contents.exchange, Exchange::Committing)
    }

    /// Reports that no request uses the previous disk any more. `new` has the ring for the next worker,
    /// unless this worker uses that ring; `old_ring` is the ring over the previous disk.
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

    /// Reports that the worker stays with the disk that it has.
    pub(super) fn reject(&self, error: io::Error) {
        let mut contents = self.0.contents();
        match contents.exchange {
            Exchange::UnderWay | Exchange::Committing => self.0.finish(&mut contents, Err(error)),
            Exchange::GivenUp => contents.exchange = Exchange::None,
            // It was given up, and there is another to be taken.
            _ => {}
        }
    }
}

impl Drop for DiskLease {
    fn drop(&mut self) {
        let mut contents = self.0.contents();
        contents.has_worker = false;
        if let Some(new) = contents.take_wanted() {
            let old = self.0.put(&mut contents, new);
            self.0.finish(&mut contents, Ok(old));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use bantam_storage::{DiskFile, DiskOptions};
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    /// Longer than any exchange here takes.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn open_disk(folder: &Path, name: &str) -> OpenDisk {
        let path = folder.join(name);
        fs::write(&path, [0; 512]).unwrap();
        let disk = DiskFile::open(&path, &DiskOptions::default()).unwrap();
        OpenDisk {
            disk: Arc::new(disk.into()),
            ring: None,
        }
    }

    /// Waits until the owner wants another disk.
    fn take(lease: &DiskLease) -> OpenDisk {
        loop {
            match lease.take_wanted() {
                Some(wanted) => return wanted,
                None => std::thread::yield_now(),
            }
        }
    }

    #[test]
    fn a_disk_that_was_given_up_does_not_take_the_place_of_the_next() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slot = Arc::new(DiskSlot::new(open_disk(folder, "a"), 1).unwrap());
        let (_, lease) = slot.lease();
        std::thread::scope(|scope| {
            // The worker has the second disk when the owner gives it up, and the third comes before the
            // requests to the first have ended.
            slot.contents().exchange = Exchange::GivenUp;
            let owner =
                scope.spawn(|| slot.exchange(open_disk(folder, "c"), Instant::now() + PATIENCE));
            while !matches!(slot.contents().exchange, Exchange::Wanted(_)) {
                std::thread::yield_now();
            }
            assert!(!lease.may_commit());
            lease.reject(io::ErrorKind::Other.into());
            let third = take(&lease);
            assert!(lease.may_commit());
            lease.commit(third, None);
            let before = owner.join().unwrap().unwrap();
            assert_eq!(before.disk.path(), folder.join("a"));
        });
        assert_eq!(slot.disk().path(), folder.join("c"));
    }

    #[test]
    fn a_disk_that_comes_too_late_is_refused() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slot = DiskSlot::new(open_disk(folder, "a"), 1).unwrap();
        let exchanged = slot.exchange(open_disk(folder, "b"), Instant::now());
        assert_eq!(exchanged.err().unwrap().kind(), io::ErrorKind::TimedOut);
        assert_eq!(slot.disk().path(), folder.join("a"));
    }

    #[test]
    fn a_disk_that_was_given_up_is_let_go() {
        let folder = TempDir::new().unwrap();
        let slot = Arc::new(DiskSlot::new(open_disk(folder.as_path(), "a"), 1).unwrap());
        let (_, lease) = slot.lease();
        slot.contents().exchange = Exchange::GivenUp;
        assert!(!lease.may_commit());
        assert!(matches!(slot.contents().exchange, Exchange::None));
    }
}
