//! Requests to an image that is not raw.
//!
//! The image says where the bytes of a transfer are. If they are in a file, they go there directly, as with a
//! raw image; everything else is for the thread of the image.

use std::io;
use std::mem;
use std::time::Instant;

use bantam_memory::GuestBuffers;
use bantam_storage::{CacheMode, Disk};

use super::{Slot, Worker};
use crate::virtio::block::Engine;
use crate::virtio::block::image_work::{Done, Job, Task};
use crate::virtio::block::in_flight::Remaining;
use crate::virtio::block::pieces::{Piece, Pieces};
use crate::virtio::block::request::{Operation, Outcome, RequestError};
use crate::virtio::block::ring::{Direction, wait_readable};

impl Worker {
    /// Returns what is to be done for `operation`, unless it is done at once.
    pub(super) fn remaining_of_image(&self, operation: Operation) -> Option<Remaining> {
        let transfer = |direction, offset| Remaining::Pieces(Pieces::new(direction, offset));
        match operation {
            Operation::Read { offset } => Some(transfer(Direction::Read, offset)),
            Operation::Write { offset } => {
                let durable = self.handler.writes_are_durable();
                Some(transfer(Direction::Write { durable }, offset))
            }
            Operation::Flush if self.handler.disk().cache() == CacheMode::Unsafe => None,
            Operation::GetId => None,
            _ => Some(Remaining::ByImage(operation)),
        }
    }

    /// Leaves the start of the request in `slot` to [`Worker::start_parsed`] if it is one to an image, and returns
    /// whether it is: the entries of the image's tables come from memory while the next requests are parsed.
    pub(super) fn defer_start(&mut self, slot: usize, operation: Operation) -> bool {
        let Disk::Formatted(disk) = &**self.handler.disk() else {
            return false;
        };
        if let Operation::Read { offset } | Operation::Write { offset } = operation {
            disk.image().prefetch_map(offset);
        }
        self.parsed.push(slot);
        true
    }

    /// Begins the requests to an image that were parsed.
    pub(super) fn start_parsed(&mut self) -> Result<(), RequestError> {
        let mut parsed = mem::take(&mut self.parsed);
        let mut result = Ok(());
        for slot in parsed.drain(..) {
            let started = match self.start(slot) {
                Ok(None) => Ok(()),
                Ok(Some(outcome)) => self.end(slot, outcome, None),
                Err(error) => {
                    self.give_up(slot);
                    Err(error)
                }
            };
            // All are begun: none is lost because another one fails.
            result = result.and(started);
        }
        self.parsed = parsed;
        result
    }

    /// Does what can be done at once of the request in `slot`, and gives what comes then to the ring or the
    /// thread of the image. Returns the outcome if nothing is left.
    pub(super) fn go_on_with_image(&mut self, slot: usize) -> Result<Outcome, RequestError> {
        let is_auto = self.engine == Engine::Auto;
        let uses_page_cache = self.handler.disk().cache() != CacheMode::None;
        let reads_at_once = is_auto && uses_page_cache && !self.is_large_batch;
        let may_write = is_auto && !self.writes_are_slow();
        let writes_at_once = uses_page_cache && may_write;
        let allocates = self.ring.is_none() || may_write;
        let Worker {
            handler,
            slots,
            ring,
            image_work,
            image_jobs,
            memory,
            has_written,
            ..
        } = self;
        let (Disk::Formatted(disk), Some(work)) = (&**handler.disk(), image_work) else {
            return Ok(None);
        };
        let Slot {
            chain,
            rest,
            in_flight: Some(in_flight),
        } = &mut slots[slot]
        else {
            return Ok(None);
        };
        let (task, flushes) = match &mut in_flight.remaining {
            Remaining::ByImage(operation) => {
                let task = match *operation {
                    Operation::Discard { offset, len } => Task::Discard(offset..offset + len),
                    Operation::WriteZeroes { offset, len, unmap } => Task::WriteZeroes {
                        range: offset..offset + len,
                        unmap,
                    },
                    _ => Task::Flush,
                };
                let flushes = operation.range().is_some() && handler.writes_are_durable();
                (task, flushes)
            }
            Remaining::Pieces(pieces) => loop {
                let is_write = pieces.direction != Direction::Read;
                let piece = pieces.next(disk, chain, rest, allocates);
                if mem::take(&mut pieces.should_prepare) {
                    work.prepare(disk.image().clone());
                }
                match piece {
                    Piece::File { .. } if ring.is_none() || is_write && writes_at_once => {
                        *has_written |= is_write;
                        if let Err(error) = pieces.transfer(disk.files(), chain, 0) {
                            return Ok(Some(Err(error.into())));
                        }
                    }
                    Piece::File { .. } => {
                        if !is_write && reads_at_once {
                            // A failure shows again when the rest is done.
                            let _ = pieces.transfer(disk.files(), chain, libc::RWF_NOWAIT);
                        }
                        let buffers = pieces.direction.buffers_mut(chain);
                        if let (Some(ring), Piece::File { file, offset }) =
                            (&mut *ring, pieces.piece())
                            && !buffers.is_empty()
                        {
                            // What has to be on stable storage is flushed when all of it is written.
                            let direction = match pieces.direction {
                                Direction::Read => Direction::Read,
                                Direction::Write { .. } => Direction::Write { durable: false },
                            };
                            // SAFETY: the slot is not taken for another request while it has one in flight,
                            // nor are its buffers changed before the completion of this token. Dropping the
                            // worker waits for it.
                            unsafe {
                                ring.push_transfer(direction, buffers, file, offset, slot as u64)?;
                            }
                            return Ok(None);
                        }
                    }
                    Piece::Slow { .. } => {
                        let none = GuestBuffers::new(memory.clone());
                        let buffers = mem::replace(pieces.direction.buffers_mut(chain), none);
                        let offset = pieces.offset;
                        let task = match is_write {
                            true => Task::Write { buffers, offset },
                            false => Task::Read { buffers, offset },
                        };
                        break (task, false);
                    }
                    Piece::Flush => break (Task::Flush, false),
                    Piece::Unknown | Piece::End => return Ok(Some(Ok(()))),
                }
            },
            _ => return Ok(None),
        };
        *image_jobs += 1;
        work.push(Job {
            token: slot,
            image: disk.image().clone(),
            task,
            flushes,
        });
        Ok(None)
    }

    /// Returns the requests that the thread of the image has done, and continues those that it has done in
    /// part.
    pub(super) fn complete_image_jobs(&mut self) -> Result<(), RequestError> {
        let Some(work) = &self.image_work else {
            return Ok(());
        };
        let mut done = mem::take(&mut self.image_jobs_done);
        work.take_done(&mut done);
        self.image_jobs -= done.len();
        let now = (!done.is_empty()).then(Instant::now);
        let mut result = Ok(());
        for done in done.drain(..) {
            // All are handled: none is lost because another one fails.
            let completed = self.complete_image_job(done, now);
            result = result.and(completed);
        }
        self.image_jobs_done = done;
        result
    }

    fn complete_image_job(&mut self, done: Done, now: Option<Instant>) -> Result<(), RequestError> {
        let Done {
            token,
            result,
            buffers,
        } = done;
        let Some(Slot {
            chain,
            in_flight: Some(in_flight),
            ..
        }) = self.slots.get_mut(token)
        else {
            return Ok(());
        };
        match (&mut in_flight.remaining, result) {
            (Remaining::Pieces(pieces), Ok(())) => {
                if let Some(buffers) = buffers {
                    *pieces.direction.buffers_mut(chain) = buffers;
                }
                pieces.slow_piece_is_done();
                self.go_on_or_end(token, now)
            }
            (_, result) => self.end(token, result.map_err(Into::into), now),
        }
    }

    /// Waits until the ring or the thread of the image has done something.
    ///
    /// # Errors
    /// If neither has by `deadline`, or the wait fails.
    pub(super) fn wait_for_any(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        let work = self.image_work.as_ref().filter(|_| self.image_jobs > 0);
        match (&mut self.ring, work) {
            (Some(ring), None) => ring.wait(deadline),
            (Some(ring), Some(work)) => {
                if ring.unsubmitted() > 0 {
                    ring.submit()?;
                }
                wait_readable(&[ring, &**work], deadline)?;
                work.clear_event();
                Ok(())
            }
            (None, Some(work)) => {
                wait_readable(&[&**work], deadline)?;
                work.clear_event();
                Ok(())
            }
            (None, None) => Ok(()),
        }
    }
}
