//! What io_uring has of a request.

use std::io;
use std::time::Instant;

use super::metrics::Work;
use super::request::{Failure, Request};
use super::ring::Direction;
use crate::virtio::Chain;

/// What the ring is to do for a request, as far as it is not done yet.
#[derive(Debug, Clone, Copy)]
pub(super) enum RingOperation {
    /// Transfers what is left of the chain's buffers.
    Transfer {
        direction: Direction,
        offset: u64,
    },
    Flush,
}

/// A request that the ring has.
#[derive(Clone, Copy)]
pub(super) struct InFlight {
    pub(super) queue: usize,
    pub(super) request: Request,
    pub(super) operation: RingOperation,
    /// When it was begun, and others with it.
    pub(super) since: Instant,
}

impl InFlight {
    /// Takes account of what the kernel has done: the request's end, unless there is more to do.
    pub(super) fn advance(
        &mut self,
        chain: &mut Chain,
        result: i32,
    ) -> Option<Result<(), Failure>> {
        let count = match u32::try_from(result) {
            Ok(count) => count as usize,
            Err(_) => {
                let error = io::Error::from_raw_os_error(-result);
                return match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => None,
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
        if count == 0 && !buffers.is_empty() {
            let error = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Some(Err(error.into()));
        }
        buffers.advance(count);
        *offset += count as u64;
        buffers.is_empty().then_some(Ok(()))
    }

    /// What it is counted as once it is done.
    pub(super) fn work(&self) -> Work {
        match self.operation {
            RingOperation::Flush => Work::Flush,
            RingOperation::Transfer { direction, .. } => match direction {
                Direction::Read => Work::Read(self.request.data_to_driver()),
                Direction::Write { .. } => Work::Write(self.request.readable),
            },
        }
    }
}
