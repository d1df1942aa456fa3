//! What can go wrong at work.

use std::io;

use crate::virtio::QueueError;

/// What a driver did that breaks the rules of the device.
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
    /// Not the driver's fault, but there is no way to go on either.
    #[error("the host's timer fails: {0}")]
    Timer(#[from] io::Error),
    /// Neither is this.
    #[error("the event loop does not watch it: {0}")]
    Watch(#[from] event_manager::Error),
}
