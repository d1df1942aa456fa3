//! The handle with which the owner of a machine controls a console device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{ConsoleMetrics, Shared};
use crate::serial::SerialEndpoint;
use crate::virtio::DriverLink;

/// A handle to a console device.
pub struct ConsoleHandle {
    shared: Arc<Shared>,
    link: Arc<DriverLink>,
}

impl ConsoleHandle {
    pub(super) fn new(shared: Arc<Shared>, link: Arc<DriverLink>) -> ConsoleHandle {
        ConsoleHandle { shared, link }
    }

    /// Connects a port to `endpoint`, before the guest runs: port 0 is a console, port 1 the first channel.
    pub fn connect(&self, port: usize, endpoint: SerialEndpoint) {
        if let Some(mut host) = self.shared.host(port) {
            host.connect(endpoint);
        }
    }

    /// Tells the guest the size of a console in characters; 0 means unknown.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut size = [0; 4];
        size[..2].copy_from_slice(&columns.to_le_bytes());
        size[2..].copy_from_slice(&rows.to_le_bytes());
        if self.shared.set_size(size) && self.shared.is_active.load(Ordering::Acquire) {
            self.link.notify_configuration_change();
        }
    }

    /// Returns the device's counters.
    pub fn metrics(&self) -> &Arc<ConsoleMetrics> {
        &self.shared.metrics
    }
}
