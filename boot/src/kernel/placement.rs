//! Where a part of a kernel may be in guest memory.

use bantam_arch::layout;
use bantam_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::KernelError;

/// Checks that `size` bytes at `address` are above the boot structures and below the device hole,
/// and returns the first address after them.
pub(super) fn check_address(address: u64, size: u64) -> Result<u64, KernelError> {
    if address < layout::HIGH_MEMORY {
        return Err(KernelError::BelowHighMemory { address });
    }
    let end = address.saturating_add(size);
    if end > layout::DEVICE_HOLE {
        return Err(KernelError::InDeviceHole { address, end });
    }
    Ok(end)
}

/// Checks that there is memory up to `end`, the first address after a kernel.
pub(super) fn check_memory(memory: &GuestMemory, end: u64) -> Result<(), KernelError> {
    let size = end.saturating_sub(layout::HIGH_MEMORY) as usize;
    if memory.contains(GuestAddress(layout::HIGH_MEMORY), size) {
        return Ok(());
    }
    Err(KernelError::NotEnoughMemory {
        needed: end,
        available: memory.size(),
    })
}

/// Reads `size` bytes from the current position of `image` directly into guest memory.
pub(super) fn read_into_memory(
    memory: &GuestMemory,
    address: u64,
    image: &mut impl ReadVolatile,
    size: u64,
) -> Result<(), KernelError> {
    memory
        .read_exact_volatile_from(GuestAddress(address), image, size as usize)
        .map_err(|source| KernelError::ReadIntoMemory { address, source })
}
