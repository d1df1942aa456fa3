//! Files that are written under another name until they are complete.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use serde::{Deserialize, Serialize};

use crate::SnapshotError;

/// Names of the files in a snapshot's directory.
const STATE: &str = "state";
const MEMORY: &str = "memory";
const WORKING_SET: &str = "working-set";

/// Where the files of a snapshot are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFiles {
    /// The state file.
    pub state: PathBuf,
    /// The memory file.
    pub memory: PathBuf,
}

impl SnapshotFiles {
    /// Returns the files of a snapshot that is in a directory of its own.
    pub fn in_directory(directory: &Path) -> SnapshotFiles {
        SnapshotFiles {
            state: directory.join(STATE),
            memory: directory.join(MEMORY),
        }
    }

    /// Returns where the working set of a snapshot is that is in a directory of its own.
    pub fn working_set_in_directory(directory: &Path) -> PathBuf {
        directory.join(WORKING_SET)
    }
}

/// A file that appears under its name when it is complete, in the place of an earlier one. It is removed if it is
/// dropped before that.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    /// `None` if it has been put in its place.
    temporary: Option<PathBuf>,
    path: PathBuf,
}

impl NewFile {
    /// Creates a file that is to appear at `path`, for its owner alone to read and write. An incomplete file of an
    /// earlier program that was killed is replaced.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(path: &Path) -> Result<NewFile, SnapshotError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let temporary = path.with_file_name(name);
        // Not truncated: another program may have the file mapped.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(SnapshotError::write(&temporary)(error));
            }
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(SnapshotError::write(&temporary))?;
        Ok(NewFile {
            file,
            temporary: Some(temporary),
            path: path.to_path_buf(),
        })
    }

    /// Returns the file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the name that the file has now.
    pub(crate) fn temporary(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(&self.path)
    }

    /// Returns the path at which it is to appear.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Brings the content to stable storage.
    ///
    /// # Errors
    /// Those of `fsync`.
    pub fn sync(&self) -> Result<(), SnapshotError> {
        self.file
            .sync_all()
            .map_err(SnapshotError::write(&self.path))
    }

    /// Calls `sync_file_range` for the whole file.
    fn sync_range(&self, flags: libc::c_uint) -> Result<(), SnapshotError> {
        // SAFETY: the call takes integers only. A length of zero means up to the end.
        match unsafe { libc::sync_file_range(self.file.as_raw_fd(), 0, 0, flags) } {
            0 => Ok(()),
            _ => Err(SnapshotError::write(&self.path)(io::Error::last_os_error())),
        }
    }

    fn directory(&self) -> &Path {
        let parent = self.path.parent().filter(|it| !it.as_os_str().is_empty());
        parent.unwrap_or(Path::new("."))
    }
}

/// Puts `files` in their places, in this order. When this returns, they are on stable storage under their names.
///
/// Whenever the host loses its power, there is a complete file under each name, the earlier or the new one: first the content
/// of all files is brought to stable storage, and only then do they get their names, which follow by an `fsync` of the
/// directory. Either step takes one commit of the file system's journal, however many files there are: when the first file
/// is synced, those after it have nothing left to write.
///
/// # Errors
/// If the host cannot write or rename them. Some of them may be in their places then.
pub fn put_in_place<const COUNT: usize>(files: [NewFile; COUNT]) -> Result<(), SnapshotError> {
    const START: libc::c_uint = libc::SYNC_FILE_RANGE_WRITE;
    const WAIT: libc::c_uint =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | START | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    files.iter().try_for_each(|file| file.sync_range(START))?;
    files.iter().try_for_each(|file| file.sync_range(WAIT))?;
    files.iter().try_for_each(NewFile::sync)?;
    let mut replaced = Vec::new();
    let mut directories = BTreeSet::new();
    for mut file in files {
        replaced.extend(
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(&file.path),
        );
        if let Some(temporary) = &file.temporary {
            fs::rename(temporary, &file.path).map_err(SnapshotError::write(&file.path))?;
        }
        file.temporary = None;
        directories.insert(file.directory().to_path_buf());
    }
    for directory in directories {
        File::open(&directory)
            .and_then(|it| it.sync_all())
            .map_err(SnapshotError::write(&directory))?;
    }
    if !replaced.is_empty() {
        // To free the blocks of a large file can take a second, for which nobody has to wait. Without a thread, the files
        // are closed here.
        let _ = thread::Builder::new()
            .name("bantam-files".to_owned())
            .spawn(|| drop(replaced));
    }
    Ok(())
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}
