//! Why an image of a foreign format cannot be opened.

use std::io;

use thiserror::Error;

/// Why an image cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The host cannot read the file.
    #[error(transparent)]
    Io(#[from] io::Error),

    /// The image contradicts itself or its format.
    #[error("the image is damaged: {0}")]
    Damaged(String),

    /// The image uses something that Bantam does not read.
    #[error("{0}")]
    Unsupported(String),

    /// A file that the image names cannot be opened.
    #[error("cannot open '{name}', which the image names: {error}")]
    Sibling {
        /// The name of the file, in the folder of the image.
        name: String,
        /// The reason.
        error: io::Error,
    },
}

impl OpenError {
    pub(super) fn damaged(what: impl Into<String>) -> OpenError {
        OpenError::Damaged(what.into())
    }

    pub(super) fn unsupported(what: impl Into<String>) -> OpenError {
        OpenError::Unsupported(what.into())
    }
}

/// Makes the error of a request that meets damage in an image which is open already.
pub(super) fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the image is damaged: {what}"),
    )
}
