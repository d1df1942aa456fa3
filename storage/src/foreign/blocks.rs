//! An image that keeps its disk in blocks, each in its own place of a file.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::damaged;
use crate::{BlockStatus, Content, Direction, Extent, Image, ImageFile};

/// A file of an image.
#[derive(Debug, Clone)]
pub struct SizedFile {
    /// The file.
    pub file: Arc<dyn ImageFile>,
    /// Its size in bytes when the image was opened.
    pub size: u64,
}

impl SizedFile {
    /// Measures `file`.
    pub fn new(file: Arc<dyn ImageFile>) -> io::Result<SizedFile> {
        let size = file.size()?;
        Ok(SizedFile { file, size })
    }
}

/// Where bytes of the disk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: they have never been written.
    Unallocated,
    /// Nowhere: the image says that they are zeroes.
    Zeroes,
    /// In a file.
    File {
        /// Number of the file.
        file: usize,
        /// Where they begin in it.
        offset: u64,
        /// Whether holes of the file tell which of them are zeroes.
        sparse: bool,
    },
    /// In a block that is compressed as a whole.
    Compressed {
        /// Number of the file.
        file: usize,
        /// Where the block begins in it.
        offset: u64,
        /// Where the bytes begin in the block.
        within: usize,
    },
}

/// What differs between the formats: where the blocks are.
pub trait Layout: Debug + Send + Sync {
    /// Returns where the byte at `offset` of the disk is, and how many bytes follow one another from there.
    fn place(&self, offset: u64) -> io::Result<(Place, u64)>;

    /// Reads the compressed block at `offset` of the file with this number and returns it decompressed.
    fn decompress(&self, file: usize, files: &[SizedFile], offset: u64) -> io::Result<Vec<u8>> {
        let _ = (file, files, offset);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An image in blocks, which is only read.
#[derive(Debug)]
pub struct BlockImage<L> {
    size: u64,
    files: Vec<SizedFile>,
    layout: L,
    /// The last block that was decompressed: a block is read in parts.
    decompressed: Mutex<Option<Decompressed>>,
}

#[derive(Debug)]
struct Decompressed {
    /// Where it is compressed: number of the file and offset in it.
    place: (usize, u64),
    bytes: Arc<[u8]>,
}

impl<L: Layout> BlockImage<L> {
    /// Makes an image of `size` bytes, whose blocks are in `files` as `layout` says.
    pub fn new(size: u64, files: Vec<SizedFile>, layout: L) -> BlockImage<L> {
        BlockImage {
            size,
            files,
            layout,
            decompressed: Mutex::new(None),
        }
    }

    /// Returns where the first bytes of `range` are and how many they are: at least one, unless `range` is
    /// empty.
    fn place(&self, range: &Range<u64>) -> io::Result<(Place, u64)> {
        let (place, len) = self.layout.place(range.start)?;
        let len = len.min(range.end - range.start);
        if len == 0 && !range.is_empty() {
            return Err(damaged("a block has no bytes"));
        }
        if let Place::File { file, offset, .. } = place {
            let end = offset.checked_add(len);
            if end.is_none_or(|end| end > self.files[file].size) {
                return Err(damaged("a block ends beyond the end of its file"));
            }
        }
        Ok((place, len))
    }

    fn decompressed(&self, file: usize, offset: u64) -> io::Result<Arc<[u8]>> {
        let last = || {
            self.decompressed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let place = (file, offset);
        if let Some(block) = last().as_ref().filter(|block| block.place == place) {
            return Ok(Arc::clone(&block.bytes));
        }
        let bytes = self.layout.decompress(file, &self.files, offset)?;
        let bytes: Arc<[u8]> = bytes.into();
        *last() = Some(Decompressed {
            place,
            bytes: Arc::clone(&bytes),
        });
        Ok(bytes)
    }

    fn check(&self, range: &Range<u64>) -> io::Result<()> {
        if range.start > range.end || range.end > self.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

impl<L: Layout + 'static> Image for BlockImage<L> {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn map(&self, range: Range<u64>, _: Direction) -> Extent {
        // The tables may have to be read to know more.
        Extent::Slow {
            len: range.end.saturating_sub(range.start),
        }
    }

    fn read_at(&self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        self.check(&(offset..end))?;
        while !bytes.is_empty() {
            let (place, len) = self.place(&(offset..end))?;
            let (now, later) = bytes.split_at_mut(len as usize);
            match place {
                Place::Unallocated | Place::Zeroes => now.fill(0),
                Place::File { file, offset, .. } => self.files[file].file.read_at(now, offset)?,
                Place::Compressed {
                    file,
                    offset,
                    within,
                } => {
                    let block = self.decompressed(file, offset)?;
                    let part = block.get(within..within + now.len());
                    now.copy_from_slice(part.ok_or_else(|| damaged("a block is too short"))?);
                }
            }
            bytes = later;
            offset += len;
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
        let (mut content, mut len, mut depth) = (Content::Zeroes, 0, Some(0));
        if range.is_empty() {
            return Ok(BlockStatus {
                len,
                content,
                depth,
            });
        }
        // Blocks that follow one another in the same way are one range.
        let mut position = range.start;
        let mut first: Option<Place> = None;
        let mut looked_at = 0;
        while position < range.end && looked_at < MAX_BLOCKS_OF_STATUS {
            let (place, run) = match self.place(&(position..range.end)) {
                Err(error) if first.is_none() => return Err(error),
                // The next request reports it.
                Err(_) => break,
                Ok(found) => found,
            };
            match first {
                None => first = Some(place),
                Some(first) if follows(first, len, place) => {}
                Some(_) => break,
            }
            len += run;
            position += run;
            looked_at += 1;
        }
        match first.unwrap_or(Place::Unallocated) {
            Place::Unallocated => depth = None,
            Place::Zeroes => {}
            Place::Compressed { .. } => content = Content::Compressed,
            Place::File {
                file,
                offset,
                sparse,
            } => {
                content = Content::Data { file, offset };
                if sparse {
                    let (hole, run) = self.files[file].file.next_run(offset..offset + len)?;
                    len = run;
                    if hole {
                        content = Content::Hole { file, offset };
                    }
                }
            }
        }
        Ok(BlockStatus {
            len,
            content,
            depth,
        })
    }
}

/// Bounds the time that one request for a status takes.
const MAX_BLOCKS_OF_STATUS: u32 = 4096;

/// Whether bytes at `next` continue those that begin at `first` and are `len` long.
fn follows(first: Place, len: u64, next: Place) -> bool {
    match (first, next) {
        (
            Place::File {
                file,
                offset,
                sparse,
            },
            Place::File {
                file: next_file,
                offset: next_offset,
                sparse: next_sparse,
            },
        ) => {
            file == next_file
                && sparse == next_sparse
                && offset.checked_add(len) == Some(next_offset)
        }
        (Place::Compressed { .. }, Place::Compressed { .. }) => true,
        (first, next) => first == next,
    }
}
