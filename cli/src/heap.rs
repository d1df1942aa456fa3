//! The heap of the program.

use nix::libc;

/// Makes all threads allocate from one heap. glibc gives each thread its own heap, which takes four
/// system calls and some pages of memory, and helps only threads that allocate all the time.
pub fn share_among_threads() {
    // SAFETY: the call sets a number in the allocator, and no other thread exists yet that could be
    // allocating.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
