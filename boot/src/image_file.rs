//! Checks common to the files from which a guest is loaded.

use std::fs::File;
use std::io;

/// Why a file cannot be an image of any kind.
#[derive(Debug, thiserror::Error)]
pub enum ImageFileError {
    /// A directory. Opening one succeeds on Linux; only reading it fails.
    #[error("it is a directory, not a file")]
    Directory,
    /// A pipe, socket or device: its length is unknown and it cannot be read at an offset.
    #[error("it is a pipe, socket or device: copy it to a regular file first")]
    NotRegularFile,
    /// The file has no bytes.
    #[error("the file is empty")]
    Empty,
    /// A system call on the file failed.
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
}

/// Returns the length of `file` in bytes, which is never zero.
pub(crate) fn regular_file_length(file: &File) -> Result<u64, ImageFileError> {
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(ImageFileError::Directory);
    }
    if !metadata.is_file() {
        return Err(ImageFileError::NotRegularFile);
    }
    if metadata.len() == 0 {
        return Err(ImageFileError::Empty);
    }
    Ok(metadata.len())
}

/// Returns the number of whole MiB that hold `bytes`, for messages.
pub(crate) fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
