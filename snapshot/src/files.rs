//! Files that are written under another name until they are complete.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

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

    /// Puts the file in its place, and brings its name to stable storage.
    ///
    /// # Errors
    /// Those of `rename`, and of `fsync` on the directory.
    pub fn put_in_place(mut self) -> Result<File, SnapshotError> {
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.path).map_err(SnapshotError::write(&self.path))?;
        }
        self.temporary = None;
        let parent = self.path.parent().filter(|it| !it.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))
            .and_then(|directory| directory.sync_all())
            .map_err(SnapshotError::write(&self.path))?;
        self.file
            .try_clone()
            .map_err(SnapshotError::write(&self.path))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}
