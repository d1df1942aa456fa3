//! The handle with which the owner of a machine controls a network device.

use std::io;
use std::sync::Arc;

use super::NetMetrics;
use super::shared::{NetLimits, Shared};

/// A handle for the owner of a machine to a network device while the guest uses it, for any thread.
pub struct NetHandle {
    pub(super) shared: Arc<Shared>,
}

impl NetHandle {
    /// Returns the device's counters.
    pub fn metrics(&self) -> &Arc<NetMetrics> {
        &self.shared.metrics
    }

    /// Returns the device's limits.
    pub fn limits(&self) -> NetLimits {
        NetLimits {
            receive: self.shared.receive.limits(),
            transmit: self.shared.transmit.limits(),
        }
    }

    /// Sets new limits, also for packets that wait already. An unchanged limit keeps its fill level; a
    /// changed one begins with a full bucket.
    ///
    /// # Errors
    /// If the host refuses to wake the device. The limits are set all the same, but packets that wait already
    /// wait for as long as the old limits require.
    pub fn set_limits(&self, limits: &NetLimits) -> io::Result<()> {
        self.shared
            .receive
            .set(&limits.receive)
            .and(self.shared.transmit.set(&limits.transmit))
    }
}
