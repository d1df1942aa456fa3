//! State that the parts of a console device share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};

use super::host::HostEnd;
use super::{ConsoleMetrics, config};
use crate::lock::lock;
use crate::virtio::ConfigSpace;

/// State that the device model, worker and handle share.
pub(super) struct Shared {
    pub(super) config: ConfigSpace,
    /// The size of the host's terminal, if the owner has set it.
    pub(super) size: Mutex<Option<[u8; 4]>>,
    /// The host's end of each port. They outlive the worker, and so a reset.
    pub(super) hosts: Vec<Mutex<HostEnd>>,
    /// Whether a driver is at work.
    pub(super) is_active: AtomicBool,
    pub(super) metrics: Arc<ConsoleMetrics>,
}

impl Shared {
    /// Remembers the size, and writes it to the configuration space. `true` if this changes it there.
    pub(super) fn set_size(&self, size: [u8; 4]) -> bool {
        let mut own = lock(&self.size);
        *own = Some(size);
        self.write_size(size)
    }

    /// Writes the remembered size to the configuration space, in place of that of another process. `true` if
    /// this changes it.
    pub(super) fn rewrite_size(&self) -> bool {
        let own = lock(&self.size);
        own.is_some_and(|size| self.write_size(size))
    }

    fn write_size(&self, size: [u8; 4]) -> bool {
        let before: [u8; 4] = self.config.array(config::COLUMNS as u64);
        self.config.write(config::COLUMNS, &size);
        size != before
    }

    pub(super) fn host(&self, port: usize) -> Option<MutexGuard<'_, HostEnd>> {
        self.hosts.get(port).map(lock)
    }
}
