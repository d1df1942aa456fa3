//! What a worker in another process must know of the one that was saved.

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

/// The state of a worker beside its queues. Its connections are not part of it: they end with the process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorkerState {
    /// The port of the host that the next program gets. A packet of the guest that still is for an
    /// earlier connection finds none with the same ports.
    pub(super) next_host_port: u32,
}

impl SavedState for WorkerState {
    const KIND: &'static str = "vsock worker";
    const VERSION: u16 = 1;
}
