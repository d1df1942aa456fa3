//! The block device (section 5.2) over a raw disk image.

mod request;

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{
    Activation, COMMON_FEATURES, Chain, VirtQueue, VirtioDevice, VirtioInterrupt, device_id,
};
use crate::disk::{DiskFile, SECTOR_SIZE};
use crate::event_loop::Subscriber;
use request::RequestHandler;

const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: what is left of a queue beside the header and the status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Length of the serial number that a driver can ask for, in bytes.
pub const ID_SIZE: usize = 20;
/// Most sectors of one discard segment: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one write-zeroes segment: 64 MiB, as the host may have to write them.
const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;
/// Most segments of one discard or write-zeroes request.
const MAX_RANGES: u32 = 16;

/// Offsets in the configuration space (section 5.2.4).
mod config {
    pub const CAPACITY: usize = 0;
    pub const SEG_MAX: usize = 12;
    pub const BLK_SIZE: usize = 20;
    pub const MAX_DISCARD_SECTORS: usize = 36;
    pub const MAX_DISCARD_SEG: usize = 40;
    pub const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    pub const SIZE: usize = 60;
}

/// The front of a block device.
pub struct Block {
    disk: Arc<DiskFile>,
    id: [u8; ID_SIZE],
    config: [u8; config::SIZE],
}

impl Block {
    /// A block device over `disk`. Its serial number is `id`, of which the first [`ID_SIZE`] bytes
    /// count.
    pub fn new(disk: DiskFile, id: &str) -> Block {
        let mut id_bytes = [0; ID_SIZE];
        for (byte, &given) in id_bytes.iter_mut().zip(id.as_bytes()) {
            *byte = given;
        }
        let mut space = [0; config::SIZE];
        let capacity = disk.size() / SECTOR_SIZE;
        space[config::CAPACITY..][..8].copy_from_slice(&capacity.to_le_bytes());
        for (offset, value) in [
            (config::SEG_MAX, MAX_SEGMENTS),
            (config::BLK_SIZE, SECTOR_SIZE as u32),
            (config::MAX_DISCARD_SECTORS, MAX_DISCARD_SECTORS),
            (config::MAX_DISCARD_SEG, MAX_RANGES),
            (config::DISCARD_SECTOR_ALIGNMENT, 1),
            (config::MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SECTORS),
            (config::MAX_WRITE_ZEROES_SEG, MAX_RANGES),
        ] {
            space[offset..][..4].copy_from_slice(&value.to_le_bytes());
        }
        space[config::WRITE_ZEROES_MAY_UNMAP] = 1;
        Block {
            disk: Arc::new(disk),
            id: id_bytes,
            config: space,
        }
    }

    /// The disk behind the device.
    pub fn disk(&self) -> Arc<DiskFile> {
        self.disk.clone()
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        device_id::BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = COMMON_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        features |= if self.disk.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, String> {
        let Ok([queue]) = <[VirtQueue; 1]>::try_from(activation.queues) else {
            return Err("this block device has one queue".to_string());
        };
        Ok(Box::new(Worker {
            handler: RequestHandler::new(
                self.disk.clone(),
                self.id,
                activation.features,
                activation.memory.clone(),
                activation.interrupt.clone(),
            ),
            chain: Chain::new(&activation.memory),
            queue,
            interrupt: activation.interrupt,
        }))
    }
}

struct Worker {
    handler: RequestHandler,
    chain: Chain,
    queue: VirtQueue,
    interrupt: Arc<VirtioInterrupt>,
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        if let Err(error) = operations.add(Events::new(&self.queue, EventSet::IN)) {
            self.interrupt.need_reset(&error);
        }
    }

    fn process(&mut self, _events: Events, _operations: &mut EventOps<'_>) {
        self.queue.clear_doorbell();
        if self.interrupt.needs_reset() {
            return;
        }
        let handler = &mut self.handler;
        let served = self.queue.serve(&mut self.chain, &self.interrupt, |chain| {
            handler.handle(chain)
        });
        if let Err(error) = served {
            self.interrupt.need_reset(&error);
        }
    }
}
