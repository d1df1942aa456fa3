//! The block device (section 5.2) over a disk image.

#[cfg(feature = "bench-internals")]
#[doc(hidden)]
pub mod bench;
mod config;
mod disk_owner;
mod disk_slot;
mod handle;
mod image_work;
mod in_flight;
mod job;
mod limits;
mod metrics;
mod new_files;
mod options;
mod pausable_worker;
mod pieces;
mod polling;
mod release;
mod request;
mod ring;
mod snapshot;
mod span;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::Arc;

use bantam_state::{RestoreError, Section};
use bantam_storage::{CacheMode, Disk};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{
    Activation, COMMON_FEATURES, ConfigSpace, DriverLink, Throttle, VirtioDevice, device_id,
};
use crate::worker::VirtioWorker;
use config::config_space;
use disk_slot::{DiskSlot, OpenDisk};
use limits::{MAX_DATA_SIZE, MAX_RANGE_SECTORS, QUEUE_SIZE};
use pausable_worker::PausableWorker;
use request::RequestHandler;
use ring::Ring;
use worker::Worker;

pub use disk_owner::DiskOwner;
pub use handle::{BlockHandle, ReplaceError};
pub use image_work::ImageWork;
pub use job::{DiskJob, JobCommandError, JobState, JobStatus, PresentImage};
pub use limits::ID_SIZE;
pub use metrics::BlockMetrics;
pub use options::{BlockOptions, Engine, MAX_QUEUES};
pub use snapshot::{SnapshotError, snapshot};

/// Why a block device cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// It needs io_uring.
    #[error("cannot set up io_uring: {0}")]
    Ring(io::Error),
    /// The host refuses to create a timer or an event.
    #[error("cannot create the timer and event of a disk: {0}")]
    Resource(io::Error),
}

/// The front of a block device.
pub struct Block {
    blueprint: Blueprint,
    queue_sizes: Vec<u16>,
}

/// The parts from which each worker of a device is made.
#[derive(Clone)]
struct Blueprint {
    slot: Arc<DiskSlot>,
    throttle: Arc<Throttle>,
    id: [u8; ID_SIZE],
    options: BlockOptions,
}

impl Blueprint {
    /// A worker that serves the disk that is there now. It has the ring that was made with the disk,
    /// unless a worker before it has lost that.
    ///
    /// # Errors
    /// If another ring is needed and the host refuses it. The queues then stay with `activation`.
    fn worker(&self, activation: &mut Activation) -> io::Result<Worker> {
        let (mut open_disk, next_disk, lease) = self.slot.lease();
        if open_disk.ring.is_none() && self.options.engine != Engine::Sync {
            match Ring::new(&open_disk.disk) {
                Ok(ring) => open_disk.ring = Some(ring),
                Err(error) => {
                    if let Some(next) = next_disk {
                        lease.leave(next);
                    }
                    return Err(error);
                }
            }
        }
        let handler = RequestHandler::new(
            open_disk.disk,
            self.id,
            activation.features,
            activation.memory.clone(),
            activation.link.clone(),
        );
        Ok(Worker::new(
            handler,
            lease,
            activation,
            &self.options,
            self.throttle.clone(),
            open_disk.ring,
            next_disk,
        ))
    }
}

impl Block {
    /// Makes a block device over `disk`. Its serial number is the first [`ID_SIZE`] bytes of `id`. If the image
    /// is not raw, the device needs a thread for its [`Block::image_work`].
    ///
    /// # Errors
    /// If the host has no io_uring and the engine needs it, or is out of file descriptors.
    pub fn new(
        disk: impl Into<Disk>,
        id: &str,
        options: &BlockOptions,
    ) -> Result<Block, BlockError> {
        let disk = disk.into();
        let mut id_bytes = [0; ID_SIZE];
        for (byte, &given) in id_bytes.iter_mut().zip(id.as_bytes()) {
            *byte = given;
        }
        let (engine, ring) = match options.engine {
            Engine::Sync => (Engine::Sync, None),
            engine => match Ring::new(&disk) {
                Ok(ring) => (engine, Some(ring)),
                Err(error) if engine == Engine::Auto => {
                    tracing::info!("disk '{id}' is served without io_uring: {error}");
                    (Engine::Sync, None)
                }
                Err(error) => return Err(BlockError::Ring(error)),
            },
        };
        let is_raw = matches!(disk, Disk::Raw(_));
        let disk = Arc::new(disk);
        let slot =
            DiskSlot::new(OpenDisk { disk, ring }, options.queues).map_err(BlockError::Resource)?;
        if !is_raw {
            // The owner starts the thread later.
            slot.provide_image_work(|_| Ok(()))
                .map_err(BlockError::Resource)?;
        }
        let blueprint = Blueprint {
            slot: Arc::new(slot),
            throttle: Throttle::new(&options.limits)
                .map(Arc::new)
                .map_err(BlockError::Resource)?,
            id: id_bytes,
            options: BlockOptions { engine, ..*options },
        };
        Ok(Block {
            blueprint,
            queue_sizes: vec![QUEUE_SIZE; options.queues.into()],
        })
    }

    /// Returns the work for a thread of the disk, if its image is not raw.
    pub fn image_work(&self) -> Option<Arc<ImageWork>> {
        self.blueprint.slot.image_work()
    }

    /// A handle to the device for the owner of the machine. `link` is the device's.
    pub fn handle(&self, link: Arc<DriverLink>, owner: Arc<dyn DiskOwner>) -> BlockHandle {
        BlockHandle {
            slot: self.blueprint.slot.clone(),
            throttle: self.blueprint.throttle.clone(),
            link,
            owner,
            engine: self.blueprint.options.engine,
        }
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        device_id::BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_MQ;
        let disk = self.blueprint.slot.disk();
        if disk.is_read_only() {
            return features | 1 << VIRTIO_BLK_F_RO;
        }
        features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        // If the feature is missing, the driver knows that there is nothing to flush.
        if disk.cache() != CacheMode::Writethrough {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &ConfigSpace {
        &self.blueprint.slot.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        if activation.state.is_some() {
            return Err("its worker has no state beside that of its queues".to_owned());
        }
        let worker = PausableWorker::new(self.blueprint.clone(), activation);
        Ok(Box::new(worker))
    }

    fn restore(&mut self, config: &[u8], state: Option<&Section>) -> Result<(), RestoreError> {
        let disk = self.blueprint.slot.disk();
        let difference = match state {
            Some(_) => Some("its front has no state".to_owned()),
            None => config::difference(config, &disk, self.blueprint.options.queues),
        };
        difference.map_or(Ok(()), |reason| {
            Err(RestoreError::Invalid {
                kind: format!("disk {}", disk.path().display()),
                reason,
            })
        })
    }
}
