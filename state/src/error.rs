use std::io;

/// Why a part of a machine could not save its state.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The part has state that cannot leave the process.
    #[error("'{part}' cannot be saved: {reason}")]
    NotSupported {
        /// What was to be saved.
        part: String,
        /// What prevents it.
        reason: String,
    },
    /// The host failed to return the state.
    #[error("cannot read the state of '{part}': {source}")]
    Host {
        /// What was to be saved.
        part: String,
        /// What the host said.
        source: io::Error,
    },
    /// The value does not fit into a section.
    #[error("the state of '{part}' cannot be encoded: {reason}")]
    Encode {
        /// What was to be saved.
        part: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Why saved state could not be read or used.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Reading failed, or the data ended within a section.
    #[error("cannot read saved state: {0}")]
    Read(#[from] io::Error),
    /// The bytes differ from those that were written.
    #[error("saved state is damaged: {reason}; save the machine again or use another copy")]
    Damaged {
        /// What is wrong with them.
        reason: String,
    },
    /// The section belongs to another part.
    #[error("saved state of '{found}' where that of '{expected}' was expected")]
    Kind {
        /// The part that was to be restored.
        expected: String,
        /// The part that the state is of.
        found: String,
    },
    /// The section was written by a version of the program with another format.
    #[error(
        "saved state of '{kind}' has version {found}, and this program reads version {known}: \
         restore it with the program that saved it"
    )]
    Version {
        /// The part that the state is of.
        kind: String,
        /// The version that can be read.
        known: u16,
        /// The version of the state.
        found: u16,
    },
    /// The part cannot have these values.
    #[error("saved state of '{kind}' does not fit: {reason}")]
    Invalid {
        /// The part that the state is of.
        kind: String,
        /// What does not fit.
        reason: String,
    },
    /// The host refused the state.
    #[error("cannot set the state of '{part}': {source}")]
    Host {
        /// What was to be restored.
        part: String,
        /// What the host said.
        source: io::Error,
    },
}
