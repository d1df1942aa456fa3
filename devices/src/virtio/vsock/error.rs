//! Errors of the worker.

use std::io;

use crate::virtio::QueueError;

/// A breach of the device's rules by its driver, or a failure of the host.
#[derive(Debug, thiserror::Error)]
pub(super) enum DriverError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(
        "queue 0: the buffer at {head} has {readable} readable and {writable} writable bytes, where \
         only a header and data can be received"
    )]
    ReceiveBuffer {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("queue 1: the packet at {head} has {size} bytes, less than its header")]
    ShortPacket { head: u16, size: usize },
    #[error("queue 1: the packet at {head} should have {len} bytes of data, and has {size}")]
    MissingData { head: u16, len: u32, size: usize },
    #[error(
        "queue 2: the buffer at {head} has {readable} readable and {writable} writable bytes, where \
         only an event can be received"
    )]
    EventBuffer {
        head: u16,
        readable: usize,
        writable: usize,
    },
    /// The host's timer fails, which is not the driver's fault.
    #[error("the host's timer fails: {0}")]
    Timer(#[from] io::Error),
    /// The event loop fails, which is not the driver's fault.
    #[error("the event loop does not watch it: {0}")]
    Watch(#[from] event_manager::Error),
}
