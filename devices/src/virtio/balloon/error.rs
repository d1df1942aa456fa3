//! Errors of the balloon: for the owner of the machine, and of the worker.

use std::io;

use bantam_memory::BufferError;

use crate::virtio::QueueError;

/// Why a balloon cannot have the settings that are asked for.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The guest has less memory.
    #[error(
        "a balloon of {mib} MiB does not fit into the guest's memory of {memory_mib} MiB: choose a \
         smaller size"
    )]
    TooLarge {
        /// Wanted size in MiB.
        mib: u32,
        /// Guest memory in MiB.
        memory_mib: u64,
    },
    /// Statistics are off, so they have no interval.
    #[error(
        "the balloon has no statistics: an interval for them has to be given before the machine starts"
    )]
    NoStatistics,
    /// The guest cannot be asked for hints.
    #[error(
        "the balloon has no free page hinting: that has to be turned on before the machine starts"
    )]
    NoHinting,
    /// The timer of the statistics failed.
    #[error("cannot set the timer of the balloon's statistics: {0}")]
    Timer(#[source] io::Error),
}

/// Why the device is unusable until its driver resets it; mostly faults of the driver.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(
        "the request at {head} is no list of page numbers: it has {readable} bytes to read and \
         {writable} to write"
    )]
    PageNumbers {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("of the pages that the request at {head} puts into the balloon, {source}")]
    Page { head: u16, source: BufferError },
    #[error(
        "the request at {head} is no report of free pages: it has {readable} bytes to read and \
         {writable} to write"
    )]
    Report {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error(
        "the request at {head} is neither a command nor a hint of free pages: it has {readable} bytes \
         to read and {writable} to write"
    )]
    Hint {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("the buffer of statistics at {head} has {writable} bytes to write")]
    Statistics { head: u16, writable: usize },
    #[error("there is a buffer of statistics at {head} before the one at {held} was returned")]
    SecondStatistics { head: u16, held: u16 },
    #[error("cannot set the timer of the statistics: {0}")]
    Timer(io::Error),
}
