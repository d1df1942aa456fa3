//! The configuration space of a device (section 2.5).

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The device-specific configuration space: the driver reads it on a vCPU thread, while the worker or
/// the owner of the machine may change it.
#[derive(Debug)]
pub struct ConfigSpace(Mutex<Versioned>);

#[derive(Debug)]
struct Versioned {
    bytes: Vec<u8>,
    generation: u32,
}

impl ConfigSpace {
    /// A configuration space with these bytes.
    pub fn new(bytes: Vec<u8>) -> ConfigSpace {
        ConfigSpace(Mutex::new(Versioned {
            bytes,
            generation: 0,
        }))
    }

    /// Copies the bytes from `offset` on into `data`; what is beyond the end reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let space = self.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = space.bytes.get(start..).unwrap_or_default();
        let count = bytes.len().min(data.len());
        data[..count].copy_from_slice(&bytes[..count]);
        data[count..].fill(0);
    }

    /// The bytes at `offset`, as [`ConfigSpace::read`] gives them.
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

    /// A number that is another whenever the bytes have changed, by which a driver sees that it has
    /// read all of them from one version.
    pub fn generation(&self) -> u32 {
        self.lock().generation
    }

    fn lock(&self) -> MutexGuard<'_, Versioned> {
        // No change leaves it half done, even one that panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn a_change_makes_another_generation() {
        let config = ConfigSpace::new(vec![0; 8]);
        let first = config.generation();
        config.write(0, &[0; 8]);
        assert_eq!(config.generation(), first);
        config.write(4, &[1]);
        assert_ne!(config.generation(), first);
    }
}
