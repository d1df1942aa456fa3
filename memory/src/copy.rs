//! Copies between guest memory and the monitor's own.
//!
//! Another thread or a vCPU may write to guest memory during a copy. Rust's memory model has no
//! access for that: a data race between its own threads is undefined behaviour, also for volatile
//! accesses, and so are atomic accesses of several sizes to the same bytes. So these copies rely on
//! more than the model promises:
//!
//! - Guest memory is a mapping that was never a Rust object, no reference to its bytes exists, and
//!   the compiler sees nothing of vCPUs. Threads of the monitor race only if a guest names the same
//!   bytes to two devices.
//! - The hardware has no undefined result: each byte of a copy is one that memory held during the
//!   copy.
//! - What remains is the compiler, which could read a byte again after the first value was checked,
//!   and find another value. It must not repeat a volatile access, and it cannot see what
//!   [`copy_unseen`] does with its pointers.

use std::arch::asm;

/// Largest copy that is made word by word, in bytes. For copies up to this size a call of `memcpy`
/// costs more.
const MAX_WORDS_SIZE: usize = 64;

/// A word at any address.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

/// Fills `bytes` from guest memory at `guest`. No later use of `bytes` reads guest memory again.
///
/// # Safety
/// `bytes.len()` bytes of guest memory must be mapped at `guest`.
#[inline]
pub(crate) unsafe fn copy_from_guest(guest: *const u8, bytes: &mut [u8]) {
    let (target, len) = (bytes.as_mut_ptr(), bytes.len());
    if len > MAX_WORDS_SIZE {
        // SAFETY: the guest's bytes are mapped, as the caller promises, and they are not those of
        // `bytes`, which are borrowed from the monitor's memory.
        unsafe { copy_unseen(target, guest, len) };
        return;
    }
    for_each_word(len, |offset, size| {
        // SAFETY: `for_each_word` yields ranges within `len`, for which both pointers are valid; an
        // `Unaligned` needs no alignment, and a word has no invalid value.
        unsafe {
            let (guest, target) = (guest.add(offset), target.add(offset));
            match size {
                8 => read_word::<u64>(guest, target),
                4 => read_word::<u32>(guest, target),
                2 => read_word::<u16>(guest, target),
                _ => read_word::<u8>(guest, target),
            }
        }
    });
}

/// Copies `bytes` to guest memory at `guest`.
///
/// # Safety
/// `bytes.len()` bytes of guest memory must be mapped at `guest`, writable.
#[inline]
pub(crate) unsafe fn copy_to_guest(guest: *mut u8, bytes: &[u8]) {
    let (source, len) = (bytes.as_ptr(), bytes.len());
    if len > MAX_WORDS_SIZE {
        // SAFETY: as in `copy_from_guest`, in the other direction.
        unsafe { copy_unseen(guest, source, len) };
        return;
    }
    for_each_word(len, |offset, size| {
        // SAFETY: as in `copy_from_guest`, in the other direction.
        unsafe {
            let (guest, source) = (guest.add(offset), source.add(offset));
            match size {
                8 => write_word::<u64>(guest, source),
                4 => write_word::<u32>(guest, source),
                2 => write_word::<u16>(guest, source),
                _ => write_word::<u8>(guest, source),
            }
        }
    });
}

/// Reads `N` words of guest memory, which need not be aligned.
///
/// # Safety
/// `N` words must be mapped at `guest`.
#[inline]
pub(crate) unsafe fn read_words<const N: usize>(guest: *const u8) -> [u64; N] {
    let words = guest.cast::<Unaligned<u64>>();
    std::array::from_fn(|index| {
        // SAFETY: the words are mapped, as the caller promises, and an `Unaligned` needs no
        // alignment.
        unsafe { words.add(index).read_volatile().0 }
    })
}

/// Splits `len` bytes into words and calls `word` with the offset and size of each.
#[inline(always)]
fn for_each_word(len: usize, mut word: impl FnMut(usize, usize)) {
    let mut offset = 0;
    while len - offset >= 8 {
        word(offset, 8);
        offset += 8;
    }
    for size in [4, 2, 1] {
        if len & size != 0 {
            word(offset, size);
            offset += size;
        }
    }
}

/// # Safety
/// `guest` must be valid for a volatile read of a `T`, and `target` for a write, at any alignment.
#[inline(always)]
unsafe fn read_word<T: Copy>(guest: *const u8, target: *mut u8) {
    // SAFETY: as the caller promises; both are aligned, as an `Unaligned` is to one byte.
    unsafe {
        let word = guest.cast::<Unaligned<T>>().read_volatile();
        target.cast::<Unaligned<T>>().write(word);
    }
}

/// # Safety
/// `guest` must be valid for a volatile write of a `T`, and `source` for a read, at any alignment.
#[inline(always)]
unsafe fn write_word<T: Copy>(guest: *mut u8, source: *const u8) {
    // SAFETY: as the caller promises; both are aligned, as an `Unaligned` is to one byte.
    unsafe {
        let word = source.cast::<Unaligned<T>>().read();
        guest.cast::<Unaligned<T>>().write_volatile(word);
    }
}

/// Copies `len` bytes by the C library's `memcpy`, hidden from the compiler, so that it neither
/// replaces the call by accesses of its own nor concludes that both places now hold the same bytes.
///
/// `memcpy` may read a byte twice if its vector accesses overlap, but it writes one of the values
/// that it read, and bases no decision on it.
///
/// # Safety
/// `source` must be valid for reads and `target` for writes of `len` bytes, and they must not
/// overlap. Only the one in guest memory may be accessed by others meanwhile.
#[inline(never)]
unsafe fn copy_unseen(target: *mut u8, source: *const u8, len: usize) {
    let (mut unseen_target, mut unseen_source) = (target, source);
    // SAFETY: the assembly statements are empty. As far as the compiler knows, they set the
    // pointers to unknown places and change all memory before and after the copy; so it can
    // conclude nothing from the call of `memcpy`, whose meaning it knows. The caller promises that
    // the copy itself is valid.
    unsafe {
        asm!("/* {0} {1} */", inout(reg) unseen_target, inout(reg) unseen_source,
            options(nostack, preserves_flags));
        libc::memcpy(unseen_target.cast(), unseen_source.cast(), len);
        asm!("/* {0} {1} */", in(reg) target, in(reg) source, options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sizes_and_alignments_are_copied_exactly() {
        let source: Vec<u8> = (0..200).map(|number| number as u8 + 1).collect();
        for len in 0..=MAX_WORDS_SIZE + 20 {
            for offset in 0..9 {
                let mut expected = [0; 200];
                expected[offset..offset + len].copy_from_slice(&source[offset..offset + len]);
                let mut read = [0; 200];
                let mut written = [0; 200];
                // SAFETY: both arrays have `len` bytes at `offset`.
                unsafe {
                    copy_from_guest(source.as_ptr().add(offset), &mut read[offset..offset + len]);
                    let target = written.as_mut_ptr().add(offset);
                    copy_to_guest(target, &source[offset..offset + len]);
                }
                assert_eq!(read, expected, "{len} bytes at {offset}");
                assert_eq!(written, expected, "{len} bytes at {offset}");
            }
        }
    }
}
