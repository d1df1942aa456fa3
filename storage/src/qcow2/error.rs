//! Why an image cannot be used.

use std::io;

/// Why a qcow2 image cannot be opened, made or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host cannot read or write the file.
    #[error("cannot {action}: {error}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// What the host says.
        #[source]
        error: io::Error,
    },
    /// The file does not begin as a qcow2 image does.
    #[error("not a qcow2 image")]
    Magic,
    /// The version of the format is not known.
    #[error("version {0} of qcow2 is not supported: convert the image with `qemu-img convert`")]
    Version(u32),
    /// The image uses a feature that is needed to read it and is not supported.
    #[error("the image uses the feature '{0}', which is not supported")]
    Feature(String),
    /// A field of the header, or a table that it names, has a wrong value.
    #[error("the image is damaged: {0}")]
    Damaged(String),
    /// The image is marked as corrupt.
    #[error("the image is marked as corrupt: open it read-only, or repair it with a check")]
    Corrupt,
    /// The backing file does not say which format it has.
    #[error(
        "the image does not name the format of its backing file '{0}': add it with `qemu-img rebase -u -b BACKING -F FORMAT IMAGE`"
    )]
    BackingFormat(String),
    /// The backing file has to be given to open the image.
    #[error("the image needs its backing file '{0}'")]
    BackingMissing(String),
    /// An image is, over some others, its own backing file.
    #[error("the backing files of '{0}' form a loop")]
    BackingLoop(String),
    /// There are too many backing files below each other.
    #[error("there are more than {0} images in the chain of backing files")]
    ChainLength(usize),
    /// An option is not possible, alone or with the others.
    #[error("{0}")]
    Option(String),
    /// There is no such snapshot.
    #[error("there is no snapshot '{0}'")]
    NoSnapshot(String),
    /// Something is not possible with this image.
    #[error("{0}")]
    NotPossible(String),
}

impl Error {
    /// Says for an error of the host what was to be done.
    pub(super) fn io(action: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |error| Error::Io { action, error }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        match error {
            Error::Io { error, .. } => error,
            error => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}
