//! Memory above 4 GiB, which the entry code does not map.

use alloc::boxed::Box;
use core::ptr;

use crate::system_call;

const GIB: u64 = 1 << 30;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const PRESENT_WRITABLE_USER: u64 = 0x27;
const LARGE_PAGE: u64 = 0xe7;
/// Size of the memory that one table of page directory pointers covers.
const MAPPABLE_SIZE: u64 = 512 * GIB;

#[repr(C, align(4096))]
struct PageDirectory([u64; 512]);

/// Maps the GiB-aligned surroundings of a range, each address to itself, cached. Existing mappings
/// stay unchanged. Other processors must not use the range before they start.
///
/// # Panics
///
/// If the range ends above 512 GiB.
pub fn map(address: u64, size: u64) {
    unsafe extern "C" {
        static mut page_directory_pointers: [u64; 512];
    }
    let end = address + size;
    assert!(
        end <= MAPPABLE_SIZE,
        "memory at {end:#x} is too high to be mapped"
    );
    for gib in address / GIB..end.div_ceil(GIB) {
        // SAFETY: the table of the entry code, which only this function changes.
        unsafe {
            let entry = (&raw mut page_directory_pointers[gib as usize]).cast::<u64>();
            if *entry != 0 {
                continue;
            }
            let directory = Box::leak(Box::new(PageDirectory([0; 512])));
            for (page, mapping) in directory.0.iter_mut().enumerate() {
                *mapping = gib * GIB + page as u64 * LARGE_PAGE_SIZE + LARGE_PAGE;
            }
            ptr::write_volatile(
                entry,
                ptr::from_ref(directory) as u64 + PRESENT_WRITABLE_USER,
            );
        }
    }
    system_call::flush_translations();
}
