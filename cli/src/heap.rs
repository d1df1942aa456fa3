//! The heap of the program.

use nix::libc;

/// Has all threads allocate from one heap. glibc gives each thread a heap of its own, which takes four
/// system calls and some pages of memory, and is of use only to threads that allocate all the time.
pub fn share_among_threads() {
    // SAFETY: the call sets a number in the allocator, and there is no other thread yet that could be
    // allocating.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
