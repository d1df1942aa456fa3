//! The state that a worker needs to take the place of a saved one.

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use super::filter::ReceiveFilter;

/// The driver's settings, and the state of the receive queues.
///
/// A packet that was read from the tap and for which the driver had no buffers is not saved: it is lost, as
/// can happen on any network, and counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WorkerState {
    pub(super) filter: ReceiveFilter,
    /// The guest offloads in use, as feature bits (section 5.1.6.5.6).
    pub(super) offloads: u64,
    pub(super) pairs_in_use: u16,
    /// One for each pair of queues.
    pub(super) receivers: Vec<ReceiverState>,
}

/// The state of a receiver apart from its queue's progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiverState {
    /// Heads to take in place of the next ones in the available ring.
    pub(super) substitutes: Vec<u16>,
    /// Number of packets that are lost.
    pub(super) undelivered: u64,
}

impl SavedState for WorkerState {
    const KIND: &'static str = "net";
    const VERSION: u16 = 1;
}
