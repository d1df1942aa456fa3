//! Memory for `alloc`: a region after the payload's image, allocated upwards. Only the last
//! allocation can be freed, which is enough for buffers that live for one check.

use core::alloc::{GlobalAlloc, Layout};
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::boot_info::{BootInfo, MemoryRange};

/// Most memory the heap takes: the monitor may have left an initrd higher up.
const MAX_SIZE: u64 = 8 << 20;

struct BumpAllocator {
    next: AtomicUsize,
    end: AtomicUsize,
}

#[global_allocator]
static HEAP: BumpAllocator = BumpAllocator {
    next: AtomicUsize::new(0),
    end: AtomicUsize::new(0),
};

// SAFETY: every allocation is a range of the heap of its own, aligned as asked, and the heap is
// memory that nothing else uses.
unsafe impl GlobalAlloc for BumpAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let end = self.end.load(Ordering::Relaxed);
        let mut address = 0;
        let claimed = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                address = next.next_multiple_of(layout.align());
                address
                    .checked_add(layout.size())
                    .filter(|&after| after <= end)
            });
        if claimed.is_ok() {
            address as *mut u8
        } else {
            core::ptr::null_mut()
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        let start = memory as usize;
        // It fails if there was another allocation since; the memory then stays in use.
        let _ = self.next.compare_exchange(
            start + layout.size(),
            start,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }
}

/// Calls `work`, and frees all that it has allocated.
///
/// # Safety
/// Nothing that `work` has allocated may be in use when it returns, not by a device either.
pub unsafe fn freeing(work: impl FnOnce()) {
    let before = HEAP.next.load(Ordering::Relaxed);
    work();
    HEAP.next.store(before, Ordering::Relaxed);
}

/// Returns the first address after the payload's image.
pub fn image_end() -> u64 {
    unsafe extern "C" {
        static image_end: u8;
    }
    &raw const image_end as u64
}

/// Returns the first address after the heap.
pub fn end() -> u64 {
    HEAP.end.load(Ordering::Relaxed) as u64
}

/// RAM after the heap, in the same range of the memory map; a payload that boots without an initrd
/// may use it as it likes.
pub fn memory_after() -> Range<u64> {
    let start = end();
    let range = BootInfo::get()
        .ram()
        .find(|range| (range.address..=range.end()).contains(&start));
    start..range.map_or(start, |range| range.end())
}

/// Calls `work`, then frees all memory that it allocated.
///
/// # Safety
///
/// Nothing that `work` allocates is used after it returns, by a device's DMA either.
pub unsafe fn reclaim_after<T: Copy>(work: impl FnOnce() -> T) -> T {
    let before = HEAP.next.load(Ordering::Relaxed);
    let result = work();
    HEAP.next.store(before, Ordering::Relaxed);
    result
}

pub(crate) fn initialise(memory: impl Iterator<Item = MemoryRange>) {
    let start = image_end();
    for range in memory {
        if range.kind == MemoryRange::RAM && (range.address..range.end()).contains(&start) {
            let end = range.end().min(start + MAX_SIZE);
            HEAP.next.store(start as usize, Ordering::Relaxed);
            HEAP.end.store(end as usize, Ordering::Relaxed);
        }
    }
}
