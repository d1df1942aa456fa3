//! A block device as the owner of its machine sees it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::disk_slot::{DiskSlot, OpenDisk};
use super::ring::Ring;
use super::{BlockMetrics, Engine, config};
use crate::disk::{DiskFile, SECTOR_SIZE};
use crate::rate_limiter::Limits;
use crate::virtio::{DriverLink, Throttle};

/// Why another image was not put into the place of a disk's, or not without loss.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// The guest knows whether it can write to its disk, and that stays so.
    #[error(
        "cannot put '{path}' in the place of a disk that is {expected}: it was opened {opened}",
        path = .path.display(),
        expected = access(*.read_only),
        opened = access(!*.read_only)
    )]
    Access {
        /// The image.
        path: PathBuf,
        /// Whether the device is read-only.
        read_only: bool,
    },
    /// The device serves its disk by io_uring, and cannot serve this one so.
    #[error("cannot serve disk '{path}' by io_uring: {source}", path = .path.display())]
    Ring {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The device cannot change over to the image.
    #[error("cannot use disk '{path}' from now on: {source}", path = .path.display())]
    ChangeOver {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The guest has the new disk, but what it wrote to the one before is perhaps not all on stable
    /// storage.
    #[error("cannot flush disk '{path}', which another has replaced: {source}", path = .path.display())]
    Flush {
        /// The image before.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn access(read_only: bool) -> &'static str {
    if read_only {
        "read-only"
    } else {
        "read and written"
    }
}

/// What the owner of a machine can do with a block device while the guest uses it, from any thread
/// but that of the device's event loop.
pub struct BlockHandle {
    pub(super) slot: Arc<DiskSlot>,
    pub(super) throttle: Arc<Throttle>,
    pub(super) link: Arc<DriverLink>,
    pub(super) engine: Engine,
}

impl BlockHandle {
    /// The disk behind the device.
    pub fn disk(&self) -> Arc<DiskFile> {
        self.slot.disk()
    }

    /// What the device has done.
    pub fn metrics(&self) -> &Arc<BlockMetrics> {
        &self.slot.metrics
    }

    /// The device's limits.
    pub fn limits(&self) -> Limits {
        self.throttle.limits()
    }

    /// Sets other limits, for requests that wait too. One that is the same as before goes on where it
    /// is; any other begins with a full bucket.
    ///
    /// # Errors
    /// When the host refuses to wake the device. The limits are set, but requests that wait for those
    /// before wait as long as these say.
    pub fn set_limits(&self, limits: &Limits) -> io::Result<()> {
        self.throttle.set(limits)
    }

    /// Looks how large the image is now, and tells the driver if that has changed. Gives the size in
    /// bytes.
    ///
    /// # Errors
    /// As [`DiskFile::update_size`]; the disk then keeps its size.
    pub fn update_size(&self) -> io::Result<u64> {
        let _change = self.slot.change();
        let disk = self.disk();
        let before = disk.size();
        let size = self.counted(disk.update_size())?;
        if size != before {
            let capacity = size / SECTOR_SIZE;
            let config = &self.slot.config;
            config.write(config::offset::CAPACITY, &capacity.to_le_bytes());
            self.link.notify_configuration_change();
        }
        Ok(size)
    }

    /// Puts `disk` in the place of the one behind the device, and tells the driver. Requests that
    /// have been begun are done with the one before, which is flushed and closed when this returns:
    /// its lock is free then, unless somebody else has it from [`BlockHandle::disk`]. The
    /// device's serial number stays.
    ///
    /// # Errors
    /// When the device cannot use `disk`. It keeps the one that it has, but for an error of
    /// [`ReplaceError::Flush`].
    pub fn replace(&self, disk: DiskFile) -> Result<(), ReplaceError> {
        self.counted(self.try_replace(disk))
    }

    fn try_replace(&self, disk: DiskFile) -> Result<(), ReplaceError> {
        let path = disk.path().to_path_buf();
        let _change = self.slot.change();
        let read_only = self.disk().is_read_only();
        if disk.is_read_only() != read_only {
            return Err(ReplaceError::Access { path, read_only });
        }
        let ring = match self.engine {
            Engine::Sync => None,
            Engine::Auto | Engine::IoUring => match Ring::new(&disk) {
                Ok(ring) => Some(ring),
                Err(source) => return Err(ReplaceError::Ring { path, source }),
            },
        };
        // So that little is left for the worker to flush.
        if !read_only {
            self.disk()
                .flush()
                .map_err(|source| ReplaceError::ChangeOver {
                    path: path.clone(),
                    source,
                })?;
        }
        let disk = Arc::new(disk);
        let exchanged = self.slot.exchange(OpenDisk { disk, ring });
        let old = exchanged.map_err(|source| ReplaceError::ChangeOver { path, source })?;
        self.link.notify_configuration_change();
        let OpenDisk { disk: old, ring } = old;
        // It has the file open too.
        drop(ring);
        if !old.is_read_only() {
            old.flush().map_err(|source| ReplaceError::Flush {
                path: old.path().to_path_buf(),
                source,
            })?;
        }
        Ok(())
    }

    fn counted<T, E>(&self, result: Result<T, E>) -> Result<T, E> {
        let metrics = &self.slot.metrics;
        match result {
            Ok(_) => metrics.update_count.add(1),
            Err(_) => metrics.update_fails.add(1),
        }
        result
    }
}
