//! The locks of a machine: bytes of one file, which processes lock for as long as they have it open.
//!
//! They are locks of an open file (`F_OFD_SETLK`), so a process that is started with the file goes on having the lock,
//! and the kernel ends it with the last process that has the file, however that ends. Others ask who has a lock without
//! taking it (`F_OFD_GETLK`), so a question never gets in the way of a process that wants the lock.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// What a byte of the lock file is locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Purpose {
    /// By the process of the machine, for life.
    Life = 0,
    /// By a command that changes what belongs to the machine, while it does so.
    Change = 1,
}

/// Opens a lock file, and creates it if it does not exist.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.mode(0o600).open(path)
}

/// Takes a lock for as long as the file is open. Returns `false` if another has it or shares it.
pub(crate) fn try_lock(file: &File, purpose: Purpose) -> io::Result<bool> {
    set(file, &request(purpose, libc::F_WRLCK))
}

/// Takes a lock that others may share for as long as the file is open, in place of the one that the file has, if it has one.
/// Returns `false` if another has it alone.
pub(crate) fn try_share(file: &File, purpose: Purpose) -> io::Result<bool> {
    set(file, &request(purpose, libc::F_RDLCK))
}

/// A file that has the lock for [changes](Purpose::Change), alone or with others, until this is dropped.
///
/// A process that another thread is just starting has all open files, and so the lock, until it executes its program. So the
/// lock is given back before the file is closed.
#[derive(Debug)]
pub(crate) struct ChangeLock(File);

impl ChangeLock {
    /// Is given a file that has the lock.
    pub(crate) fn of(file: File) -> ChangeLock {
        ChangeLock(file)
    }

    /// Lets others share the lock.
    pub(crate) fn share(&self) -> io::Result<bool> {
        try_share(&self.0, Purpose::Change)
    }
}

impl Drop for ChangeLock {
    fn drop(&mut self) {
        // If this fails, the lock ends with the last process that has the file.
        let _ = set(&self.0, &request(Purpose::Change, libc::F_UNLCK));
    }
}

fn set(file: &File, request: &libc::flock) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(request)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether another open file has a lock or shares it.
pub(crate) fn is_locked(file: &File, purpose: Purpose) -> io::Result<bool> {
    let mut found = request(purpose, libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok(found.l_type != libc::F_UNLCK as libc::c_short)
}

fn request(purpose: Purpose, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: purpose as libc::off_t,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_one_owner_and_questions_take_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let open = || create(&path).unwrap();
        let owner = open();
        let asking = File::open(&path).unwrap();
        assert!(!is_locked(&asking, Purpose::Life).unwrap());
        assert!(try_lock(&owner, Purpose::Life).unwrap());
        assert!(is_locked(&asking, Purpose::Life).unwrap());
        assert!(!is_locked(&asking, Purpose::Change).unwrap());
        let other = open();
        assert!(!try_lock(&other, Purpose::Life).unwrap());
        assert!(try_lock(&other, Purpose::Change).unwrap());
        // A copy of the descriptor, as a new process has it, is the same owner.
        let inherited = owner.try_clone().unwrap();
        drop(owner);
        assert!(is_locked(&asking, Purpose::Life).unwrap());
        drop(inherited);
        assert!(!is_locked(&asking, Purpose::Life).unwrap());
    }

    #[test]
    fn a_command_gives_its_lock_back_although_another_process_has_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let file = create(&path).unwrap();
        assert!(try_lock(&file, Purpose::Change).unwrap());
        let inherited = file.try_clone().unwrap();
        drop(ChangeLock::of(file));
        assert!(!is_locked(&File::open(&path).unwrap(), Purpose::Change).unwrap());
        drop(inherited);
    }

    #[test]
    fn a_lock_is_shared_or_has_one_owner() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second, third] = [(); 3].map(|()| create(&folder.path().join("lock")).unwrap());
        assert!(try_lock(&first, Purpose::Change).unwrap());
        assert!(!try_share(&second, Purpose::Change).unwrap());
        assert!(try_share(&first, Purpose::Change).unwrap());
        assert!(try_share(&second, Purpose::Change).unwrap());
        assert!(!try_lock(&third, Purpose::Change).unwrap());
        assert!(is_locked(&third, Purpose::Change).unwrap());
        drop(first);
        assert!(!try_lock(&third, Purpose::Change).unwrap());
        drop(second);
        assert!(try_lock(&third, Purpose::Change).unwrap());
    }
}
