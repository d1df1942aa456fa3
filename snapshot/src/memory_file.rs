//! The memory file.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bantam_memory::{FilePosition, GuestBuffers, GuestMemory, Layer, MapError, PAGE_SIZE, PageSet};
use vm_memory::GuestAddress;

use crate::facts::{Facts, SnapshotId};
use crate::{SnapshotError, StateFile};

const MAGIC: [u8; 8] = *b"BANTAMSM";
/// Version of the format of the seal.
const FORMAT: u32 = 1;
/// Offset of the id in the seal, after magic number and format.
const ID: usize = 12;
const SEAL_LEN: usize = ID + 16;
/// Most bytes that are read at once.
const MAX_READ: usize = 1 << 20;

/// Returns the seal of the memory of snapshot `id`, a page at the end of the memory file.
pub(crate) fn seal(id: SnapshotId) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    page[..MAGIC.len()].copy_from_slice(&MAGIC);
    page[MAGIC.len()..ID].copy_from_slice(&FORMAT.to_le_bytes());
    page[ID..SEAL_LEN].copy_from_slice(&id.0);
    page
}

/// The memory file of a snapshot, which is open for reading.
#[derive(Debug)]
pub struct MemoryFile {
    file: Arc<File>,
    path: PathBuf,
    facts: Facts,
    /// What the file was when it was opened.
    opened: Metadata,
}

impl MemoryFile {
    /// Opens the memory file at `path`, which belongs to `state`.
    ///
    /// # Errors
    /// If it cannot be read, has not the size of the memory, or belongs to another snapshot.
    pub fn open(path: &Path, state: &StateFile) -> Result<MemoryFile, SnapshotError> {
        let file = File::open(path).map_err(SnapshotError::read(path))?;
        MemoryFile::of(file, path, state.facts())
    }

    /// Takes over `file`, which errors call `path`, as the memory of the snapshot with these facts.
    ///
    /// # Errors
    /// Those of [`MemoryFile::open`].
    pub fn of(file: File, path: &Path, facts: &Facts) -> Result<MemoryFile, SnapshotError> {
        let wrong = |reason: String| SnapshotError::Memory {
            path: path.to_path_buf(),
            reason,
        };
        let opened = file.metadata().map_err(SnapshotError::read(path))?;
        let expected = facts.memory_size() + PAGE_SIZE as u64;
        if !opened.is_file() || opened.len() != expected {
            let size = opened.len();
            return Err(wrong(format!("it has {size} bytes instead of {expected}")));
        }
        let mut found = [0; SEAL_LEN];
        file.read_exact_at(&mut found, facts.memory_size())
            .map_err(SnapshotError::read(path))?;
        if found != seal(facts.id)[..SEAL_LEN] {
            let reason = match found.starts_with(&MAGIC) {
                true => "it is that of another snapshot",
                false => "its seal is missing",
            };
            return Err(wrong(reason.to_owned()));
        }
        Ok(MemoryFile {
            file: Arc::new(file),
            path: path.to_path_buf(),
            facts: facts.clone(),
            opened,
        })
    }

    /// Returns the path by which errors call it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the open file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    fn ranges(&self) -> Vec<(GuestAddress, usize)> {
        let regions = self.facts.regions.iter();
        regions
            .map(|&(start, len)| (GuestAddress(start), len as usize))
            .collect()
    }

    /// Maps the memory privately: its pages are read from the file when they are touched.
    ///
    /// The file must not change as long as the memory lives; see [`bantam_memory::Backing::PrivateFile`].
    ///
    /// # Errors
    /// If the host refuses.
    pub fn map(&self) -> Result<GuestMemory, MapError> {
        GuestMemory::from_file(&self.ranges(), self.file.clone())
    }

    /// Reads all pages into `memory`, which has the same regions and is all zero.
    ///
    /// # Errors
    /// Those of reading.
    pub fn read_into(&self, memory: &Arc<GuestMemory>) -> Result<(), SnapshotError> {
        let failed = SnapshotError::read(&self.path);
        self.read_pages_into(memory).map_err(failed)
    }

    fn read_pages_into(&self, memory: &Arc<GuestMemory>) -> io::Result<()> {
        for (address, len) in self.data_pages()?.runs(MAX_READ) {
            let outside = || io::Error::from(io::ErrorKind::InvalidInput);
            let mut offset = self.facts.offset_of(address, len).ok_or_else(outside)?;
            let mut buffers = GuestBuffers::new(memory.clone());
            buffers
                .push(address, len as u32)
                .map_err(io::Error::other)?;
            while !buffers.is_empty() {
                let position = FilePosition { offset, flags: 0 };
                match buffers.read_from(self.file.as_fd(), Some(position)) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(count) => offset += count as u64,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Returns whether the file has all pages of `state`, to which it belongs. The file of a differential snapshot has them
    /// after those of its base have been added; without witnesses, that is not known.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn is_complete(&self, state: &StateFile) -> Result<bool, SnapshotError> {
        let failed = SnapshotError::read(&self.path);
        if state.pages().is_none() {
            return Ok(true);
        }
        if state.witnesses().is_empty() {
            return Ok(false);
        }
        let mut present = state
            .witnesses()
            .iter()
            .map(|it| it.is_in(&self.file, &self.facts));
        let is_complete = present.try_fold(true, |all, one| Ok(all && one?));
        is_complete.map_err(failed)
    }

    /// Returns where each region of memory is in the file.
    pub fn layers(&self) -> Vec<Layer> {
        let places = self.facts.places();
        let layers = places.map(|place| Layer {
            start: GuestAddress(place.start),
            len: place.len,
            file: self.file.clone(),
            offset: place.offset,
        });
        layers.collect()
    }

    /// Reads the bytes of memory from `address` on, all in one region.
    ///
    /// # Errors
    /// Those of reading, or if the file is too short by now.
    pub fn read_at(&self, address: GuestAddress, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        let read = match self.facts.offset_of(address, bytes.len()) {
            Some(offset) => self.file.read_exact_at(bytes, offset),
            None => Err(io::ErrorKind::InvalidInput.into()),
        };
        read.map_err(SnapshotError::read(&self.path))
    }

    /// Has the host begin to read `len` bytes of memory from `address` on, all in one region, into its page cache.
    pub fn read_ahead(&self, address: GuestAddress, len: usize) {
        if let Some(offset) = self.facts.offset_of(address, len) {
            let (descriptor, offset) = (self.file.as_raw_fd(), offset as libc::off_t);
            let advice = libc::POSIX_FADV_WILLNEED;
            // SAFETY: the call takes integers only. It is advice: if the host does not take it, pages are read when they are
            // touched.
            let _ = unsafe { libc::posix_fadvise(descriptor, offset, len as libc::off_t, advice) };
        }
    }

    /// Adds to `pages` those of `len` bytes from `address` on, all in one region, for which the file has data.
    ///
    /// # Errors
    /// If the host does not say where the file has data.
    pub fn add_data(&self, pages: &mut PageSet, address: GuestAddress, len: u64) -> io::Result<()> {
        match self.facts.offset_of(address, len as usize) {
            Some(offset) => pages.add_data(&self.file, address, len, offset),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Returns the pages for which the file has data. The others are zero, or not in a differential snapshot.
    ///
    /// # Errors
    /// If the host does not say where the file has data.
    pub fn data_pages(&self) -> io::Result<PageSet> {
        let regions = self.facts.regions.iter();
        let mut pages = PageSet::empty(regions.map(|&(start, len)| (GuestAddress(start), len)));
        for place in self.facts.places() {
            let start = GuestAddress(place.start);
            pages.add_data(&self.file, start, place.len, place.offset)?;
        }
        Ok(pages)
    }

    /// Checks that the file is the one that was opened, as far as size and time of change tell.
    ///
    /// # Errors
    /// If it has been written or cut since.
    pub fn check_unchanged(&self) -> Result<(), SnapshotError> {
        let now = self
            .file
            .metadata()
            .map_err(SnapshotError::read(&self.path))?;
        let changes = |it: &Metadata| (it.len(), it.mtime(), it.mtime_nsec());
        if changes(&now) == changes(&self.opened) {
            return Ok(());
        }
        Err(SnapshotError::Memory {
            path: self.path.clone(),
            reason: "it has been changed since it was opened".to_owned(),
        })
    }
}
