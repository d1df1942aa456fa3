//! The virtio-mmio transport, version 2 (section 4.2.2): a device's registers in a window of guest-physical
//! addresses.

mod interrupt;

use std::io;
use std::sync::Arc;

use bantam_memory::GuestMemory;
use bantam_state::{RestoreError, SaveError, SavedState, Section};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::core::{TransportCore, set_high, set_low};
use crate::EventLoop;
use crate::bus::BusDevice;
use crate::lifecycle::Device;
use crate::virtio::VirtioDevice;
use interrupt::MmioInterrupt;
pub use interrupt::MmioLink;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Version of the register layout.
const VERSION: u32 = 2;
/// Vendor of the device: "BNTM", little-endian.
const VENDOR: u32 = 0x4d54_4e42;

/// Offset of `QueueNotify`, the doorbell register that takes the index of a queue.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Size of `QueueNotify` in bytes.
pub const QUEUE_NOTIFY_SIZE: u32 = 4;

/// Offsets of the other registers.
pub(in crate::virtio) mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS_LOW: u64 = 0x80;
    pub const QUEUE_DESCRIPTORS_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHARED_MEMORY_LENGTH_LOW: u64 = 0xb0;
    pub const SHARED_MEMORY_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    /// Start of the device-specific configuration space.
    pub const CONFIG: u64 = 0x100;
}

/// The registers of one virtio device, and the device behind them.
pub struct MmioTransport {
    core: TransportCore,
    interrupt: Arc<MmioInterrupt>,
}

/// The state of a device with its transport.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct MmioState {
    interrupt_status: u32,
    core: Section,
}

impl SavedState for MmioState {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u16 = 1;
}

impl MmioTransport {
    /// Makes registers for `device`, whose worker will run on `event_loop` and reach the driver through
    /// `link`.
    ///
    /// # Errors
    /// If the host is out of file descriptors for the doorbells.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        event_loop: EventLoop,
        link: MmioLink,
    ) -> io::Result<MmioTransport> {
        let MmioLink { driver, interrupt } = link;
        let core = TransportCore::new(device, memory, event_loop, driver)?;
        Ok(MmioTransport { core, interrupt })
    }

    /// Returns one event for each queue, to be signalled when the driver writes the queue's index to
    /// [`QUEUE_NOTIFY`]. If they are bound to that register as ioeventfds, the driver's doorbells reach the
    /// worker without passing through [`BusDevice::write`].
    pub fn doorbells(&self) -> &[EventFd] {
        &self.core.doorbells
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.core.device.device_id(),
            register::VENDOR => VENDOR,
            register::DEVICE_FEATURES => self.core.selected_device_features(),
            register::QUEUE_SIZE_MAX => self.core.selected_queue_max_size().into(),
            register::QUEUE_READY => self
                .core
                .selected_queue()
                .map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.core.status(),
            register::CONFIG_GENERATION => self.core.device.config().generation(),
            // No device has shared memory, so its length and base read as -1 (section 4.2.2).
            register::SHARED_MEMORY_LENGTH_LOW..=register::SHARED_MEMORY_BASE_HIGH => u32::MAX,
            _ => {
                self.core.link.warn(format_args!(
                    "read of register {offset:#x}, which has no value"
                ));
                0
            }
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.core.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.core.driver_features_select = value,
            register::DRIVER_FEATURES => self.core.set_driver_features(value),
            register::QUEUE_SELECT => self.core.queue_select = value,
            QUEUE_NOTIFY => self.core.ring_doorbell(value),
            register::INTERRUPT_ACKNOWLEDGE => self.interrupt.acknowledge(value),
            register::STATUS => {
                self.core.set_status(value);
                if value == 0 {
                    self.interrupt.reset();
                }
            }
            register::QUEUE_SIZE => self.core.set_up_queue(|queue| queue.size = value),
            // A driver that releases a device after resetting it.
            register::QUEUE_READY if value == 0 && self.core.status() == 0 => {}
            register::QUEUE_READY => self.core.set_up_queue(|queue| queue.ready = value == 1),
            register::QUEUE_DESCRIPTORS_LOW => {
                self.core
                    .set_up_queue(|queue| set_low(&mut queue.descriptors, value));
            }
            register::QUEUE_DESCRIPTORS_HIGH => {
                self.core
                    .set_up_queue(|queue| set_high(&mut queue.descriptors, value));
            }
            register::QUEUE_DRIVER_LOW => {
                self.core
                    .set_up_queue(|queue| set_low(&mut queue.driver, value));
            }
            register::QUEUE_DRIVER_HIGH => {
                self.core
                    .set_up_queue(|queue| set_high(&mut queue.driver, value));
            }
            register::QUEUE_DEVICE_LOW => {
                self.core
                    .set_up_queue(|queue| set_low(&mut queue.device, value));
            }
            register::QUEUE_DEVICE_HIGH => {
                self.core
                    .set_up_queue(|queue| set_high(&mut queue.device, value));
            }
            _ => self.core.link.warn(format_args!(
                "write of {value:#x} to register {offset:#x}, which cannot be written"
            )),
        }
    }
}

impl Device for MmioTransport {
    fn pause(&mut self) -> io::Result<()> {
        self.core.pause()
    }

    fn resume(&mut self) -> io::Result<()> {
        self.core.resume()
    }

    fn reset(&mut self) {
        self.core.reset();
        self.interrupt.reset();
    }

    fn save(&self) -> Result<Section, SaveError> {
        Section::of(&MmioState {
            interrupt_status: self.interrupt.status(),
            core: self.core.save()?,
        })
    }

    fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.interrupt.reset();
        let restored = section.decode().and_then(|state: MmioState| {
            self.core.restore(&state.core)?;
            if self.interrupt.restore(state.interrupt_status) {
                return Ok(());
            }
            Err(RestoreError::Invalid {
                kind: self.core.link.name().to_owned(),
                reason: "its interrupt has a cause that does not exist".to_owned(),
            })
        });
        if restored.is_err() {
            self.reset();
        }
        restored
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(start) = offset.checked_sub(register::CONFIG) {
            self.core.device.config().read(start, data);
            return;
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(bytes) if offset.is_multiple_of(4) => {
                *bytes = self.read_register(offset).to_le_bytes();
            }
            _ => {
                data.fill(0);
                self.core.link.warn(format_args!(
                    "read of {} bytes at {offset:#x}: registers are 4 bytes wide",
                    data.len()
                ));
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(start) = offset.checked_sub(register::CONFIG) {
            if self.core.device.config().write_for_driver(start, data) {
                if let Some(notice) = self.core.device.driver_wrote_config(start, data) {
                    self.core.link.notify_owner(notice);
                }
            } else {
                self.core.link.warn(format_args!(
                    "write of {} bytes at {offset:#x} of the configuration space, which are not the \
                     driver's to write",
                    data.len()
                ));
            }
            return;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(bytes));
            }
            _ => self.core.link.warn(format_args!(
                "write of {} bytes at {offset:#x}: registers are 4 bytes wide",
                data.len()
            )),
        }
    }
}

#[cfg(test)]
mod tests;
