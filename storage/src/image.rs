//! What a guest sees as a disk.

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::ops::Range;

/// Which way data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the image.
    Read,
    /// To the image.
    Write,
}

/// How the first bytes of a range can be transferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// They are `len` bytes of a file, which can be read or written there directly.
    File {
        /// Which of the image's files: 0 is the image itself, others are its backing files.
        file: usize,
        /// Where they begin in that file.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// They read as zeroes.
    Zeroes {
        /// Length in bytes.
        len: u64,
    },
    /// They need [`Image::read_at`] or [`Image::write_at`].
    Slow {
        /// Length in bytes.
        len: u64,
    },
}

/// A place that was found for bytes that are about to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Where the bytes can be written. It holds as long as an answer of [`Image::map`].
    pub extent: Extent,
    /// Whether [`Image::prepare`] should be called, so that there is room for the bytes that come later. Only one
    /// answer says so before that has succeeded.
    pub should_prepare: bool,
}

/// What a range of an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes that begin at `offset` of the file numbered `file`, as in [`Extent::File`].
    Data {
        /// Number of the file.
        file: usize,
        /// Where they begin in it.
        offset: u64,
    },
    /// A hole of the file numbered `file`, which begins at `offset` of it and reads as zeroes.
    Hole {
        /// Number of the file.
        file: usize,
        /// Where it begins in it.
        offset: u64,
    },
    /// Compressed bytes.
    Compressed,
    /// Zeroes.
    Zeroes,
}

/// What the first bytes of a range hold, and which layer says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockStatus {
    /// Length in bytes.
    pub len: u64,
    /// What they hold.
    pub content: Content,
    /// How many backing files deep the layer is that holds them. 0 is the image itself. `None` if no layer
    /// holds them, and they read as zeroes for that reason.
    pub depth: Option<usize>,
}

/// What a guest sees as a disk: a sequence of bytes that is read and written at any place.
///
/// All methods can be called from several threads at a time. Requests for the same bytes that run at the
/// same time take effect in any order. Offsets and lengths are in bytes and need no alignment. A range
/// beyond the end of the disk is an error ([`io::ErrorKind::InvalidInput`]).
pub trait Image: Any + Debug + Send + Sync {
    /// Returns the disk's size in bytes.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Returns how the first bytes of `range` can be transferred. Never waits for the host: if the place of
    /// the bytes is not known yet, the answer is [`Extent::Slow`].
    ///
    /// The answer holds until the next request that discards, or makes zeroes of, one of the bytes: who
    /// transfers data by it ends its transfers before it makes such a request.
    fn map(&self, range: Range<u64>, direction: Direction) -> Extent;

    /// Brings what [`Self::map`] needs for the byte at `offset` into the caches of the processor, as it will be asked
    /// soon. Waits for nothing.
    fn prefetch_map(&self, offset: u64) {
        let _ = offset;
    }

    /// Finds a place for the first bytes of `range`, which the caller is about to write, where [`Self::map`] knows
    /// none. Does no more on the host than a write of a few bytes to the page cache. `None`: they need
    /// [`Self::write_at`]. The bytes read as zeroes before and afterwards.
    fn allocate(&self, range: Range<u64>) -> Option<Allocation> {
        let _ = range;
        None
    }

    /// Prepares places for [`Self::allocate`], which it uses up. Waits for the host's storage.
    ///
    /// # Errors
    /// If the host has no room or cannot write, or the image is damaged. Later writes show whether that lasts.
    fn prepare(&self) -> io::Result<()> {
        Ok(())
    }

    /// Fills `bytes` with those from `offset` on.
    ///
    /// # Errors
    /// If the host cannot read them, or the image is damaged.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes `bytes` to `offset`.
    ///
    /// # Errors
    /// If the host cannot write all of them, the image is damaged, or read-only
    /// ([`io::ErrorKind::ReadOnlyFilesystem`]).
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes `range` read as zeroes; with `unmap`, by giving its storage back if that is possible.
    ///
    /// # Errors
    /// Those of [`Self::write_at`].
    fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> io::Result<()>;

    /// Gives the storage of `range` back as far as possible. What it reads as afterwards is not defined.
    ///
    /// # Errors
    /// Those of [`Self::write_at`].
    fn discard(&self, range: Range<u64>) -> io::Result<()>;

    /// Brings everything written so far to stable storage, including what was transferred by answers of
    /// [`Self::map`]. To sync the files is not enough for that: where the bytes are may be known in memory only.
    ///
    /// # Errors
    /// If the host has failed to write something.
    fn flush(&self) -> io::Result<()>;

    /// Brings everything to stable storage, as [`Self::flush`] does, and writes no more to the files. No request is
    /// under way, and later writes may be refused.
    ///
    /// # Errors
    /// Those of [`Self::flush`].
    fn end_writing(&self) -> io::Result<()> {
        self.flush()
    }

    /// Makes the disk larger, beside other requests. What is added reads as zeroes.
    ///
    /// # Errors
    /// If the disk is not smaller than `size`, or the image cannot have this size
    /// ([`io::ErrorKind::InvalidInput`]); otherwise those of [`Self::write_at`].
    fn grow(&self, size: u64) -> io::Result<()> {
        let _ = size;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Returns what the first bytes of `range` hold.
    ///
    /// # Errors
    /// Those of [`Self::read_at`].
    fn status(&self, range: Range<u64>) -> io::Result<BlockStatus>;
}
