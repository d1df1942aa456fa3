//! The program's own code in memory.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::slice;

use nix::libc;

/// Size of a page of the host.
const PAGE_SIZE: usize = 4096;

/// Takes the program's code and constants out of the memory of this process. What is used from now on comes back from
/// the host's page cache at the first access, within a microsecond for each 64 KiB.
///
/// Starting a machine runs most of the code that a process ever runs: options, configuration, kernel image, tables for
/// the guest. The rest of its life is a few loops, and a host may have a thousand such processes.
///
/// Breakpoints that a debugger has set in the program would be lost with the pages that they are in, so only a static
/// program, which is how it is built for use, does this.
pub fn release_pages() {
    if cfg!(target_feature = "crt-static") {
        // SAFETY: the function is called for one program at a time, with a description that is valid meanwhile.
        unsafe { libc::dl_iterate_phdr(Some(release_pages_of), ptr::null_mut()) };
    }
}

/// Does it for the first program that [`libc::dl_iterate_phdr`] comes to, which is this one.
unsafe extern "C" fn release_pages_of(
    program: *mut libc::dl_phdr_info,
    _size: usize,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: the caller describes a program that is loaded, with this number of headers.
    let (base, headers) = unsafe {
        let program = &*program;
        let headers = slice::from_raw_parts(program.dlpi_phdr, usize::from(program.dlpi_phnum));
        (program.dlpi_addr as usize, headers)
    };
    let is_read_only =
        |it: &&libc::Elf64_Phdr| it.p_type == libc::PT_LOAD && it.p_flags & libc::PF_W == 0;
    for segment in headers.iter().filter(is_read_only) {
        let first = base + segment.p_vaddr as usize;
        let start = first & !(PAGE_SIZE - 1);
        let len = first + segment.p_memsz as usize - start;
        // SAFETY: these pages are mapped from the file of the program, and nothing can have written to them, so that an
        // access finds the same again. A failure changes nothing.
        unsafe {
            libc::madvise(
                ptr::with_exposed_provenance_mut(start),
                len,
                libc::MADV_DONTNEED,
            )
        };
    }
    1
}
