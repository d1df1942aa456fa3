//! A raw image: the file is the disk.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::{BlockStatus, Content, Direction, Extent, Image, ImageFile};

const SECTOR: u64 = 512;

/// A file whose bytes are those of the disk.
#[derive(Debug)]
pub struct RawImage {
    file: Arc<dyn ImageFile>,
    size: u64,
    read_only: bool,
}

impl RawImage {
    /// Uses `file` as a disk. If it ends within a sector, the rest of the sector reads as zeroes.
    ///
    /// # Errors
    /// If the file cannot be measured.
    pub fn new(file: Arc<dyn ImageFile>, read_only: bool) -> io::Result<RawImage> {
        let size = file.size()?;
        let size = size
            .checked_next_multiple_of(SECTOR)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(RawImage::with_size(file, size, read_only))
    }

    /// Uses the first `size` bytes of `file` as a disk. What is missing in the file reads as zeroes.
    pub(crate) fn with_size(file: Arc<dyn ImageFile>, size: u64, read_only: bool) -> RawImage {
        RawImage {
            file,
            size,
            read_only,
        }
    }

    fn check(&self, range: &Range<u64>, direction: Direction) -> io::Result<()> {
        if range.start > range.end || range.end > self.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match direction {
            Direction::Write if self.read_only => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            _ => Ok(()),
        }
    }
}

/// Returns the range of `len` bytes from `offset` on.
fn range(offset: u64, len: usize) -> io::Result<Range<u64>> {
    let end = offset.checked_add(len as u64);
    Ok(offset..end.ok_or(io::ErrorKind::InvalidInput)?)
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, range: Range<u64>, _: Direction) -> Extent {
        Extent::File {
            file: 0,
            offset: range.start,
            len: range.end.saturating_sub(range.start),
        }
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(&range(offset, bytes.len())?, Direction::Read)?;
        self.file.read_data(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check(&range(offset, bytes.len())?, Direction::Write)?;
        self.file.write_data(bytes, offset)
    }

    fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> io::Result<()> {
        self.check(&range, Direction::Write)?;
        if unmap {
            match self.file.punch_hole(range.clone()) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                result => return result,
            }
        }
        self.file.write_zeroes(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.check(&range, Direction::Write)?;
        match self.file.punch_hole(range) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn status(&self, range: Range<u64>) -> io::Result<BlockStatus> {
        self.check(&range, Direction::Read)?;
        let offset = range.start;
        let (hole, len) = self.file.next_run(range)?;
        let content = match hole {
            true => Content::Hole { file: 0, offset },
            false => Content::Data { file: 0, offset },
        };
        Ok(BlockStatus {
            len,
            content,
            depth: Some(0),
        })
    }
}
