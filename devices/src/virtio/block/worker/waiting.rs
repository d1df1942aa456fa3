//! Requests that wait for others to the same disk.
//!
//! If a disk bypasses the page cache, a request that the storage does not take as it is needs a bounce buffer: one
//! of a few for a raw disk, one of the image's thread for another. A request that writes a block in part reads all
//! of the block first. So it waits until no other write to that block is in progress, and others then wait for it. In
//! an image that is not raw, a request that discards a part of the disk changes where the data there is, so no
//! transfer there is in progress meanwhile.
//!
//! Requests wait in one line: the first in the line is the next to be begun, and a request that has to wait
//! for one in the line joins it at its end.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bantam_storage::{Bounce, Disk};

use super::Worker;
use crate::virtio::MAX_TURN;
use crate::virtio::block::in_flight::{InFlight, Remaining};
use crate::virtio::block::request::{Operation, Outcome, RequestError};
use crate::virtio::block::ring::Direction;
use crate::virtio::block::span::Span;

/// Most bounce buffers of a disk. Each has 128 KiB, unless the storage has larger blocks.
const MAX_BUFFERS: usize = 8;

/// How long requests in the line that are done at once may take before other devices get their turn. In tests
/// each one ends the turn.
const TURN: Duration = if cfg!(test) { Duration::ZERO } else { MAX_TURN };

/// The line of waiting requests, and what they wait for.
#[derive(Default)]
pub(super) struct Waiting {
    /// Slots of the waiting requests.
    line: VecDeque<usize>,
    #[expect(
        clippy::vec_box,
        reason = "a request takes and returns the box as it is"
    )]
    free_buffers: Vec<Box<Bounce>>,
    buffer_count: usize,
    /// How many requests in progress or waiting exclude others from their part of the disk.
    exclusive_count: usize,
    /// Whether the line was left, to give other devices their turn, although its first request need not wait.
    is_put_off: bool,
}

impl Waiting {
    /// Whether requests in the line are to be begun in the next turn, for which the doorbell was rung.
    pub(super) fn is_put_off(&self) -> bool {
        self.is_put_off
    }

    fn has_buffer(&self) -> bool {
        !self.free_buffers.is_empty() || self.buffer_count < MAX_BUFFERS
    }
}

impl Worker {
    /// Begins the request in `slot`, whose [`InFlight`] is set, or has it wait. Returns its outcome if it has
    /// ended already.
    pub(super) fn start(&mut self, slot: usize) -> Result<Outcome, RequestError> {
        if let Disk::Raw(disk) = &**self.handler.disk()
            && !disk.is_direct()
        {
            self.push(slot)?;
            return Ok(None);
        }
        let span = self.span(slot);
        let is_exclusive = span.as_ref().is_some_and(|span| span.is_exclusive);
        self.waiting.exclusive_count += usize::from(is_exclusive);
        if let Some(in_flight) = &mut self.slots[slot].in_flight {
            in_flight.span = span;
        }
        let waits_for_buffer =
            self.needs_buffer(slot) && !(self.waiting.line.is_empty() && self.waiting.has_buffer());
        if waits_for_buffer || self.is_excluded(slot, true) {
            self.wait_in_line(slot, false);
            return Ok(None);
        }
        self.go_on(slot)
    }

    /// Whether a request to a raw disk that is done at once, and changes the disk, has to wait for those in
    /// progress.
    pub(super) fn has_to_wait(&self, operation: Operation) -> bool {
        let has_span = |it: &InFlight| it.span.is_some();
        let Disk::Raw(disk) = &**self.handler.disk() else {
            return false;
        };
        operation.range().is_some()
            && disk.is_direct()
            && self
                .slots
                .iter()
                .any(|slot| slot.in_flight.as_ref().is_some_and(has_span))
    }

    /// Returns the part of the disk that the request in `slot` uses, if that matters.
    fn span(&self, slot: usize) -> Option<Span> {
        let slot = &self.slots[slot];
        match slot.in_flight.as_ref()?.remaining {
            Remaining::Transfer {
                direction: Direction::Write { .. },
                offset,
            } => {
                let Disk::Raw(disk) = &**self.handler.disk() else {
                    return None;
                };
                let end = offset + slot.chain.readable.len() as u64;
                let (bytes, is_whole) = disk.block_span(offset..end)?;
                Some(Span {
                    bytes,
                    is_exclusive: !is_whole,
                })
            }
            Remaining::Pieces(pieces) => {
                let len = pieces.direction.buffers(&slot.chain).len() as u64;
                let range = pieces.offset..pieces.offset + len;
                let (bytes, is_whole) = match (&**self.handler.disk(), pieces.direction) {
                    (Disk::Formatted(disk), Direction::Write { .. }) => {
                        disk.block_span(range.clone()).unwrap_or((range, true))
                    }
                    _ => (range, true),
                };
                Some(Span {
                    bytes,
                    is_exclusive: !is_whole,
                })
            }
            Remaining::ByImage(operation) => Some(Span {
                bytes: operation.range()?,
                is_exclusive: true,
            }),
            Remaining::Storage { operation, .. } => {
                let Disk::Raw(disk) = &**self.handler.disk() else {
                    return None;
                };
                // A write that reads one of these blocks before must not bring back what they have now.
                let (bytes, _) = disk.block_span(operation.range()?)?;
                Some(Span {
                    bytes,
                    is_exclusive: true,
                })
            }
            Remaining::AtOnce(_) => Some(Span {
                bytes: 0..u64::MAX,
                is_exclusive: true,
            }),
            _ => None,
        }
    }

    /// Whether the request in `slot` cannot be done as it is, and has no buffer yet.
    fn needs_buffer(&self, slot: usize) -> bool {
        let slot = &self.slots[slot];
        let Some(in_flight) = &slot.in_flight else {
            return false;
        };
        let Remaining::Transfer { direction, offset } = in_flight.remaining else {
            return false;
        };
        let Disk::Raw(disk) = &**self.handler.disk() else {
            return false;
        };
        let buffers = direction.buffers(&slot.chain);
        in_flight.bounce.is_none() && !disk.takes(buffers, offset)
    }

    /// Whether another request keeps the one in `slot` from being begun: one in progress, or, with
    /// `by_waiting`, one that waits too.
    fn is_excluded(&self, slot: usize, by_waiting: bool) -> bool {
        if self.waiting.exclusive_count == 0 {
            return false;
        }
        let span = |slot: usize| self.slots[slot].in_flight.as_ref()?.span.as_ref();
        let Some(wanted) = span(slot) else {
            return false;
        };
        (0..self.slots.len()).any(|other| {
            let waits = |it: &InFlight| it.waits;
            let waits = self.slots[other].in_flight.as_ref().is_some_and(waits);
            other != slot
                && (by_waiting || !waits)
                && span(other).is_some_and(|other| other.excludes(wanted))
        })
    }

    fn wait_in_line(&mut self, slot: usize, at_front: bool) {
        let Some(in_flight) = &mut self.slots[slot].in_flight else {
            return;
        };
        in_flight.waits = true;
        match at_front {
            true => self.waiting.line.push_front(slot),
            false => self.waiting.line.push_back(slot),
        }
    }

    /// Gives the next operation of the request in `slot` to the ring or the thread of the image. Returns the
    /// outcome of the request if it has ended.
    pub(super) fn go_on(&mut self, slot: usize) -> Result<Outcome, RequestError> {
        if let Disk::Formatted(_) = &**self.handler.disk() {
            return self.go_on_with_image(slot);
        }
        if self.needs_buffer(slot) {
            let buffer = match self.waiting.free_buffers.pop() {
                Some(buffer) => Some(buffer),
                None if self.waiting.has_buffer() => {
                    let buffer = match &**self.handler.disk() {
                        Disk::Raw(disk) => disk.bounce(),
                        Disk::Formatted(_) => None,
                    };
                    self.waiting.buffer_count += usize::from(buffer.is_some());
                    buffer.map(Box::new)
                }
                None => None,
            };
            match (buffer, &mut self.slots[slot].in_flight) {
                (Some(buffer), Some(in_flight)) => in_flight.bounce = Some(buffer),
                // It was done in part, and the storage does not take the rest as it is.
                _ => {
                    self.wait_in_line(slot, true);
                    return Ok(None);
                }
            }
        }
        self.push(slot)?;
        Ok(None)
    }

    /// Takes back the buffer of a request that has ended, and the claim on its part of the disk.
    pub(super) fn release(&mut self, in_flight: &mut InFlight) {
        self.storage_changes -= usize::from(in_flight.remaining.changes_storage());
        let span = in_flight.span.take();
        let was_exclusive = span.is_some_and(|span| span.is_exclusive);
        self.waiting.exclusive_count -= usize::from(was_exclusive);
        if let Some(mut buffer) = in_flight.bounce.take() {
            buffer.reset();
            self.waiting.free_buffers.push(buffer);
        }
    }

    /// Begins the requests that no longer have to wait.
    pub(super) fn end_waiting(&mut self) -> Result<(), RequestError> {
        self.waiting.is_put_off = false;
        let mut start = None;
        while let Some(&slot) = self.waiting.line.front() {
            let lacks_buffer = self.needs_buffer(slot) && !self.waiting.has_buffer();
            if lacks_buffer || self.is_excluded(slot, false) {
                return Ok(());
            }
            self.waiting.line.pop_front();
            let Some(in_flight) = &mut self.slots[slot].in_flight else {
                continue;
            };
            in_flight.waits = false;
            match in_flight.remaining {
                Remaining::AtOnce(operation) => {
                    let queue = in_flight.queue;
                    let start = *start.get_or_insert_with(Instant::now);
                    let result = self.perform(slot, operation);
                    self.end(slot, result, None)?;
                    if start.elapsed() >= TURN && !self.waiting.line.is_empty() {
                        self.waiting.is_put_off = true;
                        self.queues[queue].ring_doorbell();
                        return Ok(());
                    }
                }
                _ => self.go_on_or_end(slot, None)?,
            }
        }
        Ok(())
    }

    /// Gives up the requests that wait although none is in progress, because the ring has failed. Returns
    /// whether there were any.
    pub(super) fn abandon_line(&mut self) -> bool {
        let is_stuck =
            !self.waiting.line.is_empty() && self.waiting.line.len() == self.in_flight_count();
        if is_stuck {
            for slot in std::mem::take(&mut self.waiting.line) {
                self.give_up(slot);
            }
        }
        is_stuck
    }
}
