//! Memory for data that does not fit into the heap.

use alloc::format;
use alloc::string::String;
use core::ptr;

use runtime::heap;

/// Returns memory for the buffers of one load, after the heap; call it once. The memory is zero and
/// already touched, so that page faults do not affect the measurement.
///
/// # Errors
///
/// If the machine has too little.
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
