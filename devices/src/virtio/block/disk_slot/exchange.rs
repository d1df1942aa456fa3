//! The exchange of the disks of one or several devices.

use std::io;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Contents, DiskSlot, Exchange, OpenDisk, given_up};

/// What an exchange of disks leaves.
pub(in crate::virtio::block) struct Exchanged {
    pub(in crate::virtio::block) old: Vec<OpenDisk>,
    /// For how long no requests were begun to one of the disks.
    pub(in crate::virtio::block) held_up: Duration,
}

/// Replaces the disks of several devices at one instant, and returns the old ones. At this instant, no request
/// to any of them is under way; those that were begun before are done with the old disks, and all others with
/// the new ones. `at_rest` is called when no request is under way any more, and none is begun before it has
/// returned. The caller holds the guards of [`DiskSlot::change`].
///
/// # Errors
/// If a worker cannot switch, or the workers do not come to rest by `deadline`; also those of `at_rest`. All
/// present disks then stay.
pub(in crate::virtio::block) fn exchange_all(
    exchanges: Vec<(&DiskSlot, OpenDisk)>,
    at_rest: impl FnOnce() -> io::Result<()>,
    deadline: Instant,
) -> io::Result<Exchanged> {
    let mut slots = Vec::with_capacity(exchanges.len());
    for (slot, new) in exchanges {
        let mut contents = slot.contents();
        contents.exchange = Exchange::Wanted(new);
        contents.stopped = None;
        slot.is_urgent.store(true, Ordering::Relaxed);
        drop(contents);
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
