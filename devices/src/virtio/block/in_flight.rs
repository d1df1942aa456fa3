//! The remaining work of a request that is not done at once.

use std::io;
use std::time::Instant;

use bantam_storage::{Bounce, DiskFile};

use super::metrics::Work;
use super::request::{Failure, Operation, Request};
use super::ring::Direction;
use super::write_span::WriteSpan;
use crate::virtio::Chain;

/// The part of a request that is still to be done.
#[derive(Debug, Clone, Copy)]
pub(super) enum RingOperation {
    /// Transfers the rest of the chain's buffers.
    Transfer {
        direction: Direction,
        offset: u64,
    },
    Flush,
    /// Is done without the ring, at once when its turn comes.
    AtOnce(Operation),
}

/// A request that the ring has, or that waits for others that it has.
pub(super) struct InFlight {
    pub(super) queue: usize,
    pub(super) request: Request,
    pub(super) operation: RingOperation,
    /// When it was begun, possibly with others.
    pub(super) since: Instant,
    /// The bounce buffer that it goes through, if it cannot be done as it is.
    pub(super) bounce: Option<Box<Bounce>>,
    /// The blocks that it writes, if writes to the same blocks have to wait for each other.
    pub(super) span: Option<WriteSpan>,
    /// Whether it waits for others.
    pub(super) waits: bool,
}

impl InFlight {
    /// Takes account of what the kernel has done with `disk`. Returns the request's outcome, unless there is
    /// more to do.
    pub(super) fn advance(
        &mut self,
        disk: &DiskFile,
        chain: &mut Chain,
        result: i32,
    ) -> Option<Result<(), Failure>> {
        if self.reads_in_place() {
            // Storage may have written more than it reports, or something before it failed.
            chain.writable.mark_filled(usize::MAX);
        }
        let count = match u32::try_from(result) {
            Ok(count) => count as usize,
            Err(_) => {
                let error = io::Error::from_raw_os_error(-result);
                return match error.raw_os_error() {
                    // The kernel cancels operations whose submitting thread has ended, such as one that tried
                    // to pause the device.
                    Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED) => None,
                    _ => Some(Err(error.into())),
                };
            }
        };
        let RingOperation::Transfer { direction, offset } = &mut self.operation else {
            return Some(Ok(()));
        };
        let buffers = match direction {
            Direction::Read => &mut chain.writable,
            Direction::Write { .. } => &mut chain.readable,
        };
        if let Some(bounce) = &mut self.bounce {
            match disk.end_step(bounce, buffers, count) {
                Ok(done) => *offset += done as u64,
                Err(error) => return Some(Err(error.into())),
            }
            return buffers.is_empty().then_some(Ok(()));
        }
        if count == 0 && !buffers.is_empty() {
            let error = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Some(Err(error.into()));
        }
        buffers.advance(count);
        *offset += count as u64;
        buffers.is_empty().then_some(Ok(()))
    }

    /// Whether the kernel writes to the chain's buffers.
    fn reads_in_place(&self) -> bool {
        let RingOperation::Transfer { direction, .. } = self.operation else {
            return false;
        };
        direction == Direction::Read && self.bounce.is_none()
    }

    /// Returns how it is counted once it is done.
    pub(super) fn work(&self) -> Work {
        match self.operation {
            RingOperation::Flush => Work::Flush,
            RingOperation::AtOnce(_) => Work::Other,
            RingOperation::Transfer { direction, .. } => match direction {
                Direction::Read => Work::Read(self.request.data_to_driver()),
                Direction::Write { .. } => Work::Write(self.request.readable),
            },
        }
    }
}
