//! The handle with which the owner of a machine controls a block device.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bantam_storage::{Disk, SECTOR_SIZE};

use super::disk_slot::{DiskSlot, OpenDisk};
use super::ring::Ring;
use super::{BlockMetrics, Engine, config};
use crate::rate_limiter::Limits;
use crate::virtio::{DriverLink, Throttle};

/// Why the image of a disk was not replaced, or not without loss.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// The new image differs in whether it is read-only, which the guest knows and which cannot change.
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
    /// One of the two images is raw and the other is not, and the device cannot change how it serves them.
    #[error(
        "cannot put '{path}' in the place of a disk whose image is {expected}",
        path = .path.display(),
        expected = if *.is_raw { "raw" } else { "not raw" }
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// Whether the present image is raw.
        is_raw: bool,
    },
    /// The device uses io_uring, and cannot do so with this image.
    #[error("cannot serve disk '{path}' by io_uring: {source}", path = .path.display())]
    Ring {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The device cannot switch to the image.
    #[error("cannot use disk '{path}' from now on: {source}", path = .path.display())]
    ChangeOver {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The guest has the new disk, but its writes to the previous one may not all be on stable storage.
    #[error("cannot flush disk '{path}', which another has replaced: {source}", path = .path.display())]
    Flush {
        /// The previous image.
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

/// A handle for the owner of a machine to a block device while the guest uses it, for any thread except that
/// of the device's event loop.
pub struct BlockHandle {
    pub(super) slot: Arc<DiskSlot>,
    pub(super) throttle: Arc<Throttle>,
    pub(super) link: Arc<DriverLink>,
    pub(super) engine: Engine,
}

impl BlockHandle {
    /// Returns the disk behind the device.
    pub fn disk(&self) -> Arc<Disk> {
        self.slot.disk()
    }

    /// Returns the device's counters.
    pub fn metrics(&self) -> &Arc<BlockMetrics> {
        &self.slot.metrics
    }

    /// Returns the device's limits.
    pub fn limits(&self) -> Limits {
        self.throttle.limits()
    }

    /// Sets new limits, also for requests that wait already. An unchanged limit keeps its fill level; a
    /// changed one begins with a full bucket.
    ///
    /// # Errors
    /// If the host refuses to wake the device. The limits are set all the same, but requests that wait
    /// already wait for as long as the old limits require.
    pub fn set_limits(&self, limits: &Limits) -> io::Result<()> {
        self.throttle.set(limits)
    }

    /// Checks the present size of the image, and tells the driver if it has changed. Returns the size in
    /// bytes.
    ///
    /// # Errors
    /// Those of [`Disk::update_size`]; the disk then keeps its size.
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

    /// Replaces the disk behind the device by `disk`, and tells the driver. Requests that have been begun are
    /// done with the previous disk, which is flushed and closed on return: its lock is then free, unless
    /// someone else has the disk from [`BlockHandle::disk`]. The device's serial number stays.
    ///
    /// # Errors
    /// If the device cannot use `disk`, or does not use it by `deadline`. It then keeps the disk that it has,
    /// except with [`ReplaceError::Flush`].
    pub fn replace(&self, disk: impl Into<Disk>, deadline: Instant) -> Result<(), ReplaceError> {
        self.counted(self.try_replace(disk.into(), deadline))
    }

    fn try_replace(&self, disk: Disk, deadline: Instant) -> Result<(), ReplaceError> {
        let path = disk.path().to_path_buf();
        let _change = self.slot.change();
        let is_raw = matches!(&*self.disk(), Disk::Raw(_));
        if matches!(&disk, Disk::Raw(_)) != is_raw {
            return Err(ReplaceError::Format { path, is_raw });
        }
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
        let exchanged = self.slot.exchange(OpenDisk { disk, ring }, deadline);
        let old = exchanged.map_err(|source| ReplaceError::ChangeOver { path, source })?;
        self.link.notify_configuration_change();
        let OpenDisk { disk: old, ring } = old;
        // The ring has the file open too.
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
