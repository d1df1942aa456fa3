//! Errors of snapshot files.

use std::io;
use std::path::{Path, PathBuf};

use bantam_state::{RestoreError, SaveError};

/// Why the files of a snapshot cannot be written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A file could not be written.
    #[error("cannot write '{}': {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file could not be opened or read.
    #[error("cannot read '{}': {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The state file is not one, or damaged.
    #[error("cannot use snapshot '{}': {source}", path.display())]
    State {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        source: RestoreError,
    },
    /// The working set cannot be used.
    #[error("'{}' is not the working set of this snapshot: {reason}", path.display())]
    WorkingSet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// State cannot be written as a section.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The file does not have the beginning of a state file.
    #[error("'{}' is not the state file of a snapshot", path.display())]
    NotSnapshot {
        /// The file.
        path: PathBuf,
    },
    /// The file was written by a program with another format.
    #[error(
        "'{}' has format {found}, and this program reads format {known}: use the program that wrote it",
        path.display()
    )]
    Format {
        /// The state file.
        path: PathBuf,
        /// The format that can be read.
        known: u32,
        /// The format of the file.
        found: u32,
    },
    /// The memory file does not belong to the state file.
    #[error("'{}' is not the memory of this snapshot: {reason}", path.display())]
    Memory {
        /// The memory file.
        path: PathBuf,
        /// How it is known.
        reason: String,
    },
    /// A differential snapshot was to be used as a full one.
    #[error(
        "snapshot '{}' has only what changed since another: make a full one of both by 'bantam snapshot merge'",
        path.display()
    )]
    Differential {
        /// The state file.
        path: PathBuf,
    },
    /// Snapshots were to be merged that do not follow each other.
    #[error("snapshot '{}' is not based on '{}'", next.display(), base.display())]
    NotBased {
        /// The state file of the later one.
        next: PathBuf,
        /// The state file of the one before.
        base: PathBuf,
    },
}

impl SnapshotError {
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
        let path = path.to_path_buf();
        |source| SnapshotError::Write { path, source }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
        let path = path.to_path_buf();
        |source| SnapshotError::Read { path, source }
    }

    pub(crate) fn state(path: &Path) -> impl FnOnce(RestoreError) -> SnapshotError {
        let path = path.to_path_buf();
        |source| SnapshotError::State { path, source }
    }
}
