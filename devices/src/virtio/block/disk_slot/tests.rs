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
        let owner = scope.spawn(move || slot.exchange(open_disk(folder, "b"), || Ok(()), deadline));
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
