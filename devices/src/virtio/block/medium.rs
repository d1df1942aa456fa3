//! The disk that is in a block device now, and how another takes its place.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::Ring;
use super::{BlockMetrics, config_space};
use crate::disk::DiskFile;
use crate::virtio::ConfigSpace;

/// A disk with what it takes to use it.
pub(super) struct Loaded {
    pub(super) disk: Arc<DiskFile>,
    /// Over the files of the disk, where the engine uses one.
    pub(super) ring: Option<Ring>,
}

/// How long requests to a disk may take before another does not take its place.
const EXCHANGE_TIME: Duration = Duration::from_secs(30);

/// What the front of a block device, its worker and the owner of the machine share.
pub(super) struct Medium {
    /// Held by who changes the disk or its size, one at a time.
    changing: Mutex<()>,
    slot: Mutex<Slot>,
    /// When there is an outcome.
    done: Condvar,
    /// Signalled when the worker is to take another disk.
    event: EventFd,
    pub(super) config: ConfigSpace,
    queues: u16,
    pub(super) metrics: Arc<BlockMetrics>,
}

struct Slot {
    disk: Arc<DiskFile>,
    /// Made for the disk beforehand, for the next worker.
    ring: Option<Ring>,
    has_worker: bool,
    exchange: Exchange,
}

/// How far a disk is on its way to the worker.
enum Exchange {
    None,
    /// For the worker to take.
    Wanted(Loaded),
    /// The worker has it, and waits for the requests to the one before it.
    UnderWay,
    /// As [`Exchange::UnderWay`], but nobody waits for it any more: the one before it stays.
    GivenUp,
    /// The worker is changing over, which takes a moment.
    Settling,
    /// What came of it: the disk before, or why it is still there.
    Done(Result<Loaded, io::Error>),
}

impl AsRawFd for Medium {
    /// Readable when the worker is to look for another disk.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Medium {
    /// # Errors
    /// When the host gives no file descriptor.
    pub(super) fn new(loaded: Loaded, queues: u16) -> io::Result<Medium> {
        Ok(Medium {
            config: ConfigSpace::new(config_space(&loaded.disk, queues)),
            slot: Mutex::new(Slot {
                disk: loaded.disk,
                ring: loaded.ring,
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

    /// The disk.
    pub(super) fn disk(&self) -> Arc<DiskFile> {
        self.slot().disk.clone()
    }

    /// Whether a worker uses the disk.
    pub(super) fn has_worker(&self) -> bool {
        self.slot().has_worker
    }

    /// The disk for a worker, which hears of another from now on.
    pub(super) fn lend(self: &Arc<Self>) -> (Loaded, Loan) {
        let mut slot = self.slot();
        slot.has_worker = true;
        let loaded = Loaded {
            disk: slot.disk.clone(),
            ring: slot.ring.take(),
        };
        (loaded, Loan(self.clone()))
    }

    /// Keeps others from changing the disk or its size.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a disk in the place of the one that is there, and gives that back once no request uses it.
    /// The caller has [`Medium::change`].
    ///
    /// # Errors
    /// When the worker cannot change over, or requests to the disk that is there take longer than
    /// [`EXCHANGE_TIME`]; that disk stays.
    pub(super) fn exchange(&self, new: Loaded) -> io::Result<Loaded> {
        let deadline = Instant::now() + EXCHANGE_TIME;
        let mut slot = self.slot();
        if !slot.has_worker {
            return Ok(self.put(&mut slot, new));
        }
        slot.exchange = Exchange::Wanted(new);
        // It fails only when the counter is full, and then it is readable as wanted.
        let _ = self.event.write(1);
        loop {
            match std::mem::replace(&mut slot.exchange, Exchange::None) {
                Exchange::Done(result) => return result,
                other => slot.exchange = other,
            }
            if matches!(slot.exchange, Exchange::Settling) {
                let waited = self.done.wait(slot);
                slot = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                slot.exchange = match slot.exchange {
                    Exchange::UnderWay => Exchange::GivenUp,
                    _ => Exchange::None,
                };
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "requests to the disk that is there do not end",
                ));
            }
            let waited = self.done.wait_timeout(slot, left);
            slot = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes `new` the disk and tells the driver's configuration space so. Gives the one before.
    fn put(&self, slot: &mut Slot, new: Loaded) -> Loaded {
        self.config.write(0, &config_space(&new.disk, self.queues));
        Loaded {
            disk: std::mem::replace(&mut slot.disk, new.disk),
            ring: std::mem::replace(&mut slot.ring, new.ring),
        }
    }

    fn finish(&self, slot: &mut Slot, result: io::Result<Loaded>) {
        slot.exchange = Exchange::Done(result);
        self.done.notify_all();
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        // No change leaves it half done, even one that panics.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn take_wanted(&mut self) -> Option<Loaded> {
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
pub(super) struct Loan(Arc<Medium>);

impl AsRawFd for Loan {
    /// As that of the [`Medium`].
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Loan {
    pub(super) fn metrics(&self) -> &BlockMetrics {
        &self.0.metrics
    }

    /// The disk that is to be used as soon as no request uses the one before. The worker answers with
    /// [`Loan::settle`] or [`Loan::refuse`].
    pub(super) fn take_wanted(&self) -> Option<Loaded> {
        // The event is non-blocking: it fails only where nobody has signalled it.
        let _ = self.0.event.read();
        self.0.slot().take_wanted()
    }

    /// Whether the next disk is still wanted, now that no request uses the one before. If so, the worker
    /// answers at once.
    pub(super) fn may_settle(&self) -> bool {
        let mut slot = self.0.slot();
        match slot.exchange {
            Exchange::UnderWay => slot.exchange = Exchange::Settling,
            Exchange::GivenUp => slot.exchange = Exchange::None,
            // It was given up, and there is another to be taken.
            _ => {}
        }
        matches!(slot.exchange, Exchange::Settling)
    }

    /// Tells that no request uses the disk before any more. `new` has the ring for the next worker,
    /// unless this one uses it; `old_ring` is that over the disk before.
    pub(super) fn settle(&self, new: Loaded, old_ring: Option<Ring>) {
        let mut slot = self.0.slot();
        let mut old = self.0.put(&mut slot, new);
        old.ring = old_ring;
        self.0.finish(&mut slot, Ok(old));
    }

    /// Tells that the worker goes on with the disk that it has.
    pub(super) fn refuse(&self, error: io::Error) {
        let mut slot = self.0.slot();
        match slot.exchange {
            Exchange::UnderWay | Exchange::Settling => self.0.finish(&mut slot, Err(error)),
            Exchange::GivenUp => slot.exchange = Exchange::None,
            // It was given up, and there is another to be taken.
            _ => {}
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let mut slot = self.0.slot();
        slot.has_worker = false;
        if let Some(new) = slot.take_wanted() {
            let old = self.0.put(&mut slot, new);
            self.0.finish(&mut slot, Ok(old));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::disk::DiskOptions;

    fn loaded(folder: &Path, name: &str) -> Loaded {
        let path = folder.join(name);
        fs::write(&path, [0; 512]).unwrap();
        let disk = DiskFile::open(&path, &DiskOptions::default()).unwrap();
        Loaded {
            disk: Arc::new(disk),
            ring: None,
        }
    }

    /// Waits until the owner wants another disk.
    fn take(loan: &Loan) -> Loaded {
        loop {
            match loan.take_wanted() {
                Some(wanted) => return wanted,
                None => std::thread::yield_now(),
            }
        }
    }

    #[test]
    fn a_disk_that_was_given_up_does_not_take_the_place_of_the_next() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let medium = Arc::new(Medium::new(loaded(folder, "a"), 1).unwrap());
        let (_, loan) = medium.lend();
        std::thread::scope(|scope| {
            // The worker has the second when the owner gives it up, and the third comes before the
            // requests to the first end.
            medium.slot().exchange = Exchange::GivenUp;
            let owner = scope.spawn(|| medium.exchange(loaded(folder, "c")));
            while !matches!(medium.slot().exchange, Exchange::Wanted(_)) {
                std::thread::yield_now();
            }
            assert!(!loan.may_settle());
            loan.refuse(io::ErrorKind::Other.into());
            let third = take(&loan);
            assert!(loan.may_settle());
            loan.settle(third, None);
            let before = owner.join().unwrap().unwrap();
            assert_eq!(before.disk.path(), folder.join("a"));
        });
        assert_eq!(medium.disk().path(), folder.join("c"));
    }

    #[test]
    fn a_disk_that_was_given_up_is_let_go() {
        let folder = TempDir::new().unwrap();
        let medium = Arc::new(Medium::new(loaded(folder.as_path(), "a"), 1).unwrap());
        let (_, loan) = medium.lend();
        medium.slot().exchange = Exchange::GivenUp;
        assert!(!loan.may_settle());
        assert!(matches!(medium.slot().exchange, Exchange::None));
    }
}
