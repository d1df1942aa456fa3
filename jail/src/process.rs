//! What a process gives up besides calls and files.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Keeps the kernel from writing a core dump of this process.
///
/// # Errors
/// If the kernel refuses.
pub fn refuse_core_dumps() -> io::Result<()> {
    Ok(setrlimit(Resource::RLIMIT_CORE, 0, 0)?)
}

/// Keeps the memory of this process out of reach: other processes of its user can neither trace it nor open the files in
/// `/proc` that show what it has. Nor can the process itself open some of these, unless it is root's.
///
/// # Errors
/// If the kernel refuses.
pub fn hide_memory() -> io::Result<()> {
    Ok(prctl::set_dumpable(false)?)
}

/// Removes all variables from the environment that `keep` does not name, and overwrites them, so that what they hold
/// is not in memory any more.
///
/// # Safety
/// No other thread may run.
pub unsafe fn clear_environment(keep: impl Fn(&OsStr) -> bool) {
    for (name, _) in env::vars_os() {
        if keep(&name) {
            continue;
        }
        let Ok(key) = std::ffi::CString::new(name.as_bytes()) else {
            continue;
        };
        // SAFETY: the name is a string with an end. No other thread changes the environment.
        let value = unsafe { libc::getenv(key.as_ptr()) };
        if !value.is_null() {
            // SAFETY: the value is a string of this length, in memory that the kernel or the C library has made to be
            // written, and nobody else has a reference to it.
            unsafe { ptr::write_bytes(value.cast::<u8>(), 0, libc::strlen(value)) };
        }
        // SAFETY: the caller promises that no other thread reads the environment.
        unsafe { env::remove_var(&name) };
    }
}

/// Keeps the process, and all that it executes, from gaining privileges by executing a program.
///
/// # Errors
/// If the kernel refuses.
pub fn renounce_privileges() -> io::Result<()> {
    Ok(prctl::set_no_new_privs()?)
}
