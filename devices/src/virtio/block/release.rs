//! Giving up the image of a disk, for a machine that goes on elsewhere.

use std::sync::Arc;
use std::time::Instant;

use bantam_storage::{Disk, DiskOptions};

use super::disk_slot::OpenDisk;
use super::handle::flush;
use super::{BlockHandle, ReplaceError};
use crate::opener::Opener;
use crate::virtio::owner::DeviceError;

impl BlockHandle {
    /// Gives up the image: everything that was written is on stable storage, and others may use the image in any way. From
    /// now on, all requests fail, until [`BlockHandle::take_back`].
    ///
    /// # Errors
    /// If a job is at work, what was written cannot be brought to stable storage, or requests do not end by `deadline`. The
    /// image may be given up nevertheless.
    pub fn release(&self, deadline: Instant) -> Result<(), ReplaceError> {
        let _change = self.slot.change();
        let present = self.disk();
        let path = present.path().to_path_buf();
        if self.has_job() {
            return Err(ReplaceError::Job { path });
        }
        let failed = |source| ReplaceError::ChangeOver {
            path: path.clone(),
            source,
        };
        let without_image = present.without_image();
        let disk = without_image.map_err(|error| failed(std::io::Error::other(error)))?;
        drop(present);
        let new = OpenDisk {
            disk: Arc::new(disk),
            ring: None,
        };
        let at_rest = || flush(&self.disk());
        let OpenDisk { disk, ring } = self
            .slot
            .exchange(new, at_rest, deadline)
            .map_err(&failed)?;
        drop(ring);
        disk.release().map_err(failed)
    }

    /// Opens and locks the image again, if it was given up.
    ///
    /// # Errors
    /// If it cannot be opened, for example because others use it.
    pub fn take_back(&self, opener: &dyn Opener, deadline: Instant) -> Result<(), DeviceError> {
        let before = self.disk();
        if !before.is_without_image() {
            return Ok(());
        }
        let options = DiskOptions {
            block_size: Some(before.logical_block_size()),
            ..before.options().clone()
        };
        let image = Disk::open_by(opener, before.path(), &options)?;
        Ok(self.replace(image, deadline)?)
    }
}
