//! The functions that compiled code calls by name for copying, filling and comparing memory.

use core::arch::asm;

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(destination: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller passes ranges that it may write and read, as for C's memcpy.
    unsafe {
        asm!("rep movsb", inout("rdi") destination => _, inout("rsi") source => _,
             inout("rcx") count => _, options(nostack, preserves_flags));
    }
    destination
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(destination: *mut u8, source: *const u8, count: usize) -> *mut u8 {
    if (destination as usize).wrapping_sub(source as usize) >= count {
        // SAFETY: the destination does not begin inside the source, so ascending order is right.
        return unsafe { memcpy(destination, source, count) };
    }
    // SAFETY: the caller's ranges, copied from their last bytes down; `count` is not zero here.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") destination.add(count - 1) => _,
             inout("rsi") source.add(count - 1) => _, inout("rcx") count => _, options(nostack));
    }
    destination
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(destination: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller passes a range that it may write, as for C's memset.
    unsafe {
        asm!("rep stosb", inout("rdi") destination => _, in("al") byte as u8,
             inout("rcx") count => _, options(nostack, preserves_flags));
    }
    destination
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller passes two ranges of `count` bytes that it may read; volatile so that
        // the loop is not compiled into a call of memcmp.
        let (left, right) = unsafe {
            (
                left.add(index).read_volatile(),
                right.add(index).read_volatile(),
            )
        };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract as memcmp's.
    unsafe { memcmp(left, right, count) }
}
