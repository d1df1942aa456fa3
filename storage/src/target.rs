//! What a disk is copied to.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::Image;

/// What a disk is copied to.
pub trait Target: Send + Sync {
    /// Returns the size of the units in which data come: whole ones, except at the end of the disk. It is a
    /// power of two.
    fn unit(&self) -> u64;

    /// Whether data have to come in ascending order.
    fn is_sequential(&self) -> bool;

    /// Writes `bytes` to `offset` of the disk.
    ///
    /// # Errors
    /// If the host cannot write them.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// If the host cannot do it.
    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()>;

    /// Writes what is left to write when the whole disk has been copied; with `sync`, brings all of it to
    /// stable storage.
    ///
    /// # Errors
    /// If the host cannot do it.
    fn finish(&self, sync: bool) -> io::Result<()>;
}

/// An image that is written at any place.
pub struct ImageTarget(pub Arc<dyn Image>);

impl Target for ImageTarget {
    fn unit(&self) -> u64 {
        512
    }

    fn is_sequential(&self) -> bool {
        false
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        self.0.write_zeroes(range, true)
    }

    fn finish(&self, sync: bool) -> io::Result<()> {
        match sync {
            true => self.0.flush(),
            false => Ok(()),
        }
    }
}
