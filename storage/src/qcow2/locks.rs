//! Locks on clusters of the disk, and syncs that several requests share.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::sync::{RwLockWriteGuard, TryLockError};

use crate::ImageFile;

/// Locks `mutex`, whether or not a thread has panicked while it held it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `mutex` if that needs no waiting.
pub(super) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Locks `lock` for reading.
pub(super) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `lock` for reading if that needs no waiting.
pub(super) fn try_read<T>(lock: &RwLock<T>) -> Option<RwLockReadGuard<'_, T>> {
    match lock.try_read() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Locks `lock` for writing.
pub(super) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// All clusters of the disk.
pub(crate) const ALL: Range<u64> = 0..u64::MAX;

/// Locks on ranges of clusters of the disk, shared or exclusive, granted in the order of requests.
///
/// A request holds at most one of them, so there are no deadlocks.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    entries: Mutex<VecDeque<Entry>>,
    released: Condvar,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    range: Range<u64>,
    exclusive: bool,
}

impl Entry {
    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.range.start < range.end && range.start < self.range.end
    }
}

/// Adds an entry, and returns its identifier.
fn push(entries: &mut VecDeque<Entry>, range: Range<u64>, exclusive: bool) -> u64 {
    let id = entries.back().map_or(0, |entry| entry.id + 1);
    entries.push_back(Entry {
        id,
        range,
        exclusive,
    });
    id
}

/// A lock on a range, held until it is dropped.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl RangeLocks {
    /// Waits until nobody changes the mapping of `range`.
    pub fn shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, false)
    }

    /// Waits until nobody uses the mapping of `range`.
    pub fn exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.acquire(range, true)
    }

    /// Returns an exclusive lock on `range` if nobody uses or awaits any of it.
    pub fn try_exclusive(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        let mut entries = lock(&self.entries);
        let is_used = entries.iter().any(|entry| entry.overlaps(&range));
        (!is_used).then(|| RangeGuard {
            locks: self,
            id: push(&mut entries, range, true),
        })
    }

    fn acquire(&self, range: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        let mut entries = lock(&self.entries);
        let id = push(&mut entries, range.clone(), exclusive);
        let conflicts = |entries: &mut VecDeque<Entry>| {
            entries
                .iter()
                .take_while(|entry| entry.id != id)
                .any(|entry| (exclusive || entry.exclusive) && entry.overlaps(&range))
        };
        drop(
            self.released
                .wait_while(entries, conflicts)
                .unwrap_or_else(PoisonError::into_inner),
        );
        RangeGuard { locks: self, id }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut entries = lock(&self.locks.entries);
        if let Some(index) = entries.iter().position(|entry| entry.id == self.id) {
            entries.remove(index);
        }
        let is_awaited = !entries.is_empty();
        drop(entries);
        if is_awaited {
            self.locks.released.notify_all();
        }
    }
}

/// Syncs the file. Concurrent requests share a sync.
///
/// A sync that has failed is the last one: the host may have dropped what it could not write, and would
/// report success for the next sync all the same. Nobody knows then what is on stable storage, which the order
/// of writes depends on.
#[derive(Debug)]
pub(super) struct SyncGate {
    file: Arc<dyn ImageFile>,
    state: Mutex<SyncState>,
    finished: Condvar,
    failed: AtomicBool,
}

#[derive(Debug, Default)]
struct SyncState {
    begun: u64,
    done: u64,
    is_running: bool,
}

impl SyncGate {
    pub fn new(file: Arc<dyn ImageFile>) -> SyncGate {
        SyncGate {
            file,
            state: Mutex::default(),
            finished: Condvar::new(),
            failed: AtomicBool::new(false),
        }
    }

    /// Refuses writes if a sync has failed.
    pub fn check(&self) -> io::Result<()> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(io::Error::other(
                "the host has failed to write the image, which takes writes when it is opened again",
            ));
        }
        Ok(())
    }

    /// Ends syncs as one that has failed does: it is not known what the file holds.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Brings to stable storage what has been written before this call.
    pub fn sync(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        // One that runs already may have passed by what was written meanwhile.
        let wanted = state.begun + 1;
        loop {
            self.check()?;
            if state.done >= wanted {
                return Ok(());
            }
            if state.is_running {
                state = self
                    .finished
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.is_running = true;
            state.begun += 1;
            let begun = state.begun;
            drop(state);
            let result = self.file.sync();
            state = lock(&self.state);
            state.is_running = false;
            match result {
                Ok(()) => state.done = begun,
                Err(error) => {
                    self.fail();
                    self.finished.notify_all();
                    return Err(error);
                }
            }
            self.finished.notify_all();
        }
    }
}
