//! The handle with which the owner of a machine controls a block device.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bantam_storage::{Disk, SECTOR_SIZE};

use super::disk_slot::{DiskSlot, OpenDisk};
use super::ring::Ring;
use super::{BlockMetrics, DiskOwner, Engine, config};
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
    /// A job copies data of the present image.
    #[error(
        "cannot put '{path}' in the place of a disk on which a job is at work: finish or cancel that first",
        path = .path.display()
    )]
    Job {
        /// The image.
        path: PathBuf,
    },
    /// The image is not raw, and there is no thread for it.
    #[error("cannot start a thread for disk '{path}': {source}", path = .path.display())]
    Thread {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
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
#[derive(Clone)]
pub struct BlockHandle {
    pub(super) slot: Arc<DiskSlot>,
    pub(super) throttle: Arc<Throttle>,
    pub(super) link: Arc<DriverLink>,
    pub(super) engine: Engine,
    pub(super) owner: Arc<dyn DiskOwner>,
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
        self.change_size(Disk::update_size)
    }

    /// Makes the image larger while the guest uses it, and tells the driver. Returns the size in bytes.
    ///
    /// # Errors
    /// Those of [`Disk::grow`]; the disk then keeps its size.
    pub fn grow(&self, size: u64) -> io::Result<u64> {
        self.change_size(|disk| {
            disk.grow(size)?;
            Ok(disk.size())
        })
    }

    fn change_size(&self, change: impl FnOnce(&Disk) -> io::Result<u64>) -> io::Result<u64> {
        let _change = self.slot.change();
        if self.has_job() {
            let reason = "a job is at work on it: finish or cancel that first";
            return self.counted(Err(io::Error::new(io::ErrorKind::ResourceBusy, reason)));
        }
        let disk = self.disk();
        let before = disk.size();
        let size = self.counted(change(&disk))?;
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
        if self.has_job() {
            return Err(ReplaceError::Job { path });
        }
        let new = self.prepare(Arc::new(disk))?;
        // Twice, so that little is left to be flushed while the guest waits.
        let exchanged = flush(&self.disk()).and_then(|()| {
            let at_rest = || flush(&self.disk());
            self.slot.exchange(new, at_rest, deadline)
        });
        let old = exchanged.map_err(|source| ReplaceError::ChangeOver { path, source })?;
        self.link.notify_configuration_change();
        let OpenDisk { disk: old, ring } = old;
        // The ring has the file open too.
        drop(ring);
        flush(&old).map_err(|source| ReplaceError::Flush {
            path: old.path().to_path_buf(),
            source,
        })
    }

    /// Makes what the device needs to use `disk`.
    pub(super) fn prepare(&self, disk: Arc<Disk>) -> Result<OpenDisk, ReplaceError> {
        let path = disk.path().to_path_buf();
        let read_only = self.disk().is_read_only();
        if disk.is_read_only() != read_only {
            return Err(ReplaceError::Access { path, read_only });
        }
        if let Disk::Formatted(_) = &*disk
            && let Err(source) = self
                .slot
                .provide_image_work(|work| self.owner.start_image_thread(work))
        {
            return Err(ReplaceError::Thread { path, source });
        }
        let ring = match self.engine {
            Engine::Sync => None,
            Engine::Auto | Engine::IoUring => match Ring::new(&disk) {
                Ok(ring) => Some(ring),
                Err(source) => return Err(ReplaceError::Ring { path, source }),
            },
        };
        Ok(OpenDisk { disk, ring })
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

/// Brings what was written to `disk` to stable storage.
pub(super) fn flush(disk: &Disk) -> io::Result<()> {
    match disk.is_read_only() {
        true => Ok(()),
        false => disk.flush(),
    }
}
