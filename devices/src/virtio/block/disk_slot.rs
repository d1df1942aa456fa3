//! The present disk of a block device, and its replacement by another.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bantam_storage::Disk;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

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

/// What an exchange of disks leaves.
pub(super) struct Exchanged {
    pub(super) old: Vec<OpenDisk>,
    /// For how long no requests were begun to one of the disks.
    pub(super) held_up: Duration,
}

/// Replaces the disks of several devices at one instant, and returns the old ones. At this instant, no request
/// to any of them is under way; those that were begun before are done with the old disks, and all others with
/// the new ones. `at_rest` is called when no request is under way any more, and none is begun before it has
/// returned. The caller holds the guards of [`DiskSlot::change`].
///
/// # Errors
/// If a worker cannot switch, or the workers do not come to rest by `deadline`; also those of `at_rest`. All
/// present disks then stay.
pub(super) fn exchange_all(
    exchanges: Vec<(&DiskSlot, OpenDisk)>,
    at_rest: impl FnOnce() -> io::Result<()>,
    deadline: Instant,
) -> io::Result<Exchanged> {
    let mut slots = Vec::with_capacity(exchanges.len());
    for (slot, new) in exchanges {
        let mut contents = slot.contents();
        contents.exchange = Exchange::Wanted(new);
        contents.stopped = None;
        drop(contents);
        slot.is_urgent.store(true, Ordering::Relaxed);
        slot.wake_worker();
        slots.push(slot);
    }
    let exchanged = bring_to_rest(&slots, deadline)
        .and_then(|()| at_rest())
        .and_then(|()| decide_all(&slots, deadline))
        .and_then(|()| outcomes(&slots, deadline));
    if exchanged.is_err() {
        for slot in &slots {
            slot.give_up(&mut slot.contents());
        }
    }
    let stopped = slots
        .iter()
        .filter_map(|slot| slot.contents().stopped)
        .min();
    let held_up = stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed());
    Ok(Exchanged {
        old: exchanged?,
        held_up,
    })
}

fn bring_to_rest(slots: &[&DiskSlot], deadline: Instant) -> io::Result<()> {
    slots
        .iter()
        .try_for_each(|slot| slot.wait_for_rest(deadline))
}

/// Decides for the new disks of `slots`, which all are at rest at that moment.
fn decide_all(slots: &[&DiskSlot], deadline: Instant) -> io::Result<()> {
    loop {
        if Instant::now() >= deadline {
            return Err(given_up());
        }
        // A worker that is made meanwhile begins no requests, but has yet to prepare itself for the switch.
        bring_to_rest(slots, deadline)?;
        let mut all: Vec<_> = slots.iter().map(|slot| slot.contents()).collect();
        if all.iter().all(|contents| contents.is_at_rest()) {
            for (slot, contents) in slots.iter().zip(&mut all) {
                slot.decide(contents);
            }
            return Ok(());
        }
    }
}

/// Waits until the workers have switched.
fn outcomes(slots: &[&DiskSlot], deadline: Instant) -> io::Result<Vec<OpenDisk>> {
    let mut old = Vec::with_capacity(slots.len());
    for slot in slots {
        let outcome = match slot.outcome(Some(deadline)) {
            Some(outcome) => outcome,
            // An event loop that the host holds up may have seen nothing of it.
            None if old.is_empty() && revoke_all(slots) => return Err(given_up()),
            None => slot.outcome(None).unwrap_or_else(|| Err(given_up())),
        };
        old.push(outcome?);
    }
    Ok(old)
}

/// Takes back the decision for the new disks, unless one of them is in use already.
fn revoke_all(slots: &[&DiskSlot]) -> bool {
    let mut all: Vec<_> = slots.iter().map(|slot| slot.contents()).collect();
    let is_seen =
        |contents: &MutexGuard<'_, Contents>| !matches!(contents.exchange, Exchange::Decided);
    if all.iter().any(is_seen) {
        return false;
    }
    for (slot, contents) in slots.iter().zip(&mut all) {
        slot.give_up(contents);
    }
    true
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
        self.0.is_urgent.store(false, Ordering::Relaxed);
        // The event is non-blocking: the read fails only if it was not signalled.
        let _ = self.0.event.read();
        let mut contents = self.0.contents();
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
mod tests {
    use std::fs;
    use std::path::Path;

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

    fn open_slot(folder: &Path, name: &str) -> Arc<DiskSlot> {
        Arc::new(DiskSlot::new(open_disk(folder, name), 1).unwrap())
    }

    fn soon() -> Instant {
        Instant::now() + PATIENCE
    }

    /// Waits until the owner wants another disk.
    fn take(lease: &DiskLease) -> OpenDisk {
        loop {
            match lease.wish() {
                Wish::Take(wanted) => return wanted,
                _ => std::thread::yield_now(),
            }
        }
    }

    /// Waits until the owner has decided.
    fn commit(lease: &DiskLease, new: OpenDisk) {
        while !lease.may_commit() {
            std::thread::yield_now();
        }
        lease.commit(new, None);
    }

    #[test]
    fn a_disk_that_was_given_up_does_not_take_the_place_of_the_next() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slot = open_slot(folder, "a");
        let (_, _, lease) = slot.lease();
        std::thread::scope(|scope| {
            // The owner has given up the second disk, which the worker has, and the third comes before the
            // requests to the first have ended.
            let owner = scope.spawn(|| slot.exchange(open_disk(folder, "c"), || Ok(()), soon()));
            while !matches!(slot.contents().exchange, Exchange::Wanted(_)) {
                std::thread::yield_now();
            }
            lease.is_at_rest();
            assert!(!lease.may_commit());
            lease.reject(io::ErrorKind::Other.into());
            let third = take(&lease);
            assert!(!lease.may_commit());
            lease.is_at_rest();
            commit(&lease, third);
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
        let exchanged = slot.exchange(open_disk(folder, "b"), || Ok(()), Instant::now());
        assert_eq!(exchanged.err().unwrap().kind(), io::ErrorKind::TimedOut);
        assert_eq!(slot.disk().path(), folder.join("a"));
    }

    #[test]
    fn disks_that_were_given_up_are_let_go() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slot = open_slot(folder, "a");
        let (_, _, lease) = slot.lease();
        let exchange = |name| {
            let deadline = Instant::now() + Duration::from_millis(50);
            let exchanged = slot.exchange(open_disk(folder, name), || Ok(()), deadline);
            assert!(exchanged.is_err());
        };
        std::thread::scope(|scope| {
            let owner = scope.spawn(|| exchange("b"));
            let _second = take(&lease);
            owner.join().unwrap();
        });
        // The worker has seen neither the end of this one nor the next.
        exchange("c");
        assert!(!lease.may_commit());
        assert!(matches!(lease.wish(), Wish::GiveUp));
    }

    #[test]
    fn a_decision_that_no_worker_has_seen_is_taken_back() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slot = open_slot(folder, "a");
        let (_, _, lease) = slot.lease();
        std::thread::scope(|scope| {
            let deadline = Instant::now() + Duration::from_millis(200);
            let owner =
                scope.spawn(move || slot.exchange(open_disk(folder, "b"), || Ok(()), deadline));
            let _second = take(&lease);
            lease.is_at_rest();
            let error = owner.join().unwrap().err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        });
        assert!(!lease.may_commit());
        assert!(matches!(lease.wish(), Wish::GiveUp));
    }

    #[test]
    fn disks_are_exchanged_when_all_are_at_rest() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slots = [open_slot(folder, "a"), open_slot(folder, "b")];
        let leases = [&slots[0], &slots[1]].map(|slot| slot.lease().2);
        let is_at_rest = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let owner = scope.spawn(|| {
                let new = ["c", "d"].map(|name| open_disk(folder, name));
                let pairs = slots.iter().map(|slot| &**slot).zip(new).collect();
                let at_rest = || {
                    is_at_rest.store(true, Ordering::SeqCst);
                    Ok(())
                };
                exchange_all(pairs, at_rest, soon())
            });
            let [first, second] = &leases;
            let next = take(first);
            first.is_at_rest();
            std::thread::sleep(Duration::from_millis(50));
            assert!(!first.may_commit() && !is_at_rest.load(Ordering::SeqCst));
            // The worker of the second device ends, and another begins while the disk is held.
            let given = take(second);
            second.leave(given);
            let next_of_second = loop {
                if let Wish::Take(next) = second.wish() {
                    break next;
                }
            };
            second.is_at_rest();
            commit(first, next);
            assert!(is_at_rest.load(Ordering::SeqCst));
            commit(second, next_of_second);
            let exchanged = owner.join().unwrap().unwrap();
            assert!(exchanged.held_up >= Duration::from_millis(50));
            let old: Vec<_> = exchanged
                .old
                .iter()
                .map(|old| old.disk.path().to_owned())
                .collect();
            assert_eq!(old, ["a", "b"].map(|name| folder.join(name)));
        });
    }

    #[test]
    fn no_disk_is_exchanged_if_one_cannot_be() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slots = [open_slot(folder, "a"), open_slot(folder, "b")];
        let (_, _, lease) = slots[0].lease();
        let exchange = |at_rest: fn() -> io::Result<()>, deadline| {
            let new = ["c", "d"].map(|name| open_disk(folder, name));
            let pairs = slots.iter().map(|slot| &**slot).zip(new).collect();
            exchange_all(pairs, at_rest, deadline).err().unwrap()
        };
        let stay = || {
            for (slot, name) in slots.iter().zip(["a", "b"]) {
                assert_eq!(slot.disk().path(), folder.join(name));
                assert!(matches!(slot.contents().exchange, Exchange::None));
            }
        };
        // Requests to the first do not end.
        let error = exchange(|| Ok(()), Instant::now() + Duration::from_millis(50));
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        stay();
        std::thread::scope(|scope| {
            let owner = scope.spawn(|| exchange(|| Ok(()), soon()));
            drop(take(&lease));
            lease.reject(io::ErrorKind::OutOfMemory.into());
            assert_eq!(owner.join().unwrap().kind(), io::ErrorKind::OutOfMemory);
            stay();
            let fail = || Err(io::ErrorKind::StorageFull.into());
            let owner = scope.spawn(move || exchange(fail, soon()));
            drop(take(&lease));
            lease.is_at_rest();
            assert_eq!(owner.join().unwrap().kind(), io::ErrorKind::StorageFull);
            assert!(!lease.may_commit());
            assert!(matches!(lease.wish(), Wish::GiveUp));
            stay();
        });
    }

    #[test]
    fn a_new_worker_begins_with_the_disk_that_is_wanted() {
        let folder = TempDir::new().unwrap();
        let folder = folder.as_path();
        let slot = open_slot(folder, "a");
        std::thread::scope(|scope| {
            let (_, _, lease) = slot.lease();
            let owner = scope.spawn(|| slot.exchange(open_disk(folder, "b"), || Ok(()), soon()));
            while !matches!(slot.contents().exchange, Exchange::Wanted(_)) {
                std::thread::yield_now();
            }
            let (_, next, second) = slot.lease();
            assert_eq!(next.as_ref().unwrap().disk.path(), folder.join("b"));
            std::mem::forget(lease);
            second.is_at_rest();
            commit(&second, next.unwrap());
            owner.join().unwrap().unwrap();
        });
    }
}
