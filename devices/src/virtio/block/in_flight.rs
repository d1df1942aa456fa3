//! The remaining work of a request that is not done at once.

use std::io;
use std::time::Instant;

use bantam_memory::GuestBuffers;
use bantam_storage::{Bounce, Disk};

use super::metrics::Work;
use super::pieces::Pieces;
use super::request::{Operation, Outcome, Request};
use super::ring::Direction;
use super::span::Span;
use crate::virtio::Chain;

/// The part of a request that is still to be done.
#[derive(Debug, Clone, Copy)]
pub(super) enum Remaining {
    /// Transfers the rest of the chain's buffers.
    Transfer {
        direction: Direction,
        offset: u64,
    },
    Flush,
    /// Changes the storage of a range, by `fallocate` with this mode.
    Storage {
        operation: Operation,
        mode: libc::c_int,
    },
    /// Brings a change of the storage of a range to stable storage.
    FlushOfStorage,
    /// Is done without the ring, at once when its turn comes.
    AtOnce(Operation),
    /// Transfers data of an image that is not raw.
    Pieces(Pieces),
    /// Is done by the thread of an image that is not raw.
    ByImage(Operation),
}

impl Remaining {
    /// Whether it belongs to a change of the storage of a range.
    pub(super) fn changes_storage(&self) -> bool {
        matches!(self, Remaining::Storage { .. } | Remaining::FlushOfStorage)
    }
}

/// A request that the ring or the thread of the image has, or that waits for others that they have.
pub(super) struct InFlight {
    pub(super) queue: usize,
    pub(super) request: Request,
    pub(super) remaining: Remaining,
    /// When it was begun, possibly with others.
    pub(super) since: Instant,
    /// The bounce buffer that it goes through, if it cannot be done as it is.
    pub(super) bounce: Option<Box<Bounce>>,
    /// The part of the disk that it uses, if there are requests that have to wait for others there.
    pub(super) span: Option<Span>,
    /// Whether it waits for others.
    pub(super) waits: bool,
}

impl InFlight {
    /// Takes account of what the ring has done. `rest` has the buffers that come after those in `chain`. Returns the
    /// request's outcome, unless there is more to do.
    pub(super) fn advance(
        &mut self,
        disk: &Disk,
        chain: &mut Chain,
        rest: &GuestBuffers,
        result: i32,
    ) -> Outcome {
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
        let (direction, offset) = match &mut self.remaining {
            Remaining::Transfer { direction, offset } => (direction, offset),
            Remaining::Pieces(pieces) => return pieces.advance(chain, rest, count),
            _ => return Some(Ok(())),
        };
        let buffers = direction.buffers_mut(chain);
        if let (Some(bounce), Disk::Raw(disk)) = (&mut self.bounce, disk) {
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
        let direction = match &self.remaining {
            Remaining::Transfer { direction, .. } => *direction,
            Remaining::Pieces(pieces) => pieces.direction,
            _ => return false,
        };
        direction == Direction::Read && self.bounce.is_none()
    }

    /// Returns how it is counted once it is done.
    pub(super) fn work(&self) -> Work {
        let direction = match self.remaining {
            Remaining::Flush | Remaining::ByImage(Operation::Flush) => return Work::Flush,
            Remaining::Storage { .. }
            | Remaining::FlushOfStorage
            | Remaining::AtOnce(_)
            | Remaining::ByImage(_) => return Work::Other,
            Remaining::Transfer { direction, .. } => direction,
            Remaining::Pieces(pieces) => pieces.direction,
        };
        match direction {
            Direction::Read => Work::Read(self.request.data_to_driver()),
            Direction::Write { .. } => Work::Write(self.request.readable),
        }
    }
}
