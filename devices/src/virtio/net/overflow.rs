//! Room for the end of a packet that does not fit into the driver's buffers.

use std::ops::{Deref, DerefMut};
use std::slice;

use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

use super::MAX_PACKET_SIZE;

/// [`MAX_PACKET_SIZE`] bytes, zero at first, that take no memory of the host before they are written.
///
/// Bytes on the heap would take it at once: to make them zero, an allocator writes to all of them unless it knows
/// that they are fresh from the kernel, and most cards never need them.
pub(super) struct Overflow(MmapRegion);

impl Overflow {
    /// # Errors
    /// If the host has no room for another mapping.
    pub(super) fn new() -> Result<Overflow, MmapRegionError> {
        MmapRegion::new(MAX_PACKET_SIZE).map(Overflow)
    }
}

impl Deref for Overflow {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the region is mapped as long as `self` exists, has this size, is readable, and consists of bytes.
        // Only `self` has its address, so that nothing changes it while it is borrowed.
        unsafe { slice::from_raw_parts(self.0.as_ptr(), self.0.size()) }
    }
}

impl DerefMut for Overflow {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above. The region is writable, and `self` is borrowed by nobody else.
        unsafe { slice::from_raw_parts_mut(self.0.as_ptr(), self.0.size()) }
    }
}
