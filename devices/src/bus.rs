//! Buses: they find the device that answers at an address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::lock::lock;

/// A device with registers on a bus.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes of registers at `offset` from the start of the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the registers at `offset` from the start of the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("cannot place a device at {start:#x}: a range of {size:#x} bytes does not fit there")]
    InvalidRange {
        /// First address asked for.
        start: u64,
        /// Size asked for in bytes.
        size: u64,
    },
    /// Another device occupies part of the range.
    #[error("cannot place a device at {start:#x}: another device is at {other:#x}")]
    Overlap {
        /// First address asked for.
        start: u64,
        /// First address of that other device.
        other: u64,
    },
}

struct Slot {
    size: u64,
    /// Offset of the range from the start of the device's registers.
    offset: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A map from address ranges to devices: one for memory-mapped registers, one for I/O ports.
///
/// It is complete before the first vCPU runs, so an access takes only the lock of its device.
#[derive(Default)]
pub struct Bus {
    slots: BTreeMap<u64, Slot>,
}

impl Bus {
    /// Puts `device` at addresses `start` to `start + size - 1`.
    ///
    /// # Errors
    /// If the range is not valid or not free.
    pub fn insert(
        &mut self,
        start: u64,
        size: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        self.insert_part(start, size, 0, device)
    }

    /// Puts the registers of `device` from `offset` on at addresses `start` to `start + size - 1`.
    ///
    /// # Errors
    /// If the range is not valid or not free.
    pub fn insert_part(
        &mut self,
        start: u64,
        size: u64,
        offset: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let last = size
            .checked_sub(1)
            .and_then(|span| start.checked_add(span))
            .ok_or(BusError::InvalidRange { start, size })?;
        if let Some((&other, slot)) = self.slots.range(..=last).next_back()
            && start - start.min(other) < slot.size
        {
            return Err(BusError::Overlap { start, other });
        }
        let slot = Slot {
            size,
            offset,
            device,
        };
        self.slots.insert(start, slot);
        Ok(())
    }

    /// Reads from the device at `address`. If there is none, all bits read as one and the result is `false`.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes to the device at `address`. If there is none, nothing happens and the result is `false`.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).write(offset, data);
                true
            }
            None => false,
        }
    }

    /// An access that passes the end of a device's range reaches no device.
    fn find(&self, address: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (start, slot) = self.slots.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(len as u64)?;
        (end <= slot.size).then(|| (slot.offset + offset, &*slot.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        written: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    fn device() -> Arc<Mutex<Recorder>> {
        Arc::new(Mutex::new(Recorder::default()))
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let mut bus = Bus::default();
        let recorder = device();
        bus.insert(0x1000, 0x10, recorder.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(bus.write(0x100f, &[9]));
        assert_eq!(recorder.lock().unwrap().written, [(0xf, vec![9])]);
    }

    #[test]
    fn an_access_to_a_part_reaches_the_registers_of_the_part() {
        let mut bus = Bus::default();
        let recorder = device();
        bus.insert(0x60, 1, recorder.clone()).unwrap();
        bus.insert_part(0x64, 1, 4, recorder.clone()).unwrap();
        let mut data = [0];
        assert!(bus.read(0x64, &mut data));
        assert_eq!(data, [4]);
        assert!(!bus.write(0x61, &[1]));
        assert!(bus.write(0x60, &[2]));
        assert!(bus.write(0x64, &[3]));
        assert_eq!(
            recorder.lock().unwrap().written,
            [(0, vec![2]), (4, vec![3])]
        );
    }

    #[test]
    fn an_access_outside_every_device_reads_ones() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, device()).unwrap();
        for address in [0xfff, 0x1010, 0x100d, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn ranges_must_be_valid_and_free() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, device()).unwrap();
        for (start, size) in [(0x1000, 1), (0x100f, 1), (0xfff, 2), (0x800, 0x1000)] {
            assert_eq!(
                bus.insert(start, size, device()),
                Err(BusError::Overlap {
                    start,
                    other: 0x1000
                })
            );
        }
        for (start, size) in [(0, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(start, size, device()),
                Err(BusError::InvalidRange { start, size })
            );
        }
        bus.insert(0xfff, 1, device()).unwrap();
        bus.insert(0x1010, 1, device()).unwrap();
        bus.insert(u64::MAX, 1, device()).unwrap();
    }
}
