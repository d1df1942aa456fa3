//! The saved state of a worker.

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

/// The state of a worker apart from its queues. Its connections are not part of it: they end with the
/// process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorkerState {
    /// The port of the host that the next program gets. It is saved so that a late packet of the guest for an
    /// earlier connection does not find one with the same ports.
    pub(super) next_host_port: u32,
}

impl SavedState for WorkerState {
    const KIND: &'static str = "vsock worker";
    const VERSION: u16 = 1;
}
