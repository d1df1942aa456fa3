//! What can go wrong with the stream.

use std::io;

use bantam_snapshot::SnapshotError;

use crate::Address;

/// Why a machine cannot be moved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// Nobody can be reached at an address.
    #[error(
        "cannot connect to '{address}': {source}; start 'bantam migrate --receive' there first"
    )]
    Connect {
        /// The address.
        address: Address,
        /// What the host said.
        source: io::Error,
    },
    /// The connection cannot be used.
    #[error("the connection to the other end is broken: {0}")]
    Broken(#[source] io::Error),
    /// There is no thread for one of several connections.
    #[error("cannot start a thread for a connection: {0}")]
    Thread(#[source] io::Error),
    /// The system gives no random numbers.
    #[error("cannot make a key for the connections: {0}")]
    Random(#[source] io::Error),
    /// The other end has closed the connection.
    #[error("the other end has closed the connection")]
    Closed,
    /// The other end has not answered in time.
    #[error("the other end has not answered for {seconds} s")]
    Stalled {
        /// How many seconds it was waited for.
        seconds: u64,
    },
    /// The other end does not speak the protocol.
    #[error("the other end is not a migration of Bantam")]
    NotMigration,
    /// The other end speaks TLS.
    #[error("the other end speaks TLS; use tls:// at both ends")]
    Tls,
    /// The other end speaks another version of the protocol.
    #[error(
        "the other end speaks version {found} of the protocol, and this program version {known}: use the same version \
         of Bantam at both ends"
    )]
    Version {
        /// The version of this program.
        known: u32,
        /// That of the other end.
        found: u32,
    },
    /// The other end does not keep to the protocol.
    #[error("the other end does not keep to the protocol: {0}")]
    Protocol(String),
    /// The other end cannot do its part.
    #[error("the other end has refused: {0}")]
    Refused(String),
    /// The owner of the machine has ended the migration.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The state of the machine cannot be written or read.
    #[error(transparent)]
    State(#[from] SnapshotError),
}

impl MigrationError {
    /// Describes a failure of the connection.
    pub(crate) fn of_connection(error: io::Error) -> MigrationError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => MigrationError::Stalled {
                seconds: crate::connection::PATIENCE.as_secs(),
            },
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => MigrationError::Closed,
            _ => MigrationError::Broken(error),
        }
    }
}
