//! The io_urings of a card, which outlive its workers.

use std::sync::{Arc, Mutex, MutexGuard};

use super::packet_ring::PacketRing;
use crate::lock::lock;
use crate::tap::{Tap, TapQueue};

/// The rings of a pair of queues. A host without io_uring gives none.
#[derive(Default)]
pub(super) struct PairRings {
    pub(super) receive: Option<PacketRing>,
    pub(super) transmit: Option<PacketRing>,
}

impl PairRings {
    fn new(tap_queue: &TapQueue) -> PairRings {
        let ring = || PacketRing::new(tap_queue).ok();
        PairRings {
            receive: ring(),
            transmit: ring(),
        }
    }
}

/// A tap, and the rings over its queues for the next worker.
///
/// The rings are made with the device and not when its driver is ready: that is on the thread of a vCPU,
/// which may not be allowed to.
pub(super) struct RingStore {
    tap: Arc<Tap>,
    /// As many as the tap has queues.
    pairs: Mutex<Vec<PairRings>>,
}

impl RingStore {
    pub(super) fn new(tap: Arc<Tap>) -> RingStore {
        let pairs = tap.queues().iter().map(PairRings::new).collect();
        RingStore {
            pairs: Mutex::new(pairs),
            tap,
        }
    }

    pub(super) fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// The rings over a queue of the tap. Nobody else has them until they are given back.
    pub(super) fn take(&self, pair: usize) -> PairRings {
        let mut pairs = self.pairs();
        pairs.get_mut(pair).map(std::mem::take).unwrap_or_default()
    }

    /// Leaves the rings over a queue of the tap to the next worker.
    pub(super) fn give_back(&self, pair: usize, rings: PairRings) {
        if let Some(place) = self.pairs().get_mut(pair) {
            *place = rings;
        }
    }

    fn pairs(&self) -> MutexGuard<'_, Vec<PairRings>> {
        lock(&self.pairs)
    }
}
