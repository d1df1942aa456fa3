//! A raw image below another, which reads from it what it does not have itself.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{Access, DiskFile};
use crate::image::{BlockStatus, Content, Direction, Extent, Image};

/// A raw image that is only read, by way of the page cache.
#[derive(Debug)]
pub(crate) struct RawBacking(pub(crate) DiskFile);

impl RawBacking {
    fn check(&self, range: &Range<u64>) -> io::Result<()> {
        if range.start > range.end || range.end > self.0.size() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

impl Image for RawBacking {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn map(&self, range: Range<u64>, direction: Direction) -> Extent {
        let len = range.end - range.start;
        match direction {
            Direction::Read => Extent::File {
                file: 0,
                offset: range.start,
                len,
            },
            Direction::Write => Extent::Slow { len },
        }
    }

    fn read_at(&self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        self.check(&(offset..offset.saturating_add(bytes.len() as u64)))?;
        let file = self.0.file(Access::Usual);
        let file = file.ok_or(io::ErrorKind::UnexpectedEof)?;
        while !bytes.is_empty() {
            match file.read_at(bytes, offset) {
                // The last block of the disk may be larger than what is left of the file.
                Ok(0) => {
                    bytes.fill(0);
                    break;
                }
                Ok(count) => {
                    bytes = &mut bytes[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn write_zeroes(&self, _: Range<u64>, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn status(&self, range: Range<u64>) -> io::Result<BlockStatus> {
        self.check(&range)?;
        Ok(BlockStatus {
            len: range.end - range.start,
            content: Content::Data {
                file: 0,
                offset: range.start,
            },
            depth: Some(0),
        })
    }
}
