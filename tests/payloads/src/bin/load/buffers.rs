//! Memory for data, which the heap is too small for.

use alloc::format;
use alloc::string::String;
use core::ptr;

use runtime::heap;

/// Memory for the buffers of one load, after the heap; to be called once. It is zero, and the host
/// has given it to the guest already, which takes no time from the measurement.
///
/// # Errors
///
/// When the machine has too little.
pub fn reserve(size: u64) -> Result<u64, String> {
    let memory = heap::memory_after();
    let start = memory.start.next_multiple_of(4096);
    if start.saturating_add(size) > memory.end {
        return Err(format!(
            "the buffers take {} MiB of memory, and there are {}: give the machine more, or a \
             smaller depth",
            size.div_ceil(1 << 20),
            memory.end.saturating_sub(start) >> 20
        ));
    }
    // SAFETY: memory that nothing else uses.
    unsafe { ptr::write_bytes(start as *mut u8, 0, size as usize) };
    Ok(start)
}
