//! Locks of files against other users.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

use crate::patience::patiently;

/// How a file is shared with others that lock it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// With any number that share it too.
    Shared,
    /// With nobody.
    Exclusive,
}

/// Locks all of `file` for as long as it is open, without waiting.
///
/// The lock belongs to the open file, so it conflicts also with one of the same process, unlike
/// traditional record locks.
///
/// # Errors
/// As `fcntl` with `F_OFD_SETLK`: `EAGAIN` or `EACCES` when another has it.
pub fn lock_file(file: &File, lock: Lock) -> io::Result<()> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

/// As [`lock_file`], but waits for the lock as [`patiently`] does: a monitor that was killed keeps its
/// own until the kernel has taken down its io_uring, which is soon after its end.
///
/// # Errors
/// As [`lock_file`].
pub fn lock_patiently(file: &File, lock: Lock) -> io::Result<()> {
    let is_busy = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
    patiently(is_busy, || lock_file(file, lock))
}
