//! File locks against other users of a file.
//!
//! A disk image is locked in the way that QEMU does it (`block/file-posix.c`), so that QEMU's tools and
//! Bantam refuse each other exactly if both would write, or one would read what the other changes. Each kind
//! of access, a permission, has a number. A user of a file takes a shared lock on byte 100 plus the number of
//! each permission that it has, and on byte 200 plus the number of each permission that it denies to others.
//! It then checks whether anyone else holds a conflicting lock: on the 200s for the permissions that it has,
//! on the 100s for those that it denies.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::fcntl::{FcntlArg, fcntl};

use crate::patience::patiently;

/// Byte for having permission 0.
const HAS: u64 = 100;
/// Byte for denying permission 0 to others.
const KEEPS: u64 = 200;
/// Permission to read data that is consistent.
const READ: u64 = 0;
/// Permission to write.
const WRITE: u64 = 1;
/// The permissions that every user of an image denies to others.
const KEPT: Range<u64> = WRITE..WRITE + 1;

/// How a file is shared with others that lock it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// With any number of others that share it too.
    Shared,
    /// With nobody.
    Exclusive,
}

/// Whether the lock of a disk image is a condition for its use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LockMode {
    /// An image that another uses is refused, and so is one that cannot be locked.
    #[default]
    On,
    /// An image in use is refused, as with [`LockMode::On`], but one on a file system without locks is used
    /// with a warning.
    WherePossible,
    /// An image that [`LockMode::On`] would refuse is used with a warning.
    Warn,
    /// The image is not locked, nor checked for other users.
    Off,
}

/// Locks all of `file` for as long as it is open, without waiting.
///
/// The lock belongs to the open file, so unlike a traditional record lock it also conflicts with locks of the
/// same process.
///
/// # Errors
/// Those of `fcntl` with `F_OFD_SETLK`: `EAGAIN` or `EACCES` if another user has the lock.
pub fn lock_file(file: &File, lock: Lock) -> io::Result<()> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
    };
    set(file, kind, 0..0)
}

/// Locks an image for reading, or for reading and writing, and denies writing to others.
///
/// It waits for the lock as [`patiently`] does: a killed monitor keeps its lock until the kernel has torn
/// down its io_uring, soon after its end.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if another's use conflicts; otherwise those of `fcntl` with `F_OFD_SETLK`.
pub(crate) fn lock_image(file: &File, read_only: bool) -> io::Result<()> {
    patiently(is_busy, || try_lock_image(file, read_only))
}

/// Gives up the permission to write to an image that was locked for reading and writing. Others still may not write
/// to it. This has no effect on an image that is not locked.
///
/// # Errors
/// Those of `fcntl` with `F_OFD_SETLK`.
pub(crate) fn end_writing(file: &File) -> io::Result<()> {
    match set(file, libc::F_UNLCK, HAS + WRITE..HAS + WRITE + 1) {
        // Then it is not locked.
        Err(error) if has_no_locks(&error) => Ok(()),
        result => result,
    }
}

/// Gives up all locks of an image. This has no effect on an image that is not locked.
///
/// # Errors
/// Those of `fcntl` with `F_OFD_SETLK`.
pub(crate) fn unlock(file: &File) -> io::Result<()> {
    match set(file, libc::F_UNLCK, 0..0) {
        // Then it is not locked.
        Err(error) if has_no_locks(&error) => Ok(()),
        result => result,
    }
}

/// Whether `error` says that the file system has no locks.
pub(crate) fn has_no_locks(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

/// Takes the lock of an image for `writer`, which is to write to it, from `reader`, another opening of the image by
/// the same program, which has locked it for reading and goes on reading. At every moment one of the two denies
/// writing to others.
///
/// # Errors
/// Those of [`lock_image`]; `reader` has its lock again then.
pub(crate) fn take_over(writer: &File, reader: &File) -> io::Result<()> {
    let has = READ..WRITE + 1;
    let taken = set(writer, libc::F_RDLCK, bytes(HAS, &has))
        .and_then(|()| set(writer, libc::F_RDLCK, bytes(KEEPS, &KEPT)))
        .and_then(|()| set(reader, libc::F_UNLCK, bytes(KEEPS, &KEPT)))
        .and_then(|()| {
            patiently(is_busy, || match is_contradicted(writer, &has)? {
                true => Err(io::ErrorKind::WouldBlock.into()),
                false => Ok(()),
            })
        });
    if taken.is_err() {
        give_back(writer, reader);
    }
    taken
}

/// Returns to `reader` the lock that [`take_over`] has taken from it.
pub(crate) fn give_back(writer: &File, reader: &File) {
    // Nobody has got a lock meanwhile that conflicts with this one.
    let _ = set(reader, libc::F_RDLCK, bytes(KEEPS, &KEPT));
    let _ = set(writer, libc::F_UNLCK, 0..0);
}

/// Locks all of `file` like [`lock_file`], but waits for the lock as [`patiently`] does.
///
/// # Errors
/// Those of [`lock_file`].
pub fn lock_patiently(file: &File, lock: Lock) -> io::Result<()> {
    patiently(is_busy, || lock_file(file, lock))
}

fn is_busy(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn try_lock_image(file: &File, read_only: bool) -> io::Result<()> {
    let has = if read_only {
        READ..WRITE
    } else {
        READ..WRITE + 1
    };
    let locked = set(file, libc::F_RDLCK, bytes(HAS, &has))
        .and_then(|()| set(file, libc::F_RDLCK, bytes(KEEPS, &KEPT)))
        .and_then(|()| match is_contradicted(file, &has)? {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(()),
        });
    if locked.is_err() {
        // A lock kept while waiting would turn others away. Unlocking fails only if the file system has no
        // locks.
        let _ = set(file, libc::F_UNLCK, 0..0);
    }
    match locked {
        // The other error number that POSIX allows.
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            Err(io::ErrorKind::WouldBlock.into())
        }
        locked => locked,
    }
}

/// Whether another has a permission that a user of an image denies, or denies one of the permissions `has`.
fn is_contradicted(file: &File, has: &Range<u64>) -> io::Result<bool> {
    Ok(is_locked(file, bytes(KEEPS, has))? || is_locked(file, bytes(HAS, &KEPT))?)
}

/// Returns the bytes for a range of permissions.
fn bytes(base: u64, permissions: &Range<u64>) -> Range<u64> {
    base + permissions.start..base + permissions.end
}

/// Sets or removes a lock on a range of bytes, or on all of the file if the range is empty.
fn set(file: &File, kind: libc::c_int, bytes: Range<u64>) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&request(kind, bytes)))?;
    Ok(())
}

/// Whether another open file has any lock on a range of bytes.
fn is_locked(file: &File, bytes: Range<u64>) -> io::Result<bool> {
    let mut found = request(libc::F_WRLCK, bytes);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(found.l_type != libc::F_UNLCK as libc::c_short)
}

fn request(kind: libc::c_int, bytes: Range<u64>) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start as libc::off_t,
        l_len: (bytes.end - bytes.start) as libc::off_t,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn open(image: &TempFile) -> File {
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .open(image.as_path())
            .unwrap()
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let image = TempFile::new().unwrap();
        let (first, second, third) = (open(&image), open(&image), open(&image));
        try_lock_image(&first, true).unwrap();
        try_lock_image(&second, true).unwrap();
        let refused = try_lock_image(&third, false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        try_lock_image(&third, false).unwrap_err();
        drop(second);
        try_lock_image(&third, false).unwrap();
        let fourth = open(&image);
        for read_only in [true, false] {
            try_lock_image(&fourth, read_only).unwrap_err();
        }
        // The refused ones have left no lock behind.
        drop(third);
        try_lock_image(&open(&image), false).unwrap();
    }

    #[test]
    fn a_writer_that_ends_writing_lets_readers_in() {
        let image = TempFile::new().unwrap();
        let writer = open(&image);
        end_writing(&writer).unwrap();
        try_lock_image(&writer, false).unwrap();
        try_lock_image(&open(&image), true).unwrap_err();
        end_writing(&writer).unwrap();
        let reader = open(&image);
        try_lock_image(&reader, true).unwrap();
        try_lock_image(&open(&image), false).unwrap_err();
        drop(writer);
        drop(reader);
        try_lock_image(&open(&image), false).unwrap();
    }

    #[test]
    fn a_lock_of_the_whole_file_is_respected() {
        let image = TempFile::new().unwrap();
        for lock in [Lock::Shared, Lock::Exclusive] {
            let other = open(&image);
            lock_file(&other, lock).unwrap();
            for read_only in [true, false] {
                try_lock_image(&open(&image), read_only).unwrap_err();
            }
        }
    }

    #[test]
    fn of_two_writers_that_start_at_once_one_wins() {
        let image = TempFile::new().unwrap();
        for _ in 0..5 {
            let barrier = Barrier::new(2);
            let start = || {
                let file = open(&image);
                barrier.wait();
                let locked = lock_image(&file, false);
                barrier.wait();
                locked.is_ok()
            };
            let won = thread::scope(|scope| {
                let threads = [scope.spawn(start), scope.spawn(start)];
                threads.map(|thread| thread.join().unwrap())
            });
            assert_eq!(won.iter().filter(|&&won| won).count(), 1);
        }
    }
}
