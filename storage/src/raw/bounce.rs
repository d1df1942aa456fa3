//! Bounce buffers for requests that `O_DIRECT` does not take as they are.
//!
//! Storage that is accessed directly has blocks: an operation covers whole blocks, and its memory is aligned.
//! Any other request is done in windows of whole blocks, each at most as large as the buffer. If a write
//! covers a block only in part, its window is first read, then changed and written, so no other write to that
//! block may be in progress meanwhile: see [`DiskFile::block_span`](super::DiskFile::block_span).
//!
//! The bytes after an image's last whole block, its tail, cannot be written in this way without making the
//! file longer. They are written through the page cache, and in no other way.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use bantam_memory::GuestBuffers;

use super::Access;

/// Size of a buffer in bytes, unless a block is larger.
const BUFFER_SIZE: usize = 128 << 10;

/// The alignment that `O_DIRECT` requires of an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Alignment {
    /// Size of a block in bytes, a power of two. Offset and size must be multiples of it.
    pub(crate) offset: u64,
    /// Alignment of addresses in memory in bytes, a power of two.
    pub(crate) memory: usize,
}

/// An image on storage that has blocks.
pub(crate) trait Blocks {
    /// Returns the alignment that the storage requires.
    fn alignment(&self) -> Alignment;
    /// Returns where the tail begins, which only [`Access::Tail`] writes.
    fn tail(&self) -> u64;
    /// Returns the present size of the image in bytes.
    fn current_size(&self) -> io::Result<u64>;
    /// Returns the file for `access`, if there is one.
    fn file(&self, access: Access) -> Option<&File>;
}

impl Alignment {
    /// That of the page cache, which accepts any request.
    pub(crate) const NONE: Alignment = Alignment {
        offset: 1,
        memory: 1,
    };

    fn block_start(&self, offset: u64) -> u64 {
        offset & !(self.offset - 1)
    }

    fn block_end(&self, offset: u64) -> u64 {
        self.block_start(offset + self.offset - 1)
    }

    /// Returns the smallest range of whole blocks that contains `range`.
    pub(crate) fn blocks_around(&self, range: &Range<u64>) -> Range<u64> {
        self.block_start(range.start)..self.block_end(range.end)
    }

    /// Whether a range consists of whole blocks.
    pub(crate) fn covers_blocks(&self, range: &Range<u64>) -> bool {
        self.blocks_around(range) == *range
    }

    /// Returns where the tail of a file of `size` bytes begins.
    pub(crate) fn tail(&self, size: u64) -> u64 {
        self.block_start(size)
    }
}

/// The data of a request.
pub(crate) trait Data {
    /// Returns how many bytes are left.
    fn len(&self) -> usize;
    /// Fills `bytes` with the first bytes that are left.
    fn peek(&self, bytes: &mut [u8]);
    /// Overwrites the first bytes that are left with `bytes`, and drops them.
    fn put(&mut self, bytes: &[u8]);
    /// Drops the first `count` bytes.
    fn advance(&mut self, count: usize);
}

impl Data for GuestBuffers {
    fn len(&self) -> usize {
        GuestBuffers::len(self)
    }

    fn peek(&self, bytes: &mut [u8]) {
        self.read_at(0, bytes);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.write(bytes);
    }

    fn advance(&mut self, count: usize) {
        GuestBuffers::advance(self, count);
    }
}

/// This many zeroes, to be written.
pub(crate) struct Zeroes(pub(crate) usize);

impl Data for Zeroes {
    fn len(&self) -> usize {
        self.0
    }

    fn peek(&self, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.advance(bytes.len());
    }

    fn advance(&mut self, count: usize) {
        self.0 -= count;
    }
}

impl Data for &mut [u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn peek(&self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self[..bytes.len()]);
    }

    fn put(&mut self, bytes: &[u8]) {
        self[..bytes.len()].copy_from_slice(bytes);
        self.advance(bytes.len());
    }

    fn advance(&mut self, count: usize) {
        *self = &mut std::mem::take(self)[count..];
    }
}

/// Bytes that are written.
pub(crate) struct Written<'a>(pub(crate) &'a [u8]);

impl Data for Written<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn peek(&self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.0[..bytes.len()]);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.advance(bytes.len());
    }

    fn advance(&mut self, count: usize) {
        self.0 = &self.0[count..];
    }
}

/// Transfers all of `data` between memory and the image through a buffer.
///
/// # Errors
/// Those of the transfers, and if the image ends before the data does.
pub(crate) fn bounce_all(
    image: &impl Blocks,
    data: &mut impl Data,
    mut offset: u64,
    writes: bool,
) -> io::Result<()> {
    if data.len() == 0 {
        return Ok(());
    }
    let mut bounce = Bounce::new(image.alignment(), data.len());
    while data.len() > 0 {
        let step = bounce.step(image, data, offset, writes);
        let file = image.file(step.access);
        let file = file.ok_or(io::ErrorKind::UnexpectedEof)?;
        let bytes = bounce.bytes(step.bytes.clone());
        let result = match step.writes {
            true => file.write_at(bytes, step.offset),
            false => file.read_at(bytes, step.offset),
        };
        match result {
            Ok(count) => offset += bounce.advance(image, data, count)? as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A part of an image that is in the buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Window {
    /// Where in the image it begins.
    start: u64,
    /// Its size in bytes: whole blocks, unless it is in the tail.
    len: usize,
    /// Where in it the data of the request is.
    data: Range<usize>,
    /// Whether it is written to the tail.
    is_tail: bool,
}

impl Window {
    /// The first window of a request for `len` bytes at `offset` of an image with this tail.
    fn new(
        alignment: &Alignment,
        tail: u64,
        offset: u64,
        len: usize,
        capacity: usize,
        writes: bool,
    ) -> Window {
        if writes && offset >= tail {
            let len = len.min(capacity);
            return Window {
                start: offset,
                len,
                data: 0..len,
                is_tail: true,
            };
        }
        let request_end = offset + len as u64;
        let start = alignment.block_start(offset);
        let mut end = alignment
            .block_end(request_end)
            .min(start + capacity as u64);
        if writes {
            end = end.min(tail);
        }
        let place = |position: u64| (position - start) as usize;
        Window {
            start,
            len: place(end),
            data: place(offset)..place(request_end.min(end)),
            is_tail: false,
        }
    }

    /// Whether it contains more than the data of the request.
    fn has_others(&self) -> bool {
        self.data != (0..self.len)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// There is no window.
    Idle,
    /// The window is read for the request.
    Read,
    /// The window is read to be changed; `done` bytes have been read already.
    Fill { done: usize },
    /// The window is written.
    Write,
}

/// An operation on an image that [`Bounce`] wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The file to use.
    pub access: Access,
    /// Whether it is a write.
    pub writes: bool,
    /// Offset in the image.
    pub offset: u64,
    /// The bytes of the buffer that are read or written.
    pub bytes: Range<usize>,
}

/// A buffer, and the progress of the request that uses it.
#[derive(Debug)]
pub struct Bounce {
    alignment: Alignment,
    /// Larger than the buffer, so that the buffer can be aligned within it.
    memory: Vec<u8>,
    /// Where in it the buffer begins.
    start: usize,
    window: Window,
    phase: Phase,
}

impl Bounce {
    /// Makes a buffer for requests of up to `wanted` bytes, or for a part of such a request at a time.
    pub(super) fn new(alignment: Alignment, wanted: usize) -> Bounce {
        let block = alignment.offset as usize;
        // A request that begins within a block touches one block more than its size alone would.
        let capacity = wanted
            .saturating_add(block)
            .min(BUFFER_SIZE)
            .next_multiple_of(block);
        let memory = vec![0; capacity + alignment.memory];
        let address = memory.as_ptr().addr();
        Bounce {
            alignment,
            start: address.next_multiple_of(alignment.memory) - address,
            memory,
            window: Window {
                start: 0,
                len: 0,
                data: 0..0,
                is_tail: false,
            },
            phase: Phase::Idle,
        }
    }

    fn capacity(&self) -> usize {
        self.memory.len() - self.alignment.memory
    }

    /// Returns a part of the buffer.
    pub(super) fn bytes(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.memory[self.start..][range]
    }

    /// Forgets the request.
    pub fn reset(&mut self) {
        self.phase = Phase::Idle;
    }

    /// Returns what to do next for a request that has `data` left, from `offset` on. The caller does the step
    /// again if it is interrupted; otherwise it tells [`Bounce::advance`] how much was transferred.
    pub(super) fn step(
        &mut self,
        image: &impl Blocks,
        data: &impl Data,
        offset: u64,
        writes: bool,
    ) -> Step {
        if self.phase == Phase::Idle {
            let capacity = self.capacity();
            let tail = image.tail();
            self.window = Window::new(&self.alignment, tail, offset, data.len(), capacity, writes);
            match (writes, self.window.has_others()) {
                (false, _) => self.phase = Phase::Read,
                (true, true) => self.phase = Phase::Fill { done: 0 },
                (true, false) => self.change(data),
            }
        }
        let Window {
            start,
            len,
            is_tail,
            ..
        } = self.window;
        let (writes, done) = match self.phase {
            Phase::Fill { done } => (false, done),
            phase => (phase == Phase::Write, 0),
        };
        Step {
            access: if is_tail { Access::Tail } else { Access::Usual },
            writes,
            offset: start + done as u64,
            bytes: done..len,
        }
    }

    /// Returns the address of a step's bytes, which do not move until the buffer is dropped.
    pub fn pointer(&mut self, step: &Step) -> *mut u8 {
        self.bytes(step.bytes.clone()).as_mut_ptr()
    }

    /// Copies the data of the request into the window, which is written next.
    fn change(&mut self, data: &impl Data) {
        let range = self.window.data.clone();
        data.peek(self.bytes(range));
        self.phase = Phase::Write;
    }

    /// Takes account of a step that has transferred `count` bytes. Returns how many bytes of the request this
    /// completes, which are dropped from `data`; zero if another step must come first.
    ///
    /// # Errors
    /// If the image ends before the request does, or a block is repeatedly transferred only in part.
    pub(super) fn advance(
        &mut self,
        image: &impl Blocks,
        data: &mut impl Data,
        count: usize,
    ) -> io::Result<usize> {
        let Range { start, end } = self.window.data;
        match self.phase {
            Phase::Idle => Ok(0),
            Phase::Fill { done } => {
                self.fill(image, data, done + count)?;
                Ok(0)
            }
            phase => {
                self.phase = Phase::Idle;
                let end = count.min(end);
                if end <= start {
                    return Err(match phase {
                        Phase::Write => io::ErrorKind::WriteZero.into(),
                        _ => io::ErrorKind::UnexpectedEof.into(),
                    });
                }
                match phase {
                    Phase::Write => data.advance(end - start),
                    _ => data.put(self.bytes(start..end)),
                }
                Ok(end - start)
            }
        }
    }

    /// Takes account of the first `reached` bytes of the window having been read.
    fn fill(&mut self, image: &impl Blocks, data: &impl Data, reached: usize) -> io::Result<()> {
        let Phase::Fill { done } = self.phase else {
            return Ok(());
        };
        let len = self.window.len;
        if reached < len {
            // An image that was truncated becomes longer again.
            if self.window.start + reached as u64 >= image.current_size()? {
                self.bytes(reached..len).fill(0);
            } else {
                let unit = self.alignment.memory.max(self.alignment.offset as usize);
                let again = reached & !(unit - 1);
                if again <= done {
                    self.phase = Phase::Idle;
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.phase = Phase::Fill { done: again };
                return Ok(());
            }
        }
        self.change(data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = 4096;

    proptest! {
        #[test]
        fn windows_are_whole_blocks_and_cover_a_request(
            offset in 0..20 * BLOCK,
            len in 1..20 * BLOCK as usize,
            tail in 0..20_u64,
            capacity in 1..8_usize,
            writes: bool,
        ) {
            let alignment = Alignment { offset: BLOCK, memory: 512 };
            let capacity = capacity * BLOCK as usize;
            let tail = tail * BLOCK;
            let (mut position, mut left) = (offset, len);
            while left > 0 {
                let window = Window::new(&alignment, tail, position, left, capacity, writes);
                prop_assert!(window.len <= capacity);
                prop_assert!(!window.data.is_empty() && window.data.end <= window.len);
                prop_assert_eq!(window.start + window.data.start as u64, position);
                if window.is_tail {
                    prop_assert!(writes && position >= tail && !window.has_others());
                } else {
                    prop_assert!(window.start.is_multiple_of(BLOCK));
                    prop_assert!((window.len as u64).is_multiple_of(BLOCK));
                    prop_assert!(!writes || window.start + window.len as u64 <= tail);
                }
                position += window.data.len() as u64;
                left -= window.data.len();
            }
            prop_assert_eq!(position, offset + len as u64);
        }

        #[test]
        fn a_buffer_is_aligned(wanted in 0..(1_usize << 22), offset in 9..17_u32, memory in 0..13_u32) {
            let alignment = Alignment { offset: 1_u64 << offset, memory: 1_usize << memory };
            let mut bounce = Bounce::new(alignment, wanted);
            prop_assert!(bounce.capacity() <= BUFFER_SIZE.max(alignment.offset as usize));
            prop_assert!(bounce.capacity().is_multiple_of(alignment.offset as usize));
            let capacity = bounce.capacity();
            let address = bounce.bytes(0..capacity).as_ptr().addr();
            prop_assert!(address.is_multiple_of(alignment.memory));
        }
    }
}
