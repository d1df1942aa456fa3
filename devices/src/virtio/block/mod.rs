//! The block device (section 5.2) over a raw disk image.

#[cfg(feature = "bench-internals")]
#[doc(hidden)]
pub mod bench;
mod disk_slot;
mod handle;
mod in_flight;
mod metrics;
mod polling;
mod request;
mod ring;
#[cfg(test)]
mod tests;
mod worker;
mod write_span;

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{
    Activation, COMMON_FEATURES, ConfigSpace, Throttle, VirtioDevice, VirtioInterrupt, device_id,
};
use crate::disk::{CacheMode, DiskFile, SECTOR_SIZE};
use crate::event_loop::Subscriber;
use crate::rate_limiter::Limits;
use disk_slot::{DiskSlot, OpenDisk};
use request::RequestHandler;
use ring::Ring;
use worker::Worker;

pub use handle::{BlockHandle, ReplaceError};
pub use metrics::BlockMetrics;

/// Most queues of one device.
pub const MAX_QUEUES: u16 = 8;
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: what is left of a queue beside the header and the status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Length of the serial number that a driver can ask for, in bytes.
pub const ID_SIZE: usize = 20;
/// Most sectors of one discard segment: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one write-zeroes segment: 64 MiB, as the host may have to write them.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;
/// Most segments of one discard request.
const MAX_DISCARD_RANGES: u32 = 16;
/// Most segments of one write-zeroes request.
const MAX_WRITE_ZEROES_RANGES: u32 = 1;
/// Most bytes that one request reads or writes: many times what a driver asks for, and as long as the
/// event loop may be held up. Descriptors that overlap could otherwise ask for a copy of the whole
/// disk.
const MAX_DATA_SIZE: u64 = 64 << 20;

/// Offsets in the configuration space (section 5.2.4).
mod config {
    pub const CAPACITY: usize = 0;
    pub const SEG_MAX: usize = 12;
    pub const BLK_SIZE: usize = 20;
    pub const PHYSICAL_BLOCK_EXP: usize = 24;
    pub const MIN_IO_SIZE: usize = 26;
    pub const NUM_QUEUES: usize = 34;
    pub const MAX_DISCARD_SECTORS: usize = 36;
    pub const MAX_DISCARD_SEG: usize = 40;
    pub const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    pub const SIZE: usize = 60;
}

/// How requests are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// Each request in the way that is best for it: at once where it does not block, by io_uring
    /// where it does. Where the host has no io_uring, as [`Engine::Sync`].
    #[default]
    Auto,
    /// By io_uring.
    IoUring,
    /// One at a time, by system calls that block the event loop.
    Sync,
}

/// How a block device works.
#[derive(Debug, Clone, Copy)]
pub struct BlockOptions {
    /// How requests are done.
    pub engine: Engine,
    /// Number of queues, from 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Whether the event loop looks for requests for longer than a moment before it sleeps, as long as
    /// that succeeds.
    pub polls: bool,
    /// Limits of requests, and of the bytes that they read and write.
    pub limits: Limits,
}

impl Default for BlockOptions {
    /// One queue, and no limits.
    fn default() -> BlockOptions {
        BlockOptions {
            engine: Engine::Auto,
            queues: 1,
            polls: false,
            limits: Limits::default(),
        }
    }
}

/// Why a block device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// It needs io_uring.
    #[error("cannot set up io_uring: {0}")]
    Ring(io::Error),
    /// The host is out of something small.
    #[error("cannot create the timer and event of a disk: {0}")]
    Resource(io::Error),
}

/// The front of a block device.
pub struct Block {
    slot: Arc<DiskSlot>,
    throttle: Arc<Throttle>,
    id: [u8; ID_SIZE],
    options: BlockOptions,
    queue_sizes: Vec<u16>,
}

impl Block {
    /// A block device over `disk`. Its serial number is `id`, of which the first [`ID_SIZE`] bytes
    /// count.
    ///
    /// # Errors
    /// When the host has no io_uring and the engine needs it, or has no file descriptors.
    pub fn new(disk: DiskFile, id: &str, options: &BlockOptions) -> Result<Block, BlockError> {
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
        let disk = Arc::new(disk);
        Ok(Block {
            slot: DiskSlot::new(OpenDisk { disk, ring }, options.queues)
                .map(Arc::new)
                .map_err(BlockError::Resource)?,
            throttle: Throttle::new(&options.limits)
                .map(Arc::new)
                .map_err(BlockError::Resource)?,
            id: id_bytes,
            options: BlockOptions { engine, ..*options },
            queue_sizes: vec![QUEUE_SIZE; options.queues.into()],
        })
    }

    /// A handle to the device for the owner of the machine. `interrupt` is the device's.
    pub fn handle(&self, interrupt: Arc<VirtioInterrupt>) -> BlockHandle {
        BlockHandle {
            slot: self.slot.clone(),
            throttle: self.throttle.clone(),
            interrupt,
            engine: self.options.engine,
        }
    }

    fn worker(&self, activation: Activation) -> io::Result<Worker> {
        let (mut open_disk, lease) = self.slot.lease();
        if open_disk.ring.is_none() && self.options.engine != Engine::Sync {
            open_disk.ring = Some(Ring::new(&open_disk.disk)?);
        }
        let handler = RequestHandler::new(
            open_disk.disk,
            self.id,
            activation.features,
            activation.memory.clone(),
            activation.interrupt.clone(),
        );
        Ok(Worker::new(
            handler,
            lease,
            activation,
            &self.options,
            self.throttle.clone(),
            open_disk.ring,
        ))
    }
}

/// The configuration space of a device over `disk`.
fn config_space(disk: &DiskFile, queues: u16) -> Vec<u8> {
    let mut space = vec![0; config::SIZE];
    let capacity = disk.size() / SECTOR_SIZE;
    space[config::CAPACITY..][..8].copy_from_slice(&capacity.to_le_bytes());
    let (logical, physical) = (disk.logical_block_size(), disk.physical_block_size());
    for (offset, value) in [
        (config::SEG_MAX, MAX_SEGMENTS),
        (config::BLK_SIZE, logical),
        (config::MAX_DISCARD_SECTORS, MAX_DISCARD_SECTORS),
        (config::MAX_DISCARD_SEG, MAX_DISCARD_RANGES),
        (
            config::DISCARD_SECTOR_ALIGNMENT,
            physical / SECTOR_SIZE as u32,
        ),
        (config::MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SECTORS),
        (config::MAX_WRITE_ZEROES_SEG, MAX_WRITE_ZEROES_RANGES),
    ] {
        space[offset..][..4].copy_from_slice(&value.to_le_bytes());
    }
    let blocks = physical / logical;
    space[config::PHYSICAL_BLOCK_EXP] = blocks.ilog2() as u8;
    space[config::MIN_IO_SIZE..][..2].copy_from_slice(&(blocks as u16).to_le_bytes());
    space[config::NUM_QUEUES..][..2].copy_from_slice(&queues.to_le_bytes());
    space[config::WRITE_ZEROES_MAY_UNMAP] = 1;
    space
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
        let disk = self.slot.disk();
        if disk.is_read_only() {
            return features | 1 << VIRTIO_BLK_F_RO;
        }
        features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        // Without it the driver knows that there is nothing to flush.
        if disk.cache() != CacheMode::Writethrough {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &ConfigSpace {
        &self.slot.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, String> {
        self.worker(activation)
            .map(|worker| Box::new(worker) as Subscriber)
            .map_err(|error| {
                self.slot.metrics.activate_fails.add(1);
                format!("cannot set up io_uring: {error}")
            })
    }
}
