//! Accounting of the memory that a thread allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATED: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, with counters for each thread.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    ALLOCATED.set(ALLOCATED.get() + bytes);
    PEAK.set(PEAK.get().max(ALLOCATED.get()));
}

// SAFETY: every call is passed on unchanged. Counting touches only integers of the thread, which need neither
// memory nor a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Starts counting what this thread allocates.
pub fn start() {
    ALLOCATED.set(0);
    PEAK.set(0);
}

/// Returns the most bytes that this thread had allocated at any time since [`start`], without those that it
/// had before.
pub fn peak() -> isize {
    PEAK.get()
}
