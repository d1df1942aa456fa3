//! A lock of a path among the processes that take it or give it up.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::with_suffix;

/// How long the lock is waited for. It is held for a few system calls, by many processes one after another if
/// they are started at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait before the next look at it.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);
/// What the name of the lock's file has behind that of the path.
const SUFFIX: &str = ".bantam-lock";

/// The lock, which is held for as long as this exists.
///
/// It is the lock of an empty file beside the path that is removed with it. A process that has waited for the
/// lock of a file that was removed meanwhile has locked nothing, and starts again.
pub(super) struct PathLock {
    path: PathBuf,
    _file: File,
}

impl PathLock {
    /// Locks `path`, whether or not there is a file.
    ///
    /// # Errors
    /// Of the kind [`io::ErrorKind::WouldBlock`] if others do not give it up; others as those of creating a
    /// file in the folder.
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
                // Another has just removed the file, or this file system does not tell files apart.
                Ok(()) | Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(RETRY_INTERVAL);
                }
                Ok(()) | Err(TryLockError::WouldBlock) => {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(TryLockError::Error(error)) => {
                    // Some network file systems have no locks. Those who start there at the same moment are
                    // on their own.
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
