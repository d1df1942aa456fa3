//! Files of an image that are open for access past the page cache too.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use bantam_memory::GuestBuffers;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::file::file_size;
use crate::raw::{Access, Alignment, Blocks, SECTOR_SIZE, Written, bounce_all};

/// A file that is open with `O_DIRECT`.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: File,
    alignment: Alignment,
}

impl DirectFile {
    /// Uses `file`, which is open with `O_DIRECT` and takes requests of this alignment.
    pub(crate) fn new(file: File, alignment: Alignment) -> DirectFile {
        DirectFile { file, alignment }
    }

    pub(crate) fn try_clone(&self) -> io::Result<DirectFile> {
        Ok(DirectFile {
            file: self.file.try_clone()?,
            alignment: self.alignment,
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Reads the bytes from `offset` on. Bytes beyond the end of the file read as zeroes.
    ///
    /// # Errors
    /// If the host cannot read them.
    pub(crate) fn read_at(&self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        while self.takes(bytes, offset) {
            match self.file.read_at(bytes, offset) {
                Ok(0) => {
                    bytes.fill(0);
                    return Ok(());
                }
                Ok(count) => {
                    bytes = &mut bytes[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let size = file_size(&self.file)?;
        let there = (bytes.len() as u64).min(size.saturating_sub(offset)) as usize;
        let (mut bytes, beyond) = bytes.split_at_mut(there);
        beyond.fill(0);
        let blocks = Measured {
            direct: self,
            cached: &self.file,
            size,
        };
        bounce_all(&blocks, &mut bytes, offset, false)
    }

    /// Writes `bytes` to `offset`. A block that they cover in part is read, changed and written, and nobody else may
    /// write to it meanwhile. If such a block is not all within the file, they are written to `cached`, the same file
    /// through the page cache, so that the file does not end behind them.
    ///
    /// # Errors
    /// If the host cannot write all of them.
    pub(crate) fn write_at(
        &self,
        mut bytes: &[u8],
        mut offset: u64,
        cached: &File,
    ) -> io::Result<()> {
        while self.takes(bytes, offset) {
            match self.file.write_at(bytes, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    bytes = &bytes[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let blocks = Measured {
            direct: self,
            cached,
            size: file_size(&self.file)?,
        };
        bounce_all(&blocks, &mut Written(bytes), offset, true)
    }

    /// Whether a transfer between `offset` and `bytes`, which are not empty, can be done as it is.
    fn takes(&self, bytes: &[u8], offset: u64) -> bool {
        let Alignment {
            offset: block,
            memory,
        } = self.alignment;
        !bytes.is_empty()
            && offset.is_multiple_of(block)
            && (bytes.len() as u64).is_multiple_of(block)
            && bytes.as_ptr().addr().is_multiple_of(memory)
    }
}

/// Has reads through the page cache bring nothing else into it: it would become stale when it is written past the
/// cache.
pub(crate) fn read_nothing_ahead(file: &File) -> io::Result<()> {
    let advice = PosixFadviseAdvice::POSIX_FADV_RANDOM;
    Ok(posix_fadvise(file, 0, 0, advice)?)
}

/// A file and its size.
struct Measured<'a> {
    direct: &'a DirectFile,
    cached: &'a File,
    size: u64,
}

impl Blocks for Measured<'_> {
    fn alignment(&self) -> Alignment {
        self.direct.alignment
    }

    fn tail(&self) -> u64 {
        self.direct.alignment.tail(self.size)
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn file(&self, access: Access) -> Option<&File> {
        match access {
            Access::Usual => Some(&self.direct.file),
            Access::Tail => Some(self.cached),
        }
    }
}

/// A file that an image is kept in, open through the page cache, and past it if the cache mode asks for that.
///
/// Then the bytes of the disk go past the page cache, and what else an image needs, its tables, through it. The two
/// never share a page, as a write past the cache and one through it to the same page can undo each other.
#[derive(Debug)]
pub struct LayerFile {
    pub(crate) cached: File,
    pub(crate) direct: Option<DirectFile>,
    /// Whether the lock of the image, if it has one, is that of the direct file, and not of the other.
    is_direct_locked: bool,
}

impl From<File> for LayerFile {
    /// All access goes through the page cache.
    fn from(cached: File) -> LayerFile {
        LayerFile {
            cached,
            direct: None,
            is_direct_locked: false,
        }
    }
}

impl LayerFile {
    /// Goes past the page cache by `direct` for the bytes of the disk. `cached` is the same file, which has the lock of
    /// the image.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub(crate) fn locked_beside(cached: File, direct: DirectFile) -> io::Result<LayerFile> {
        read_nothing_ahead(&cached)?;
        Ok(LayerFile {
            cached,
            direct: Some(direct),
            is_direct_locked: false,
        })
    }

    /// Goes past the page cache by `direct`, which has the lock of the image, for the bytes of the disk. `cached` is the
    /// same file.
    ///
    /// # Errors
    /// If it cannot be set up.
    pub(crate) fn beside_locked(cached: File, direct: DirectFile) -> io::Result<LayerFile> {
        Ok(LayerFile {
            is_direct_locked: true,
            ..LayerFile::locked_beside(cached, direct)?
        })
    }

    /// Returns the file that has the lock of the image.
    pub(crate) fn locked(&self) -> &File {
        match &self.direct {
            Some(direct) if self.is_direct_locked => direct.file(),
            _ => &self.cached,
        }
    }

    /// Duplicates the descriptors.
    ///
    /// # Errors
    /// If the process has too many.
    pub fn try_clone(&self) -> io::Result<LayerFile> {
        let direct = self.direct.as_ref().map(DirectFile::try_clone);
        Ok(LayerFile {
            cached: self.cached.try_clone()?,
            direct: direct.transpose()?,
            is_direct_locked: self.is_direct_locked,
        })
    }

    /// Returns the file for transfers of bytes of the disk.
    pub fn for_transfers(&self) -> &File {
        self.direct.as_ref().map_or(&self.cached, DirectFile::file)
    }

    /// Whether a transfer between `offset` of the file and `buffers` can be done as it is.
    pub fn takes(&self, buffers: &GuestBuffers, offset: u64) -> bool {
        let Some(direct) = &self.direct else {
            return true;
        };
        let Alignment {
            offset: block,
            memory,
        } = direct.alignment;
        offset.is_multiple_of(block) && buffers.are_aligned(memory, block as usize)
    }

    /// Returns the blocks that a write to `range` reads or writes, and whether it covers all of them, as
    /// [`DiskFile::block_span`](crate::DiskFile::block_span) does.
    pub(crate) fn block_span(&self, range: &Range<u64>) -> Option<(Range<u64>, bool)> {
        let alignment = self.direct.as_ref()?.alignment;
        (alignment.offset > SECTOR_SIZE).then(|| {
            let span = alignment.blocks_around(range);
            (span, alignment.covers_blocks(range))
        })
    }
}

impl AsFd for LayerFile {
    /// Returns the descriptor of [`LayerFile::for_transfers`].
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.for_transfers().as_fd()
    }
}
