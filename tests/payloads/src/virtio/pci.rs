//! The virtio-pci transport, without the legacy interface and without interrupts (section 4.1).

use alloc::vec::Vec;

use super::queue::SplitQueue;
use super::transport::{Doorbell, DoorbellWidth, Transport};
use crate::mmio::{read_8, read_16, read_32, write_8, write_16, write_32};
use crate::pci::Function;

const VENDOR: u16 = 0x1af4;
/// Ids of modern devices are this and the device type; older ones have the type as subsystem id.
const FIRST_MODERN_ID: u16 = 0x1040;
const TRANSITIONAL_IDS: core::ops::Range<u16> = 0x1000..FIRST_MODERN_ID;

/// Kinds of structures (section 4.1.4).
const COMMON_CONFIGURATION: u8 = 1;
const NOTIFICATIONS: u8 = 2;
const INTERRUPT_STATUS: u8 = 3;
const DEVICE_CONFIGURATION: u8 = 4;

/// Offsets in a capability.
mod capability {
    pub const KIND: u8 = 3;
    pub const BAR: u8 = 4;
    pub const OFFSET: u8 = 8;
    pub const NOTIFY_MULTIPLIER: u8 = 16;
}

/// Offsets in the common configuration.
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const DEVICE_STATUS: u64 = 20;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    pub const QUEUE_DESCRIPTORS: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

/// A virtio device on PCI: the guest-physical addresses of its structures.
pub struct PciDevice {
    device_id: u32,
    common: u64,
    notifications: u64,
    notify_multiplier: u32,
    interrupt_status: u64,
    device_configuration: u64,
}

impl PciDevice {
    /// The virtio devices on the first bus, in order.
    pub fn all() -> Vec<Self> {
        Function::all().filter_map(Self::probe).collect()
    }

    /// The device at a function, if it is a virtio device with all structures within reach.
    fn probe(function: Function) -> Option<Self> {
        if function.vendor() != VENDOR {
            return None;
        }
        let device_id = match function.device() {
            id if TRANSITIONAL_IDS.contains(&id) => u32::from(function.subsystem()),
            id => u32::from(id.checked_sub(FIRST_MODERN_ID)?),
        };
        let mut device = Self {
            device_id,
            common: 0,
            notifications: 0,
            notify_multiplier: 0,
            interrupt_status: 0,
            device_configuration: 0,
        };
        let mut bars = [None; 6];
        for at in function.vendor_capabilities() {
            let index = function.read_8(at + capability::BAR);
            let Some(bar) = bars.get_mut(usize::from(index)) else {
                continue;
            };
            if bar.is_none() {
                *bar = function.map_bar(index);
            }
            let Some(address) = *bar else {
                continue;
            };
            let place = address + u64::from(function.read_32(at + capability::OFFSET));
            let kind = function.read_8(at + capability::KIND);
            let structure = match kind {
                COMMON_CONFIGURATION => &mut device.common,
                NOTIFICATIONS => &mut device.notifications,
                INTERRUPT_STATUS => &mut device.interrupt_status,
                DEVICE_CONFIGURATION => &mut device.device_configuration,
                _ => continue,
            };
            // The first of a kind counts (section 4.1.4.1).
            if *structure != 0 {
                continue;
            }
            *structure = place;
            if kind == NOTIFICATIONS {
                device.notify_multiplier = function.read_32(at + capability::NOTIFY_MULTIPLIER);
            }
        }
        let complete = [
            device.common,
            device.notifications,
            device.interrupt_status,
            device.device_configuration,
        ];
        (!complete.contains(&0)).then_some(device)
    }

    fn read_16(&self, offset: u64) -> u16 {
        // SAFETY: a register of the device, which is mapped; what the device then does to memory
        // is up to the queues it was given.
        unsafe { read_16(self.common + offset) }
    }

    fn write_16(&self, offset: u64, value: u16) {
        // SAFETY: as for `read_16`.
        unsafe { write_16(self.common + offset, value) }
    }

    fn read_32(&self, offset: u64) -> u32 {
        // SAFETY: as for `read_16`.
        unsafe { read_32(self.common + offset) }
    }

    fn write_32(&self, offset: u64, value: u32) {
        // SAFETY: as for `read_16`.
        unsafe { write_32(self.common + offset, value) }
    }

    fn write_address(&self, offset: u64, address: u64) {
        self.write_32(offset, address as u32);
        self.write_32(offset + 4, (address >> 32) as u32);
    }
}

impl Transport for PciDevice {
    fn device_id(&self) -> u32 {
        self.device_id
    }

    fn status(&self) -> u32 {
        // SAFETY: as for `read_16`.
        u32::from(unsafe { read_8(self.common + common::DEVICE_STATUS) })
    }

    fn set_status(&self, status: u32) {
        // SAFETY: as for `read_16`.
        unsafe { write_8(self.common + common::DEVICE_STATUS, status as u8) }
    }

    fn offered_features(&self) -> u64 {
        let half = |select| {
            self.write_32(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.read_32(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    fn accept_features(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write_32(common::DRIVER_FEATURE_SELECT, select);
            self.write_32(common::DRIVER_FEATURE, half);
        }
    }

    fn queue_size_max(&self, index: u16) -> u32 {
        self.write_16(common::QUEUE_SELECT, index);
        u32::from(self.read_16(common::QUEUE_SIZE))
    }

    fn attach_queue(&self, queue: &SplitQueue) {
        let addresses = queue.addresses();
        self.write_16(common::QUEUE_SELECT, queue.index());
        self.write_16(common::QUEUE_SIZE, queue.size());
        self.write_address(common::QUEUE_DESCRIPTORS, addresses.descriptors);
        self.write_address(common::QUEUE_DRIVER, addresses.available);
        self.write_address(common::QUEUE_DEVICE, addresses.used);
        self.write_16(common::QUEUE_ENABLE, 1);
    }

    fn doorbell(&self, index: u16) -> Doorbell {
        self.write_16(common::QUEUE_SELECT, index);
        let offset = self.read_16(common::QUEUE_NOTIFY_OFFSET);
        let address = self.notifications + u64::from(offset) * u64::from(self.notify_multiplier);
        // SAFETY: where the device says that the queue's doorbell is (section 4.1.4.4).
        unsafe { Doorbell::new(address, index, DoorbellWidth::Bits16) }
    }

    fn config_8(&self, offset: u64) -> u8 {
        // SAFETY: as for `read_16`.
        unsafe { read_8(self.device_configuration + offset) }
    }

    fn config_32(&self, offset: u64) -> u32 {
        // SAFETY: as for `read_16`.
        unsafe { read_32(self.device_configuration + offset) }
    }

    fn acknowledge_interrupt(&self) {
        // SAFETY: as for `read_16`; reading is the acknowledgement (section 4.1.4.5).
        unsafe { read_8(self.interrupt_status) };
    }

    fn gsi(&self) -> Option<u32> {
        None
    }
}
