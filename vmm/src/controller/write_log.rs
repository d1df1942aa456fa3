//! The log of what a machine writes while its memory is copied.

use std::sync::Arc;

use bantam_memory::{GuestMemory, PageSet};

use super::snapshot::Parts;
use crate::error::Error;
use crate::snapshot::Changes;

/// The log of the pages that a machine writes, from the start of the log until it is dropped.
pub(super) struct WriteLog<'a> {
    parts: &'a Parts,
    /// Whether the machine logs these pages for differential snapshots too.
    is_tracking: bool,
}

impl<'a> WriteLog<'a> {
    /// Begins the log.
    ///
    /// # Errors
    /// If the host has too little memory for it, or KVM refuses.
    pub(super) fn start(
        parts: &'a Parts,
        changes: &mut Changes,
        is_tracking: bool,
    ) -> Result<WriteLog<'a>, Error> {
        let log = WriteLog { parts, is_tracking };
        match is_tracking {
            true => drop(log.take(changes)?),
            false => {
                let started = parts.memory.start_dirty_log();
                started.map_err(Error::resource("the log of written pages"))?;
                parts.vm.log_writes(true)?;
            }
        }
        Ok(log)
    }

    /// Returns the memory of the machine.
    pub(super) fn memory(&self) -> &'a Arc<GuestMemory> {
        &self.parts.memory
    }

    /// Returns the pages that have been written since the start, or since the last call.
    ///
    /// # Errors
    /// If KVM does not tell, or the kernel has no memory for a barrier.
    pub(super) fn take(&self, changes: &mut Changes) -> Result<PageSet, Error> {
        let (vm, memory) = (&self.parts.vm, &self.parts.memory);
        if self.is_tracking {
            return changes.take_new(vm, memory);
        }
        let mut pages = vm.take_written()?;
        let by_devices = memory.take_dirty();
        pages.add(&by_devices.map_err(Error::resource("the log of written pages"))?);
        Ok(pages)
    }
}

impl Drop for WriteLog<'_> {
    fn drop(&mut self) {
        if self.is_tracking {
            return;
        }
        self.parts.memory.stop_dirty_log();
        if let Err(error) = self.parts.vm.log_writes(false) {
            tracing::debug!("cannot stop the log: {error}");
        }
    }
}
