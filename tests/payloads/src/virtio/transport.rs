//! The operations of a driver on a device, independent of the bus.

use core::time::Duration;

use super::mmio::register;
use super::queue::SplitQueue;
use super::slot_queue::SlotQueue;
use super::{Error, MmioDevice, feature, status};
use crate::mmio::{write_16, write_32};
use crate::time::Deadline;

const RESET_TIMEOUT: Duration = Duration::from_secs(3);

/// A device on some bus.
pub trait Transport {
    /// The device type (section 5).
    fn device_id(&self) -> u32;

    /// The device status field.
    fn status(&self) -> u32;

    /// Writes the device status field.
    fn set_status(&self, status: u32);

    /// All features the device offers.
    fn offered_features(&self) -> u64;

    /// Tells the device which features the driver accepts.
    fn accept_features(&self, features: u64);

    /// The most descriptors that queue `index` takes; zero if there is no such queue.
    fn queue_size_max(&self, index: u16) -> u32;

    /// Gives a queue to the device.
    fn attach_queue(&self, queue: &SplitQueue);

    /// The doorbell of queue `index`.
    fn doorbell(&self, index: u16) -> Doorbell;

    /// Reads a byte of the configuration space.
    fn config_8(&self, offset: u64) -> u8;

    /// Reads 32 bits of the configuration space; `offset` is a multiple of 4.
    fn config_32(&self, offset: u64) -> u32;

    /// Acknowledges whatever the device has raised its interrupt for.
    fn acknowledge_interrupt(&self);

    /// Global system interrupt of the device, if it is known.
    fn gsi(&self) -> Option<u32>;

    /// Whether the device has met an error from which only a reset recovers.
    fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Resets the device and waits until it has.
    ///
    /// # Errors
    ///
    /// If its status does not become zero.
    fn reset(&self) -> Result<(), Error> {
        self.set_status(0);
        let deadline = Deadline::after(RESET_TIMEOUT);
        loop {
            match self.status() {
                0 => return Ok(()),
                status if deadline.passed() => return Err(Error::NotReset(status)),
                _ => core::hint::spin_loop(),
            }
        }
    }

    /// Device initialization (section 3.1.1) up to the negotiation of features: those of `wanted`
    /// that the device offers, and `VERSION_1`. Returns what was negotiated.
    ///
    /// # Errors
    ///
    /// If the device cannot be reset, is a legacy one, or refuses what it has offered.
    fn initialise(&self, wanted: u64) -> Result<u64, Error> {
        self.reset()?;
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let offered = self.offered_features();
        if offered & feature::VERSION_1 == 0 {
            return Err(Error::Legacy(offered));
        }
        let accepted = offered & (wanted | feature::VERSION_1);
        self.accept_features(accepted);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        if self.status() & status::FEATURES_OK == 0 {
            return Err(Error::FeaturesRefused(accepted));
        }
        Ok(accepted)
    }

    /// Ends the initialization: the device is live.
    fn set_driver_ok(&self) {
        let before = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set_status(before | status::DRIVER_OK);
    }

    /// Makes a queue of at most `size` descriptors for queue `index`, and gives it to the device.
    ///
    /// # Errors
    ///
    /// If the device has no such queue, or takes fewer descriptors than `needed`.
    fn set_up_slot_queue(
        &self,
        index: u16,
        size: u16,
        needed: u16,
        features: u64,
    ) -> Result<SlotQueue, Error> {
        let max = self.queue_size_max(index);
        let size = u32::from(size).min(max) as u16;
        if size < needed.max(1) {
            return Err(Error::QueueTooSmall(max));
        }
        let event_index = features & feature::EVENT_INDEX != 0;
        let queue = SplitQueue::new(index, size, event_index);
        self.attach_queue(&queue);
        Ok(SlotQueue::new(queue, event_index, self.doorbell(index)))
    }
}

/// A register that notifies a device of new chains in one queue (section 2.9).
#[derive(Debug, Clone, Copy)]
pub struct Doorbell {
    address: u64,
    queue: u16,
    width: DoorbellWidth,
}

/// Size of a doorbell register, which depends on the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorbellWidth {
    /// 16 bits, as on PCI (section 4.1.5.2).
    Bits16,
    /// 32 bits, as with MMIO (section 4.2.2).
    Bits32,
}

impl Doorbell {
    /// The doorbell of queue `queue` at a guest-physical address.
    ///
    /// # Safety
    ///
    /// A device has its doorbell there, of this width.
    pub unsafe fn new(address: u64, queue: u16, width: DoorbellWidth) -> Self {
        Self {
            address,
            queue,
            width,
        }
    }

    /// Rings it.
    #[inline]
    pub fn ring(&self) {
        // SAFETY: a device's register, as the caller of `new` has promised; what the device then
        // does to memory is up to the queues it was given.
        unsafe {
            match self.width {
                DoorbellWidth::Bits16 => write_16(self.address, self.queue),
                DoorbellWidth::Bits32 => write_32(self.address, u32::from(self.queue)),
            }
        }
    }
}

impl Transport for MmioDevice {
    fn device_id(&self) -> u32 {
        Self::device_id(self)
    }

    fn status(&self) -> u32 {
        Self::status(self)
    }

    fn set_status(&self, status: u32) {
        self.write(register::STATUS, status);
    }

    fn offered_features(&self) -> u64 {
        Self::offered_features(self)
    }

    fn accept_features(&self, features: u64) {
        Self::accept_features(self, features);
    }

    fn queue_size_max(&self, index: u16) -> u32 {
        Self::queue_size_max(self, index)
    }

    fn attach_queue(&self, queue: &SplitQueue) {
        Self::attach_queue(self, queue);
    }

    fn doorbell(&self, index: u16) -> Doorbell {
        let address = self.window().address + register::QUEUE_NOTIFY;
        // SAFETY: the register of a device that was probed.
        unsafe { Doorbell::new(address, index, DoorbellWidth::Bits32) }
    }

    fn config_8(&self, offset: u64) -> u8 {
        self.read_byte(register::CONFIG + offset)
    }

    fn config_32(&self, offset: u64) -> u32 {
        Self::config_32(self, offset)
    }

    fn acknowledge_interrupt(&self) {
        Self::acknowledge_interrupt(self);
    }

    fn gsi(&self) -> Option<u32> {
        Some(self.window().gsi)
    }
}
