//! Why a control socket cannot be used.

use std::io;

use crate::protocol::{PROTOCOL_VERSION, Refusal};

/// Why a client has no answer. The text is the end of a line that names the socket, and has the remedy; that of
/// [`ControlError::Refused`] is a line by itself.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no file of that name.
    #[error("there is no such socket; a machine that is started with --control has one")]
    NoSocket,
    /// The file is not a socket.
    #[error("it is not a socket; name the one that the machine was started with (--control)")]
    NotASocket,
    /// A socket is there, but its process has ended.
    #[error(
        "nobody listens there any more: the machine has ended without removing it; start it again"
    )]
    Abandoned,
    /// The file's permissions forbid it.
    #[error(
        "permission denied; only the user who has started the machine, and root, may control it"
    )]
    Denied,
    /// The server speaks something else.
    #[error("it is not the control socket of a machine: {reason}")]
    Foreign {
        /// What it has sent.
        reason: String,
    },
    /// The server has another version of the protocol.
    #[error(
        "it has version {found} of the protocol, and this program has version {PROTOCOL_VERSION}; use the \
         program that has started the machine"
    )]
    Version {
        /// The server's version.
        found: u32,
    },
    /// Nothing has come in time.
    #[error("no answer within {seconds} s; the command may still be executed")]
    TimedOut {
        /// How many seconds it was waited for.
        seconds: u64,
    },
    /// The server has closed the connection.
    #[error("the machine has ended")]
    Ended,
    /// The request is longer than a line may be.
    #[error("the command is too long")]
    TooLong,
    /// The machine refuses the command, or the client.
    #[error(transparent)]
    Refused(Refusal),
    /// The command cannot be written as JSON, because a path in it is not UTF-8.
    #[error("the command cannot be sent: {0}")]
    Command(#[source] serde_json::Error),
    /// The connection has failed otherwise.
    #[error(transparent)]
    Io(#[from] io::Error),
}
