//! What images that are created have in common.

use std::io;
use std::ops::Range;

use crate::{ImageFile, Target};

const SECTOR: u64 = 512;

/// An image in a new file, which is written at any place, and gets its tables in the end.
pub trait NewImage: Send + Sync {
    /// Returns the file.
    fn file(&self) -> &dyn ImageFile;

    /// Writes `bytes` to `offset` of the disk.
    ///
    /// # Errors
    /// If the host cannot write them.
    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Writes what says where the data is.
    ///
    /// # Errors
    /// If the host cannot write it, or the image has become too large for its format.
    fn write_tables(&self) -> io::Result<()>;
}

impl<T: NewImage> Target for T {
    fn unit(&self) -> u64 {
        SECTOR
    }

    fn is_sequential(&self) -> bool {
        false
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_data(bytes, offset)
    }

    fn write_zeroes(&self, _: Range<u64>) -> io::Result<()> {
        // What has not been written reads as zeroes.
        Ok(())
    }

    fn finish(&self, sync: bool) -> io::Result<()> {
        self.write_tables()?;
        if sync { self.file().sync() } else { Ok(()) }
    }
}
