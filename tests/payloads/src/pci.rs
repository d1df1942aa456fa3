//! PCI configuration space by the ports 0xcf8 and 0xcfc (PCI Local Bus Specification 3.0, section
//! 3.2.2.3.2), limited to the first bus, which suffices to find virtio devices.

use core::iter;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::system_call::{read_port_32, write_port_32};

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

const DEVICES: u8 = 32;
const FUNCTIONS: u8 = 8;
const NO_VENDOR: u16 = 0xffff;

/// Offsets in the configuration space of a function.
mod register {
    pub const IDS: u8 = 0x00;
    pub const COMMAND_STATUS: u8 = 0x04;
    pub const HEADER_TYPE: u8 = 0x0e;
    pub const FIRST_BAR: u8 = 0x10;
    pub const SUBSYSTEM: u8 = 0x2c;
    pub const CAPABILITIES: u8 = 0x34;
}

const COMMAND_MEMORY_AND_MASTER: u32 = 0b110;
const STATUS_CAPABILITIES: u32 = 1 << 20;
const MULTIFUNCTION: u8 = 0x80;
const VENDOR_CAPABILITY: u8 = 0x09;
/// Most capabilities: those of at least four bytes that fit after the header.
const MAX_CAPABILITIES: usize = (256 - 64) / 4;

const BAR_PORTS: u32 = 1;
const BAR_TYPE: u32 = 0b110;
const BAR_64_BITS: u32 = 0b100;
const BAR_FLAGS: u32 = 0xf;

/// Address for registers that the firmware has not assigned, or has put above 4 GiB, where they are
/// not mapped. It is below the I/O APIC, where known machines have neither RAM nor anything else.
const FREE_SPACE: u64 = 0xe800_0000;
const FREE_SPACE_END: u64 = 0xf000_0000;

/// One function of a device on the first bus.
#[derive(Clone, Copy)]
pub struct Function {
    device: u8,
    number: u8,
}

impl Function {
    /// Returns the functions that exist; none if there is no PCI.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..DEVICES).flat_map(|device| {
            let first = Self { device, number: 0 };
            let count = if first.vendor() == NO_VENDOR {
                0
            } else if first.read_8(register::HEADER_TYPE) & MULTIFUNCTION != 0 {
                FUNCTIONS
            } else {
                1
            };
            let functions = (0..count).map(move |number| Self { device, number });
            functions.filter(|function| function.vendor() != NO_VENDOR)
        })
    }

    /// Vendor id.
    pub fn vendor(self) -> u16 {
        self.read_32(register::IDS) as u16
    }

    /// Device id.
    pub fn device(self) -> u16 {
        (self.read_32(register::IDS) >> 16) as u16
    }

    /// Subsystem id.
    pub fn subsystem(self) -> u16 {
        (self.read_32(register::SUBSYSTEM) >> 16) as u16
    }

    /// Reads a byte of the configuration space.
    pub fn read_8(self, offset: u8) -> u8 {
        (self.read_32(offset & !3) >> (8 * (offset & 3))) as u8
    }

    /// Reads four bytes of the configuration space; `offset` is a multiple of 4.
    pub fn read_32(self, offset: u8) -> u32 {
        self.select(offset);
        read_port_32(CONFIG_DATA)
    }

    fn write_32(self, offset: u8, value: u32) {
        self.select(offset);
        write_port_32(CONFIG_DATA, value);
    }

    fn select(self, offset: u8) {
        let function = u32::from(self.device) << 11 | u32::from(self.number) << 8;
        write_port_32(CONFIG_ADDRESS, ENABLE | function | u32::from(offset & !3));
    }

    /// Offsets of the vendor's own capabilities.
    pub fn vendor_capabilities(self) -> impl Iterator<Item = u8> {
        let has_any = self.read_32(register::COMMAND_STATUS) & STATUS_CAPABILITIES != 0;
        let first = has_any.then(|| self.read_8(register::CAPABILITIES) & !3);
        let not_zero = |offset: &u8| *offset != 0;
        iter::successors(first.filter(not_zero), move |offset| {
            let next = self.read_8(offset.wrapping_add(1)) & !3;
            Some(next).filter(not_zero)
        })
        .take(MAX_CAPABILITIES)
        .filter(move |&offset| self.read_8(offset) == VENDOR_CAPABILITY)
    }

    /// Guest-physical address of the registers of base address register `index`, less than 6: the
    /// firmware's address, or else free space below 4 GiB. Enables them, and the device's DMA.
    /// `None` for ports, and if there is no room.
    pub fn map_bar(self, index: u8) -> Option<u64> {
        let low = register::FIRST_BAR + 4 * index;
        let value = self.read_32(low);
        if value & BAR_PORTS != 0 {
            return None;
        }
        let high = (value & BAR_TYPE == BAR_64_BITS && index < 5).then_some(low + 4);
        let address = u64::from(value & !BAR_FLAGS)
            | high.map_or(0, |high| u64::from(self.read_32(high)) << 32);
        let command = self.read_32(register::COMMAND_STATUS) as u16;
        let address = if address == 0 || address > u64::from(u32::MAX) {
            self.write_32(register::COMMAND_STATUS, 0);
            self.write_32(low, u32::MAX);
            let size = u64::from(!(self.read_32(low) & !BAR_FLAGS)) + 1;
            let address = take_free_space(size)?;
            self.write_32(low, address as u32);
            if let Some(high) = high {
                self.write_32(high, 0);
            }
            address
        } else {
            address
        };
        let command = u32::from(command) | COMMAND_MEMORY_AND_MASTER;
        self.write_32(register::COMMAND_STATUS, command);
        Some(address)
    }
}

/// Allocates free space of `size` bytes, a power of two, aligned to that.
fn take_free_space(size: u64) -> Option<u64> {
    static NEXT: AtomicU64 = AtomicU64::new(FREE_SPACE);
    let start = NEXT.load(Ordering::Relaxed).next_multiple_of(size);
    let end = start.checked_add(size)?;
    if end > FREE_SPACE_END {
        return None;
    }
    NEXT.store(end, Ordering::Relaxed);
    Some(start)
}
