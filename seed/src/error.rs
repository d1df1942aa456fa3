//! What is wrong with input for a seed.

use std::io;
use std::path::PathBuf;

use crate::MAX_FILE_SIZE;

/// Why there is no seed: one line with the reason and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read '{}': {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file is too large.
    #[error("{what} is larger than {} MiB; have the guest fetch what is large (#include)", MAX_FILE_SIZE >> 20)]
    TooLarge {
        /// What the file is.
        what: String,
    },
    /// A directory has no user-data.
    #[error("the directory '{}' has no file user-data; cloud-init needs one, which may be empty", path.display())]
    NoUserData {
        /// The directory.
        path: PathBuf,
    },
    /// cloud-init would not know what data of this kind is.
    #[error(
        "{what} does not begin with what cloud-init knows, such as #cloud-config, #!, #include or Content-Type:; \
         write that in its first line"
    )]
    UnknownKind {
        /// What the data is.
        what: String,
    },
    /// Text is not UTF-8.
    #[error("{what} is not UTF-8 text; save it as UTF-8, or compressed by gzip")]
    NotText {
        /// What the text is.
        what: String,
    },
    /// YAML is wrong, or is not a mapping.
    #[error("{what} is not a YAML mapping: {reason}")]
    Yaml {
        /// What the text is.
        what: String,
        /// The reason, with the line.
        reason: String,
    },
    /// A text is not a public key.
    #[error("{reason}; give the file that ssh-keygen has named .pub")]
    Key {
        /// What is wrong.
        reason: String,
    },
    /// A text is not a user name.
    #[error(
        "'{name}' is not a user name; one has up to 32 lower-case letters, digits, '_' and '-', and begins with a letter \
         or '_'"
    )]
    UserName {
        /// The text.
        name: String,
    },
    /// A text is not a host name.
    #[error(
        "'{name}' is not a host name; one has letters, digits and dashes, and dots between its parts of up to 63 characters"
    )]
    HostName {
        /// The text.
        name: String,
    },
    /// A password is not one line.
    #[error(
        "the password is {reason}; write it, or its hash (openssl passwd -6), into the first line of the file"
    )]
    Password {
        /// What it is.
        reason: &'static str,
    },
    /// cloud-init would take a password for something else, as its user has no name.
    #[error(
        "cloud-init would not know whether this is a password or a hash; give the user a name (--user), or use a hash that \
         it knows (openssl passwd -6)"
    )]
    Ambiguous,
    /// cloud-init has refused user data.
    #[error("cloud-init refuses {what}: {reason}")]
    Schema {
        /// What it was asked about.
        what: String,
        /// What it has said.
        reason: String,
    },
    /// The image cannot be made.
    #[error("cannot make the disk for cloud-init: {0}")]
    Image(io::Error),
}
