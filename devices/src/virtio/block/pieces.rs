//! A transfer between guest memory and an image that is not raw. It is done in pieces, one after the other,
//! as the bytes of the disk may be in several places and files.

use std::io;
use std::mem;
use std::os::fd::AsFd;

use bantam_memory::{FilePosition, GuestBuffers};
use bantam_storage::{Direction as MapDirection, Extent, FormattedDisk, LayerFile};

use super::request::Outcome;
use super::ring::Direction;
use crate::virtio::Chain;

/// The progress of a transfer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pieces {
    pub(super) direction: Direction,
    /// Where on the disk the bytes are that are left.
    pub(super) offset: u64,
    piece: Piece,
    /// Whether the image should be prepared for later writes, as it has found a place for these.
    pub(super) should_prepare: bool,
}

/// What is to be done next. The buffers of the chain are those of the piece; those after it are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// It has to be found out.
    Unknown,
    /// Bytes of this file of the image are transferred.
    File { file: u32, offset: u64 },
    /// The image itself transfers this many bytes.
    Slow { len: usize },
    /// What was written is brought to stable storage.
    Flush,
    /// Nothing.
    End,
}

impl Pieces {
    pub(super) fn new(direction: Direction, offset: u64) -> Pieces {
        Pieces {
            direction,
            offset,
            piece: Piece::Unknown,
            should_prepare: false,
        }
    }

    /// Returns the piece that is under way.
    pub(super) fn piece(&self) -> Piece {
        self.piece
    }

    /// Returns what is to be done next, apart from zeroes, which are filled in here. `rest` has the buffers
    /// after the piece. `allocates` says whether the image may find places for writes at once.
    pub(super) fn next(
        &mut self,
        disk: &FormattedDisk,
        chain: &mut Chain,
        rest: &mut GuestBuffers,
        allocates: bool,
    ) -> Piece {
        let buffers = self.direction.buffers_mut(chain);
        // A file that has transferred only a part goes on, unless it does not take the rest as it is.
        self.piece = match self.piece {
            Piece::File { file, offset } if !buffers.is_empty() => {
                match takes(disk, file, buffers, offset) {
                    true => self.piece,
                    false => Piece::Slow { len: buffers.len() },
                }
            }
            _ => self.choose(disk, buffers, rest, allocates),
        };
        self.piece
    }

    fn choose(
        &mut self,
        disk: &FormattedDisk,
        buffers: &mut GuestBuffers,
        rest: &mut GuestBuffers,
        allocates: bool,
    ) -> Piece {
        loop {
            if buffers.is_empty() {
                mem::swap(buffers, rest);
            }
            if buffers.is_empty() {
                return match (self.direction, self.piece) {
                    (Direction::Write { durable: true }, piece) if piece != Piece::Flush => {
                        Piece::Flush
                    }
                    _ => Piece::End,
                };
            }
            let wanted = self.offset..self.offset + buffers.len() as u64;
            let direction = match self.direction {
                Direction::Read => MapDirection::Read,
                Direction::Write { .. } => MapDirection::Write,
            };
            let mut extent = disk.image().map(wanted, direction);
            if let (Extent::Slow { len }, MapDirection::Write, true) =
                (extent, direction, allocates)
                && let Some(found) = disk.image().allocate(self.offset..self.offset + len)
            {
                extent = found.extent;
                self.should_prepare |= found.should_prepare;
            }
            let (Extent::File { len, .. } | Extent::Zeroes { len } | Extent::Slow { len }) = extent;
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if len < buffers.len() {
                buffers.move_front(len, rest);
                mem::swap(buffers, rest);
            }
            let len = buffers.len();
            match extent {
                Extent::File { file, offset, .. } if takes(disk, file as u32, buffers, offset) => {
                    let file = file as u32;
                    return Piece::File { file, offset };
                }
                Extent::Zeroes { .. } if direction == MapDirection::Read => {
                    fill_with_zeroes(buffers);
                    self.offset += len as u64;
                }
                _ => return Piece::Slow { len },
            }
        }
    }

    /// Transfers the present piece, which is of one of `files`, by system calls with these flags.
    ///
    /// # Errors
    /// Those of `preadv2` and `pwritev2`. A part may have been transferred then.
    pub(super) fn transfer(
        &mut self,
        files: &[LayerFile],
        chain: &mut Chain,
        flags: libc::c_int,
    ) -> io::Result<()> {
        let call = match self.direction {
            Direction::Read => GuestBuffers::read_from,
            Direction::Write { .. } => GuestBuffers::write_to,
        };
        let buffers = self.direction.buffers_mut(chain);
        while let Piece::File { file, offset } = self.piece
            && !buffers.is_empty()
        {
            let position = FilePosition { offset, flags };
            match call(buffers, files[file as usize].as_fd(), Some(position)) {
                Ok(count) => self.moved(buffers, count)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes account of `count` bytes that the ring has transferred between `chain` and the file of the
    /// present piece. Returns the outcome of the request, unless there is more to do.
    pub(super) fn advance(
        &mut self,
        chain: &mut Chain,
        rest: &GuestBuffers,
        count: usize,
    ) -> Outcome {
        let buffers = self.direction.buffers_mut(chain);
        buffers.advance(count);
        let flushes = self.direction == Direction::Write { durable: true };
        match self.moved(buffers, count) {
            Ok(()) if buffers.is_empty() && rest.is_empty() && !flushes => Some(Ok(())),
            Ok(()) => None,
            Err(error) => Some(Err(error.into())),
        }
    }

    /// Takes account of `count` bytes that a file has transferred, which are no longer in `buffers`. A file
    /// that ends reads as zeroes from there on.
    fn moved(&mut self, buffers: &mut GuestBuffers, count: usize) -> io::Result<()> {
        let mut count = count as u64;
        if count == 0 && !buffers.is_empty() {
            if self.direction != Direction::Read {
                return Err(io::ErrorKind::WriteZero.into());
            }
            count = buffers.len() as u64;
            fill_with_zeroes(buffers);
        }
        self.offset += count;
        if let Piece::File { offset, .. } = &mut self.piece {
            *offset += count;
        }
        Ok(())
    }

    /// Takes account of what the thread of the image has done.
    pub(super) fn slow_piece_is_done(&mut self) {
        if let Piece::Slow { len } = self.piece {
            self.offset += len as u64;
        }
    }
}

/// Whether a file of the disk, if it has one of this number, can transfer `buffers` as they are.
fn takes(disk: &FormattedDisk, file: u32, buffers: &GuestBuffers, offset: u64) -> bool {
    let file = disk.files().get(file as usize);
    file.is_some_and(|file| file.takes(buffers, offset))
}

fn fill_with_zeroes(buffers: &mut GuestBuffers) {
    let zeroes = [0; 4096];
    while !buffers.is_empty() {
        buffers.write(&zeroes[..buffers.len().min(zeroes.len())]);
    }
}
