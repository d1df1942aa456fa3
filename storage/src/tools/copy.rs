//! Copies a disk, as far as possible without its zeroes.

use std::io;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::zeroes::runs;
use super::{Job, ToolError};
use crate::{Content, Image, Target};

/// The bytes that are copied at a time: enough that system calls do not count, and few enough that they are
/// still in the processor's cache when they are written.
const CHUNK: u64 = 512 << 10;

/// How a disk is copied.
#[derive(Debug, Clone, Copy)]
pub struct CopyOptions {
    /// Zeroes of this length and alignment are not written as data. `None`: the source is not searched for
    /// zeroes, and those that it is known to have are written.
    pub sparse: Option<u64>,
    /// Whether the target reads as zeroes where nothing is written.
    pub target_is_zero: bool,
    /// The number of layers of the source that are copied: what deeper ones hold is left out, as the target has
    /// them itself. `None`: all.
    pub layers: Option<usize>,
}

/// Copies `range` of `source` to `target`, where it begins at `to`.
///
/// # Errors
/// If `source` cannot be read or `target` cannot be written, or the job is cancelled.
pub fn copy(
    source: &dyn Image,
    range: Range<u64>,
    target: &dyn Target,
    to: u64,
    options: CopyOptions,
    job: Job<'_>,
) -> Result<(), ToolError> {
    let sparse_unit = options.sparse.unwrap_or(1).min(CHUNK).next_power_of_two();
    let copy = Copy {
        source,
        target,
        origin: range.start,
        to,
        options,
        job,
        total: range.end - range.start,
        unit: sparse_unit.max(target.unit()),
    };
    let pieces = Mutex::new(Pieces {
        position: range.start,
        end: range.end,
        known: None,
    });
    // While one thread waits for the host to read or write, another can go on.
    let threads = match target.is_sequential() {
        true => 1,
        false => thread::available_parallelism().map_or(1, |count| count.get().min(2)),
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map_while(|_| {
                let work = || copy.work(&pieces);
                thread::Builder::new().spawn_scoped(scope, work).ok()
            })
            .collect();
        let mut result = copy.work(&pieces);
        for other in others {
            let other = other.join();
            result = result.and(other.unwrap_or_else(|panic| resume_unwind(panic)));
        }
        result
    })
}

struct Copy<'a> {
    source: &'a dyn Image,
    target: &'a dyn Target,
    /// Where the range begins in the source.
    origin: u64,
    /// Where it begins in the target.
    to: u64,
    options: CopyOptions,
    job: Job<'a>,
    total: u64,
    /// Zeroes of this length and alignment in the target are looked for.
    unit: u64,
}

/// What has not been copied yet.
struct Pieces {
    position: u64,
    end: u64,
    /// The status of the source up to a position.
    known: Option<(Kind, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zeroes,
    /// The target's backing file has it.
    Below,
}

impl Copy<'_> {
    fn work(&self, pieces: &Mutex<Pieces>) -> Result<(), ToolError> {
        let result = self.copy_pieces(pieces);
        if result.is_err() {
            // The other thread has nothing more to do.
            let mut pieces = pieces.lock().unwrap_or_else(PoisonError::into_inner);
            pieces.position = pieces.end;
        }
        result
    }

    fn copy_pieces(&self, pieces: &Mutex<Pieces>) -> Result<(), ToolError> {
        let chunk = CHUNK.max(self.unit);
        let mut buffer = vec![0; chunk as usize];
        loop {
            self.job.check()?;
            let next = {
                let mut pieces = pieces.lock().unwrap_or_else(PoisonError::into_inner);
                let next = self.next_piece(&mut pieces, chunk)?;
                self.job.report(pieces.position - self.origin, self.total);
                next
            };
            let Some((kind, piece)) = next else {
                return Ok(());
            };
            let at = piece.start - self.origin + self.to;
            let len = piece.end - piece.start;
            match kind {
                Kind::Below => {}
                Kind::Zeroes => self.zeroes(at..at + len)?,
                Kind::Data => {
                    let bytes = &mut buffer[..len as usize];
                    let read = self.source.read_at(bytes, piece.start);
                    read.map_err(|error| cannot_read(piece.start, error))?;
                    self.write(bytes, at)?;
                }
            }
        }
    }

    /// Takes the next piece: data of at most `chunk` bytes, which end at a unit of the target, or any number of
    /// zeroes.
    fn next_piece(
        &self,
        pieces: &mut Pieces,
        chunk: u64,
    ) -> Result<Option<(Kind, Range<u64>)>, ToolError> {
        let start = pieces.position;
        if start == pieces.end {
            return Ok(None);
        }
        let (kind, known_end) = match pieces.known {
            Some((kind, end)) if end > start => (kind, end),
            _ => self.kind_at(start..pieces.end)?,
        };
        pieces.known = Some((kind, known_end));
        // Units are counted in the target. One that is not of one kind is read and searched.
        let unit_end =
            |position: u64| (position - self.origin + self.to).next_multiple_of(self.unit);
        let in_source = |position: u64| (position - self.to).saturating_add(self.origin);
        let end = if kind == Kind::Data {
            let last = (start - self.origin + self.to + chunk) / chunk * chunk;
            let known = in_source(unit_end(known_end));
            known.min(in_source(last))
        } else if known_end == pieces.end {
            known_end
        } else {
            let last = (known_end - self.origin + self.to) / self.unit * self.unit;
            let last = last.saturating_sub(self.to) + self.origin;
            match last > start {
                true => last,
                false => {
                    pieces.position = in_source(unit_end(start + 1)).min(pieces.end);
                    return Ok(Some((Kind::Data, start..pieces.position)));
                }
            }
        };
        pieces.position = end.min(pieces.end);
        Ok(Some((kind, start..pieces.position)))
    }

    /// Returns what `range` begins with, and where that ends.
    fn kind_at(&self, range: Range<u64>) -> Result<(Kind, u64), ToolError> {
        let mut position = range.start;
        let mut first = None;
        // Short runs are put together, as each piece costs a request.
        while position < range.end && position - range.start < 64 * CHUNK {
            let status = self.source.status(position..range.end);
            let status = status.map_err(|error| cannot_read(position, error))?;
            let is_below = |layers| status.depth.is_none_or(|depth| depth >= layers);
            let kind = match status.content {
                _ if self.options.layers.is_some_and(is_below) => Kind::Below,
                Content::Data { .. } | Content::Compressed => Kind::Data,
                _ if self.options.sparse.is_none() => Kind::Data,
                Content::Hole { .. } | Content::Zeroes => Kind::Zeroes,
            };
            if *first.get_or_insert(kind) != kind || status.len == 0 {
                break;
            }
            position += status.len;
        }
        let end = position.max(range.start + 1);
        Ok((first.unwrap_or(Kind::Data), end))
    }

    /// Writes data, and leaves out zeroes.
    fn write(&self, bytes: &[u8], at: u64) -> Result<(), ToolError> {
        if self.options.sparse.is_none() {
            return self.write_data(bytes, at);
        }
        // The first unit can be one that begins earlier.
        let head = (at.next_multiple_of(self.unit) - at).min(bytes.len() as u64) as usize;
        let (head, body) = bytes.split_at(head);
        for (part, at) in [(head, at), (body, at + head.len() as u64)] {
            let mut start = 0;
            for (zero, end) in runs(part, self.unit as usize) {
                let (from, to) = (at + start as u64, at + end as u64);
                match zero {
                    true => self.zeroes(from..to)?,
                    false => self.write_data(&part[start..end], from)?,
                }
                start = end;
            }
        }
        Ok(())
    }

    fn write_data(&self, bytes: &[u8], at: u64) -> Result<(), ToolError> {
        let written = self.target.write(bytes, at);
        written.map_err(|error| ToolError::Write { offset: at, error })
    }

    fn zeroes(&self, range: Range<u64>) -> Result<(), ToolError> {
        let offset = range.start;
        if self.options.target_is_zero {
            return Ok(());
        }
        let written = self.target.write_zeroes(range);
        written.map_err(|error| ToolError::Write { offset, error })
    }
}

fn cannot_read(offset: u64, error: io::Error) -> ToolError {
    ToolError::Read {
        image: "the source",
        offset,
        error,
    }
}
