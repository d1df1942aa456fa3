//! Errors of the worker.

use crate::virtio::QueueError;

/// A breach of the device's rules by its driver.
#[derive(Debug, thiserror::Error)]
pub(super) enum DriverError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(
        "port {port}: the buffer at {head} has {readable} readable and {writable} writable bytes, \
         where only data can be received"
    )]
    ReceiveBuffer {
        port: usize,
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("the control message at {head} has {size} bytes, less than its header")]
    ShortMessage { head: u16, size: usize },
    #[error("the control buffer at {head} has room for {size} bytes, and a message has {needed}")]
    ControlBuffer {
        head: u16,
        size: usize,
        needed: usize,
    },
}
