//! Guest memory as devices reach it.

use std::ptr::NonNull;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The memory of a guest.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Where the `len` bytes of guest memory at `address` are in the host's, if they are all in one
/// region. They are valid for as long as `memory` is, and the guest may change them at any time.
pub(crate) fn host_address(
    memory: &GuestMemory,
    address: GuestAddress,
    len: usize,
) -> Option<NonNull<u8>> {
    let region = memory.find_region(address)?;
    // No less than zero: the region was found by this address.
    let offset = address.0 - region.start_addr().0;
    let end = offset.checked_add(len as u64)?;
    if end > region.len() {
        return None;
    }
    // SAFETY: the offset is within the region, all of which is mapped from this pointer on.
    NonNull::new(unsafe { region.as_ptr().add(offset as usize) })
}
