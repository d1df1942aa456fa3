//! A lock on a path between processes that take it or give it up.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::with_suffix;

/// How long to wait for the lock. It is held for a few system calls, by many processes in turn if they are
/// started at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait before the next attempt.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);
/// What the lock's file name adds to the path.
const SUFFIX: &str = ".bantam-lock";

/// The lock on a path, held for as long as this value exists.
///
/// It is a lock on an empty file beside the path, which is removed when the lock is released. A process that
/// has waited for the lock of a file that was removed meanwhile has locked nothing, and starts again.
pub(super) struct PathLock {
    path: PathBuf,
    _file: File,
}

impl PathLock {
    /// Locks `path`, whether or not there is a file at it.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if others do not release it; otherwise those of creating a file in the
    /// folder.
    pub(super) fn take(path: &Path) -> io::Result<PathLock> {
        let path = with_suffix(path, SUFFIX);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)?;
            match file.try_lock() {
                Ok(()) if is_file_at(&file, &path)? => return Ok(PathLock { path, _file: file }),
                // Another process has just removed the file, or this file system has no stable inode numbers.
                Ok(()) | Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(RETRY_INTERVAL);
                }
                Ok(()) | Err(TryLockError::WouldBlock) => {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => {
                    // Some network file systems have no locks. Processes that start there at the same moment
                    // are on their own.
                    tracing::debug!("cannot lock '{}': {error}", path.display());
                    return Ok(PathLock { path, _file: file });
                }
            }
        }
    }
}

impl Drop for PathLock {
    /// Removes the file before the lock is given up: nobody else does while it is held.
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove '{}': {error}", self.path.display());
        }
    }
}

/// Whether `path` still leads to `file`.
fn is_file_at(file: &File, path: &Path) -> io::Result<bool> {
    let file = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (file.dev(), file.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
