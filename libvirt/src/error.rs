//! Why domain XML cannot be a machine.

use bantam_vmm::config::ConfigError;

/// Why domain XML is not read or written: one line with the reason and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not XML, or more than a domain needs.
    #[error("it is not XML that Bantam reads: {0}")]
    Xml(String),
    /// Bantam does not have something that a guest would rely on.
    #[error("{what} is not supported by Bantam; {remedy}")]
    Unsupported {
        /// The element, and its value.
        what: String,
        /// What to write in its place.
        remedy: String,
    },
    /// Something is missing, or is not what libvirt has there.
    #[error("{what} {reason}")]
    Value {
        /// The element.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The machine that it describes cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The options of Bantam in `<metadata>` are wrong.
    #[error("Bantam's options in <metadata> are wrong: {0}")]
    Options(String),
    /// A path or a text of the machine has a character that XML does not have.
    #[error(
        "the machine cannot be written as XML: its machine file has the character U+FFFE or U+FFFF; `bantam dumpcfg` \
         prints that file"
    )]
    Character,
}

impl Error {
    /// Says what is not supported, and what to do.
    pub(crate) fn unsupported(what: impl Into<String>, remedy: impl Into<String>) -> Error {
        Error::Unsupported {
            what: what.into(),
            remedy: remedy.into(),
        }
    }

    /// Says what is wrong with an element.
    pub(crate) fn value(what: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Value {
            what: what.into(),
            reason: reason.into(),
        }
    }
}
