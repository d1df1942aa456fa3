//! The virtio-mmio transport, version 2 (section 4.2.2).

use super::queue::SplitQueue;
use super::{Error, feature, status};
use crate::arguments::VirtioMmioWindow;
use crate::mmio::{read_8, read_16, read_32, write_8, write_16, write_32};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;

/// Offsets of the registers.
#[expect(missing_docs, reason = "named as in section 4.2.2")]
pub mod register {
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS_LOW: u64 = 0x80;
    pub const QUEUE_DESCRIPTORS_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Guest-physical addresses of a queue's three parts.
#[derive(Debug, Clone, Copy)]
pub struct QueueAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// The registers of one device.
#[derive(Clone, Copy)]
pub struct MmioDevice {
    window: VirtioMmioWindow,
}

impl MmioDevice {
    /// The device in this window.
    ///
    /// # Errors
    ///
    /// If there is no virtio-mmio device of version 2.
    pub fn probe(window: VirtioMmioWindow) -> Result<Self, Error> {
        let device = Self { window };
        match (
            device.read(register::MAGIC_VALUE),
            device.read(register::VERSION),
        ) {
            (MAGIC, VERSION) => Ok(device),
            (magic, version) => Err(Error::NotVirtio(magic, version)),
        }
    }

    /// Returns the address of its registers.
    pub fn window(&self) -> VirtioMmioWindow {
        self.window
    }

    /// Reads a register.
    pub fn read(&self, register: u64) -> u32 {
        // SAFETY: device registers that are mapped; what the device then does to memory is up to
        // the queues it was given.
        unsafe { read_32(self.window.address + register) }
    }

    /// Writes a register.
    pub fn write(&self, register: u64, value: u32) {
        // SAFETY: as for `read`.
        unsafe { write_32(self.window.address + register, value) }
    }

    /// Reads a byte at any offset of the window, which only the configuration space allows.
    pub fn read_byte(&self, offset: u64) -> u8 {
        // SAFETY: as for `read`.
        unsafe { read_8(self.window.address + offset) }
    }

    /// Reads two bytes at any offset of the window, which only the configuration space allows.
    pub fn read_half(&self, offset: u64) -> u16 {
        // SAFETY: as for `read`.
        unsafe { read_16(self.window.address + offset) }
    }

    /// Writes a byte at any offset of the window, which only the configuration space allows.
    pub fn write_byte(&self, offset: u64, value: u8) {
        // SAFETY: as for `read`.
        unsafe { write_8(self.window.address + offset, value) }
    }

    /// Writes two bytes at any offset of the window, which only the configuration space allows.
    pub fn write_half(&self, offset: u64, value: u16) {
        // SAFETY: as for `read`.
        unsafe { write_16(self.window.address + offset, value) }
    }

    /// Returns the device type; zero means no device.
    pub fn device_id(&self) -> u32 {
        self.read(register::DEVICE_ID)
    }

    /// Reads 64 bits of the configuration space, `offset` bytes from its start.
    pub fn config_64(&self, offset: u64) -> u64 {
        let (low, high) = (self.config_32(offset), self.config_32(offset + 4));
        u64::from(low) | u64::from(high) << 32
    }

    /// Reads 32 bits of the configuration space, `offset` bytes from its start.
    pub fn config_32(&self, offset: u64) -> u32 {
        self.read(register::CONFIG + offset)
    }

    /// The device status field.
    pub fn status(&self) -> u32 {
        self.read(register::STATUS)
    }

    /// Whether the device has met an error from which only a reset recovers.
    pub fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// All features the device offers.
    pub fn offered_features(&self) -> u64 {
        self.write(register::DEVICE_FEATURES_SELECT, 1);
        let high = self.read(register::DEVICE_FEATURES);
        self.write(register::DEVICE_FEATURES_SELECT, 0);
        u64::from(high) << 32 | u64::from(self.read(register::DEVICE_FEATURES))
    }

    /// Tells the device which features the driver accepts.
    pub fn accept_features(&self, features: u64) {
        self.write(register::DRIVER_FEATURES_SELECT, 1);
        self.write(register::DRIVER_FEATURES, (features >> 32) as u32);
        self.write(register::DRIVER_FEATURES_SELECT, 0);
        self.write(register::DRIVER_FEATURES, features as u32);
    }

    /// The most descriptors that queue `index` takes; zero if there is no such queue.
    pub fn queue_size_max(&self, index: u16) -> u32 {
        self.write(register::QUEUE_SELECT, u32::from(index));
        self.read(register::QUEUE_SIZE_MAX)
    }

    /// Makes a queue of at most `size` descriptors for queue `index`, in memory of the heap, and
    /// gives it to the device. Comes after [`initialise`](super::Transport::initialise), whose
    /// result says which features hold.
    ///
    /// # Errors
    ///
    /// If the device has no such queue.
    pub fn set_up_queue(&self, index: u16, size: u16, features: u64) -> Result<SplitQueue, Error> {
        let max = self.queue_size_max(index);
        let size = u32::from(size).min(max) as u16;
        if size == 0 {
            return Err(Error::QueueTooSmall(max));
        }
        let queue = SplitQueue::new(index, size, features & feature::EVENT_INDEX != 0);
        self.attach_queue(&queue);
        Ok(queue)
    }

    /// Gives a queue to the device.
    pub fn attach_queue(&self, queue: &SplitQueue) {
        self.write_queue(
            u32::from(queue.index()),
            u32::from(queue.size()),
            queue.addresses(),
        );
    }

    /// Writes all registers of a queue, unchecked.
    pub fn write_queue(&self, index: u32, size: u32, addresses: QueueAddresses) {
        self.write(register::QUEUE_SELECT, index);
        self.write(register::QUEUE_SIZE, size);
        self.write(
            register::QUEUE_DESCRIPTORS_LOW,
            addresses.descriptors as u32,
        );
        self.write(
            register::QUEUE_DESCRIPTORS_HIGH,
            (addresses.descriptors >> 32) as u32,
        );
        self.write(register::QUEUE_DRIVER_LOW, addresses.available as u32);
        self.write(
            register::QUEUE_DRIVER_HIGH,
            (addresses.available >> 32) as u32,
        );
        self.write(register::QUEUE_DEVICE_LOW, addresses.used as u32);
        self.write(register::QUEUE_DEVICE_HIGH, (addresses.used >> 32) as u32);
        self.write(register::QUEUE_READY, 1);
    }

    /// Rings the doorbell of queue `index`.
    pub fn notify(&self, index: u32) {
        self.write(register::QUEUE_NOTIFY, index);
    }

    /// Acknowledges whatever the device has raised its interrupt for, and returns that.
    pub fn acknowledge_interrupt(&self) -> u32 {
        let pending = self.read(register::INTERRUPT_STATUS);
        if pending != 0 {
            self.write(register::INTERRUPT_ACKNOWLEDGE, pending);
        }
        pending
    }
}
