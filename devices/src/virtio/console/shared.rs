//! What the parts of a console device share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ConsoleMetrics;
use super::host::HostEnd;
use crate::virtio::ConfigSpace;

/// What device model, worker and handle have in common.
pub(super) struct Shared {
    pub(super) config: ConfigSpace,
    /// The host's end of each port. They outlive the worker, and with it a reset.
    pub(super) hosts: Vec<Mutex<HostEnd>>,
    /// Whether a driver is at work.
    pub(super) is_active: AtomicBool,
    pub(super) metrics: Arc<ConsoleMetrics>,
}

impl Shared {
    pub(super) fn host(&self, port: usize) -> Option<MutexGuard<'_, HostEnd>> {
        // No change leaves it half done, even one that panics.
        let host = self.hosts.get(port)?;
        Some(host.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
