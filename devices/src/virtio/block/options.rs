//! Options of a block device.

use crate::rate_limiter::Limits;

/// Most queues of one device.
pub const MAX_QUEUES: u16 = 8;

/// How requests are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// Each request in the way that is best for it: at once if it does not block, by io_uring if it does. The
    /// same as [`Engine::Sync`] if the host has no io_uring.
    #[default]
    Auto,
    /// By io_uring.
    IoUring,
    /// One at a time, by system calls that block the event loop.
    Sync,
}

/// Options of a block device.
#[derive(Debug, Clone, Copy)]
pub struct BlockOptions {
    /// How requests are done.
    pub engine: Engine,
    /// Number of queues, from 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Whether the event loop polls for requests for longer than usual before it sleeps, as long as that
    /// succeeds.
    pub polls: bool,
    /// Limits on requests, and on the bytes that they read and write.
    pub limits: Limits,
}

impl Default for BlockOptions {
    /// Returns options with one queue and no limits.
    fn default() -> BlockOptions {
        BlockOptions {
            engine: Engine::Auto,
            queues: 1,
            polls: false,
            limits: Limits::default(),
        }
    }
}
