//! What a worker must know to take the place of one that was saved.

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use super::filter::ReceiveFilter;

/// What the driver has commanded, and what the receive queues need.
///
/// A packet that was read from the tap and that the driver had no buffers for is not saved: it is lost,
/// as on any network, and counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WorkerState {
    pub(super) filter: ReceiveFilter,
    /// The guest offloads in use, as feature bits (section 5.1.6.5.6).
    pub(super) offloads: u64,
    pub(super) pairs_in_use: u16,
    /// One for each pair of queues.
    pub(super) receivers: Vec<ReceiverState>,
}

/// What a receiver must know beside how far its queue has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiverState {
    /// Heads to take in place of those that are next in the available ring.
    pub(super) substitutes: Vec<u16>,
    /// Number of packets that are lost.
    pub(super) undelivered: u64,
}

impl SavedState for WorkerState {
    const KIND: &'static str = "net";
    const VERSION: u16 = 1;
}
