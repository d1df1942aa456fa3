//! A network device as the owner of its machine sees it.

use std::io;
use std::sync::Arc;

use super::NetMetrics;
use super::shared::{NetLimits, Shared};

/// What the owner of a machine can do with a network device while the guest uses it, from any thread.
pub struct NetHandle {
    pub(super) shared: Arc<Shared>,
}

impl NetHandle {
    /// What the device has done.
    pub fn metrics(&self) -> &Arc<NetMetrics> {
        &self.shared.metrics
    }

    /// The device's limits.
    pub fn limits(&self) -> NetLimits {
        NetLimits {
            receive: self.shared.receive.limits(),
            transmit: self.shared.transmit.limits(),
        }
    }

    /// Sets other limits, for packets that wait too. One that is the same as before goes on where it
    /// is; any other begins with a full bucket.
    ///
    /// # Errors
    /// When the host refuses to wake the device. The limits are set, but packets that wait for those
    /// before wait as long as these say.
    pub fn set_limits(&self, limits: &NetLimits) -> io::Result<()> {
        self.shared
            .receive
            .set(&limits.receive)
            .and(self.shared.transmit.set(&limits.transmit))
    }
}
