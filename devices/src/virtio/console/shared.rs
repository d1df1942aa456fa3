//! What the parts of a console device share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::host::HostEnd;
use super::{ConsoleMetrics, config};
use crate::virtio::ConfigSpace;

/// What device model, worker and handle have in common.
pub(super) struct Shared {
    pub(super) config: ConfigSpace,
    /// The size of the host's terminal, if the owner has said so.
    pub(super) size: Mutex<Option<[u8; 4]>>,
    /// The host's end of each port. They outlive the worker, and with it a reset.
    pub(super) hosts: Vec<Mutex<HostEnd>>,
    /// Whether a driver is at work.
    pub(super) is_active: AtomicBool,
    pub(super) metrics: Arc<ConsoleMetrics>,
}

impl Shared {
    /// Remembers the size, and puts it into the configuration space. `true` if it was another there.
    pub(super) fn set_size(&self, size: [u8; 4]) -> bool {
        let mut own = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        *own = Some(size);
        self.write_size(size)
    }

    /// Puts the size that is remembered into the configuration space, in place of that of another process.
    /// `true` if that was another.
    pub(super) fn rewrite_size(&self) -> bool {
        let own = self.size.lock().unwrap_or_else(PoisonError::into_inner);
        own.is_some_and(|size| self.write_size(size))
    }

    fn write_size(&self, size: [u8; 4]) -> bool {
        let before: [u8; 4] = self.config.array(config::COLUMNS as u64);
        self.config.write(config::COLUMNS, &size);
        size != before
    }

    pub(super) fn host(&self, port: usize) -> Option<MutexGuard<'_, HostEnd>> {
        // No change leaves it half done, even one that panics.
        let host = self.hosts.get(port)?;
        Some(host.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
