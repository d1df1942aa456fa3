//! The switch to another disk.

use std::io;
use std::mem;

use event_manager::{EventOps, EventSet, Events};

use super::waiting::Waiting;
use super::{RING_EVENT, Worker, image_events};
use crate::virtio::block::disk_slot::{OpenDisk, Wish};
use crate::virtio::block::ring::Ring;

impl Worker {
    /// Takes the disk that the owner wants to be used, or forgets it.
    pub(super) fn look_for_disk(&mut self, operations: &mut EventOps<'_>) {
        match self.lease.wish() {
            Wish::Take(next) => {
                self.forget_next_disk(operations);
                self.next_disk = Some(next);
            }
            Wish::GiveUp => self.forget_next_disk(operations),
            Wish::None => {}
        }
    }

    /// Goes on with the present disk.
    fn forget_next_disk(&mut self, operations: &mut EventOps<'_>) {
        let Some(next) = self.next_disk.take() else {
            return;
        };
        if mem::take(&mut self.is_prepared)
            && let Some(ring) = &next.ring
        {
            self.stop_watching(ring, operations);
        }
        self.end_stall();
    }

    fn stop_watching(&self, ring: &Ring, operations: &mut EventOps<'_>) {
        // It fails if the ring is not watched any more because the device needs a reset.
        let _ = operations.remove(Events::with_data(ring, RING_EVENT, EventSet::IN));
    }

    /// Watches what the next disk needs.
    fn prepare(&mut self, operations: &mut EventOps<'_>) -> io::Result<()> {
        let failed = |error: event_manager::Error| io::Error::other(error.to_string());
        if self.image_work.is_none()
            && let Some(work) = self.lease.image_work()
        {
            operations.add(image_events(&work)).map_err(failed)?;
            self.image_work = Some(work);
        }
        if let Some(OpenDisk {
            ring: Some(ring), ..
        }) = &self.next_disk
        {
            let events = Events::with_data(ring, RING_EVENT, EventSet::IN);
            operations.add(events).map_err(failed)?;
        }
        Ok(())
    }

    /// Prepares for the next disk once no request to the present one is in progress, and switches to it when the
    /// owner has decided.
    pub(super) fn change_disk(&mut self, operations: &mut EventOps<'_>) {
        if self.next_disk.is_none() {
            return;
        }
        // Requests in progress of a device that needs a reset are not watched any more.
        if self.link.needs_reset()
            && let Err(error) = self.finish_all()
        {
            self.forget_next_disk(operations);
            self.lease.reject(error);
            return;
        }
        if self.in_flight_count() > 0 {
            return;
        }
        if !self.is_prepared {
            if let Err(error) = self.prepare(operations) {
                self.forget_next_disk(operations);
                self.lease.reject(error);
                return;
            }
            self.is_prepared = true;
            self.lease.is_at_rest();
        }
        if !self.lease.may_commit() {
            return;
        }
        let Some(OpenDisk { disk, ring }) = self.next_disk.take() else {
            return;
        };
        self.is_prepared = false;
        let old_ring = mem::replace(&mut self.ring, ring);
        if let Some(ring) = &old_ring {
            self.stop_watching(ring, operations);
        }
        self.handler.set_disk(disk.clone());
        self.waiting = Waiting::default();
        self.lease.commit(OpenDisk { disk, ring: None }, old_ring);
        self.end_stall();
    }
}
