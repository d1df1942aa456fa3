//! The io_urings of a card, which outlive its workers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::backend::{NetBackend, NetQueue};
use super::packet_ring::PacketRing;
use crate::lock::lock;

/// The rings of a pair of queues. A host without io_uring gives none, and a queue that is not a file takes
/// none.
#[derive(Default)]
pub(super) struct PairRings {
    pub(super) receive: Option<PacketRing>,
    pub(super) transmit: Option<PacketRing>,
}

impl PairRings {
    fn new(queue: &dyn NetQueue) -> PairRings {
        let ring = || PacketRing::new(queue.packet_file()?).ok();
        PairRings {
            receive: ring(),
            transmit: ring(),
        }
    }
}

/// A backend, and the rings over its queues for the next worker.
///
/// The rings are made with the device and not when its driver is ready: that is on the thread of a vCPU,
/// which may not be allowed to.
pub(super) struct RingStore {
    backend: Arc<dyn NetBackend>,
    backend_is_gone: AtomicBool,
    /// One for each queue of the backend.
    pairs: Mutex<Vec<PairRings>>,
}

impl RingStore {
    pub(super) fn new(backend: Arc<dyn NetBackend>) -> RingStore {
        let queues = (0..backend.queue_count()).filter_map(|index| backend.queue(index));
        let pairs = queues.map(PairRings::new).collect();
        RingStore {
            pairs: Mutex::new(pairs),
            backend,
            backend_is_gone: AtomicBool::new(false),
        }
    }

    pub(super) fn backend(&self) -> &Arc<dyn NetBackend> {
        &self.backend
    }

    /// Whether the backend's other side is gone, as a tap that is removed.
    pub(super) fn backend_is_gone(&self) -> bool {
        self.backend_is_gone.load(Ordering::Relaxed)
    }

    /// Takes note whether the backend's other side is gone, and returns what was noted before.
    pub(super) fn set_backend_is_gone(&self, is_gone: bool) -> bool {
        self.backend_is_gone.swap(is_gone, Ordering::Relaxed)
    }

    /// The rings over a queue of the backend. Nobody else has them until they are given back.
    pub(super) fn take(&self, pair: usize) -> PairRings {
        let mut pairs = self.pairs();
        pairs.get_mut(pair).map(std::mem::take).unwrap_or_default()
    }

    /// Leaves the rings over a queue of the backend to the next worker.
    pub(super) fn give_back(&self, pair: usize, rings: PairRings) {
        if let Some(place) = self.pairs().get_mut(pair) {
            *place = rings;
        }
    }

    fn pairs(&self) -> MutexGuard<'_, Vec<PairRings>> {
        lock(&self.pairs)
    }
}
