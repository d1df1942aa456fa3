//! Errors of the worker.

use std::io;

use crate::virtio::QueueError;

/// Why the device is unusable until it is reset.
#[derive(Debug, thiserror::Error)]
pub(super) enum DriverError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(
        "the descriptor chain at {head} is no receive buffer: it has {readable} bytes to read and \
         {writable} to write"
    )]
    ReceiveBuffer {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("the command at {head} has no byte for its answer")]
    NoRoomForAnswer { head: u16 },
    #[error("cannot set the timer of its limits: {0}")]
    Timer(#[from] io::Error),
}
