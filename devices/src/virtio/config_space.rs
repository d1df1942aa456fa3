//! The device-specific configuration space (section 2.5).

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use crate::lock::lock;

/// The device-specific configuration space. The driver reads it on a vCPU thread, while the worker or the
/// owner of the machine may change it. The driver may write at most one field of it.
#[derive(Debug)]
pub struct ConfigSpace {
    space: Mutex<Versioned>,
    driver_field: Range<usize>,
}

#[derive(Debug)]
struct Versioned {
    bytes: Vec<u8>,
    generation: u32,
}

impl ConfigSpace {
    /// Makes a configuration space with these bytes, which the driver can only read.
    pub fn new(bytes: Vec<u8>) -> ConfigSpace {
        ConfigSpace::with_driver_field(bytes, 0..0)
    }

    /// Makes a configuration space with these bytes; the driver may write those in `driver_field`.
    pub fn with_driver_field(bytes: Vec<u8>, driver_field: Range<usize>) -> ConfigSpace {
        ConfigSpace {
            space: Mutex::new(Versioned {
                bytes,
                generation: 0,
            }),
            driver_field,
        }
    }

    /// Copies the bytes from `offset` on into `data`; bytes beyond the end read as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let space = self.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = space.bytes.get(start..).unwrap_or_default();
        let count = bytes.len().min(data.len());
        data[..count].copy_from_slice(&bytes[..count]);
        data[count..].fill(0);
    }

    /// Returns the bytes at `offset`, like [`ConfigSpace::read`].
    pub fn array<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Overwrites the bytes from `offset` on, as far as they are within the space.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let mut space = self.lock();
        let target = space.bytes.iter_mut().skip(offset);
        let mut changed = false;
        for (byte, &new) in target.zip(data) {
            changed |= *byte != new;
            *byte = new;
        }
        if changed {
            space.generation = space.generation.wrapping_add(1);
        }
    }

    /// Overwrites the bytes from `offset` on for the driver. Writes nothing and returns `false` if they are
    /// not all in the driver's field. The generation stays, as the driver knows what it wrote itself.
    pub fn write_for_driver(&self, offset: u64, data: &[u8]) -> bool {
        let field = &self.driver_field;
        let Ok(start) = usize::try_from(offset) else {
            return false;
        };
        let Some(end) = start.checked_add(data.len()) else {
            return false;
        };
        if start < field.start || end > field.end {
            return false;
        }
        match self.lock().bytes.get_mut(start..end) {
            Some(bytes) => {
                bytes.copy_from_slice(data);
                true
            }
            None => false,
        }
    }

    /// Sets the driver's field to zero, its value before a driver has written to it.
    pub fn reset_driver_field(&self) {
        if let Some(bytes) = self.lock().bytes.get_mut(self.driver_field.clone()) {
            bytes.fill(0);
        }
    }

    /// Returns a number that changes whenever the device changes bytes. A driver compares it to check that
    /// all the bytes that it has read are from one version.
    pub fn generation(&self) -> u32 {
        self.lock().generation
    }

    /// Returns all bytes and the generation.
    pub(super) fn save(&self) -> (Vec<u8>, u32) {
        let space = self.lock();
        (space.bytes.clone(), space.generation)
    }

    /// Takes over what [`ConfigSpace::save`] returned.
    ///
    /// # Errors
    /// If its size differs.
    pub(super) fn restore(&self, bytes: &[u8], generation: u32) -> Result<(), String> {
        let mut space = self.lock();
        if space.bytes.len() != bytes.len() {
            return Err(format!(
                "its configuration space has {} bytes, and the device's {}",
                bytes.len(),
                space.bytes.len()
            ));
        }
        space.bytes.copy_from_slice(bytes);
        space.generation = generation;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Versioned> {
        lock(&self.space)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_end_reads_as_zero_and_is_not_written() {
        let config = ConfigSpace::new(vec![1, 2, 3]);
        config.write(2, &[9, 9]);
        assert_eq!(config.array(1), [2, 9, 0, 0]);
        assert_eq!(config.array(3), [0]);
        assert_eq!(config.array(u64::MAX), [0; 2]);
        config.write(usize::MAX, &[1]);
    }

    #[test]
    fn a_driver_writes_to_its_field_alone() {
        let config = ConfigSpace::with_driver_field(vec![0; 12], 4..8);
        let generation = config.generation();
        assert!(config.write_for_driver(4, &[1, 2, 3, 4]));
        assert!(config.write_for_driver(5, &[9, 8]));
        for (offset, data) in [
            (0, &[7; 4][..]),
            (3, &[7; 2]),
            (7, &[7; 2]),
            (8, &[7; 4]),
            (4, &[7; 8]),
            (u64::MAX, &[7; 2]),
        ] {
            assert!(!config.write_for_driver(offset, data), "{offset}");
        }
        assert_eq!(config.array(0), [0, 0, 0, 0, 1, 9, 8, 4, 0, 0, 0, 0]);
        assert_eq!(config.generation(), generation);
        config.write(0, &[5; 12]);
        config.reset_driver_field();
        assert_eq!(config.array(0), [5, 5, 5, 5, 0, 0, 0, 0, 5, 5, 5, 5]);

        let config = ConfigSpace::new(vec![0; 4]);
        assert!(!config.write_for_driver(0, &[1]));
    }

    #[test]
    fn a_change_makes_another_generation() {
        let config = ConfigSpace::new(vec![0; 8]);
        let first = config.generation();
        config.write(0, &[0; 8]);
        assert_eq!(config.generation(), first);
        config.write(4, &[1]);
        assert_ne!(config.generation(), first);
    }
}
