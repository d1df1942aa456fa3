//! Writes the memory file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use bantam_memory::{GuestBuffers, GuestMemory, PAGE_SIZE, PageSet};
use vm_memory::{Bytes, GuestAddress};

use crate::facts::Facts;
use crate::memory_file::seal;
use crate::write_ring::WriteRing;
use crate::{MemoryFile, NewFile, SnapshotError, merge};

/// Most bytes of one write.
const MAX_WRITE: usize = 1 << 20;
/// Most bytes for which blocks are chosen at once. No write begins while they are looked through for pages of zeroes.
const MAX_EXTENT: usize = 16 << 20;
/// From this many adjacent bytes on, blocks are chosen before they are written.
const ALLOCATE_FROM: usize = 256 << 10;
/// From this many bytes on, they are written past the page cache. For less, the wait for each write counts more than the
/// copy that is saved.
const DIRECT_FROM: usize = 16 << 20;

/// A memory file that is being written.
pub struct MemoryWriter {
    file: NewFile,
    facts: Facts,
    /// Whether pages of zeroes are written as others are, because they differ from what would be there without them.
    writes_zeroes: bool,
}

/// Pages of a paused guest that were copied, to be written while the guest goes on.
pub struct CopiedPages {
    pages: PageSet,
    bytes: Vec<u8>,
}

impl CopiedPages {
    /// Copies `pages` of `memory`.
    ///
    /// # Errors
    /// If one of them is not in memory.
    pub fn copy(memory: &GuestMemory, pages: PageSet) -> io::Result<CopiedPages> {
        let mut bytes = vec![0; pages.len() * PAGE_SIZE];
        let mut rest = &mut *bytes;
        for (address, len) in pages.runs(usize::MAX) {
            let Some((run, others)) = rest.split_at_mut_checked(len) else {
                break;
            };
            memory.read_slice(run, address).map_err(io::Error::other)?;
            rest = others;
        }
        Ok(CopiedPages { pages, bytes })
    }

    /// Returns which pages those are.
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }
}

impl MemoryWriter {
    /// Creates the memory file at `path`, which appears there when it has been put in place.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(path: &Path, facts: &Facts) -> Result<MemoryWriter, SnapshotError> {
        let file = NewFile::create(path)?;
        // Until it has its seal, it is too short.
        file.file()
            .set_len(facts.memory_size())
            .map_err(SnapshotError::write(path))?;
        Ok(MemoryWriter {
            file,
            facts: facts.clone(),
            writes_zeroes: facts.base.is_some(),
        })
    }

    /// Has pages of zeroes written in a full snapshot too, as the pages of the file are to replace those of another.
    #[must_use]
    pub fn writing_zeroes(self) -> MemoryWriter {
        MemoryWriter {
            writes_zeroes: true,
            ..self
        }
    }

    /// Copies pages of an earlier snapshot of the same memory, besides those in `except`: those in `pages`, or all of it.
    ///
    /// # Errors
    /// If they cannot be read or written.
    pub fn copy(
        &self,
        earlier: &MemoryFile,
        pages: Option<PageSet>,
        except: &PageSet,
    ) -> Result<(), SnapshotError> {
        let mut pages = match pages {
            Some(pages) => pages,
            None => earlier
                .data_pages()
                .map_err(SnapshotError::read(earlier.path()))?,
        };
        pages.subtract(except);
        merge::copy(earlier.file(), self.file(), &self.facts, &pages)
            .map_err(SnapshotError::write(self.file.path()))
    }

    pub(crate) fn file(&self) -> &File {
        self.file.file()
    }

    /// Writes the `pages` of `memory`. If the pages of a full snapshot are all zero, they are left out, as they are
    /// holes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, memory: &Arc<GuestMemory>, pages: &PageSet) -> Result<(), SnapshotError> {
        self.write_pages(memory, pages)
            .map_err(SnapshotError::write(self.file.path()))
    }

    fn write_pages(&self, memory: &Arc<GuestMemory>, pages: &PageSet) -> io::Result<()> {
        let direct = match pages.len() * PAGE_SIZE >= DIRECT_FROM {
            // File systems such as tmpfs may refuse it.
            true => OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(self.file.temporary())
                .ok(),
            false => None,
        };
        let mut ring = WriteRing::new(direct.as_ref().unwrap_or(self.file.file()));
        for (address, len) in pages.runs(MAX_EXTENT) {
            // In a differential snapshot, for example, a page of zeroes differs from one that is not there.
            if self.writes_zeroes {
                self.begin(&mut ring, memory, address, len)?;
                continue;
            }
            let end = address.0 + len as u64;
            let mut page = address.0;
            while page < end {
                let is_zero = |page: &u64| memory.is_zero_page(GuestAddress(*page));
                let mut next = (page..end).step_by(PAGE_SIZE);
                let Some(first) = next.find(|page| !is_zero(page)) else {
                    break;
                };
                let last = next.find(is_zero).unwrap_or(end);
                self.begin(
                    &mut ring,
                    memory,
                    GuestAddress(first),
                    (last - first) as usize,
                )?;
                page = last;
            }
        }
        ring.finish()
    }

    /// Begins to write `len` bytes of memory.
    fn begin(
        &self,
        ring: &mut WriteRing<'_>,
        memory: &Arc<GuestMemory>,
        address: GuestAddress,
        len: usize,
    ) -> io::Result<()> {
        let offset = self.offset_of(address, len)?;
        if len >= ALLOCATE_FROM {
            self.allocate(offset, len);
        }
        for start in (0..len).step_by(MAX_WRITE) {
            let len = MAX_WRITE.min(len - start);
            let mut buffers = GuestBuffers::new(memory.clone());
            buffers
                .push(GuestAddress(address.0 + start as u64), len as u32)
                .map_err(io::Error::other)?;
            ring.write(buffers, offset + start as u64)?;
        }
        Ok(())
    }

    /// Has the file system choose blocks for `len` bytes at `offset`. Otherwise each write past the page cache waits for
    /// the one before, as it changes where the file has blocks. A file system that cannot do this chooses at each write.
    fn allocate(&self, offset: u64, len: usize) {
        let descriptor = self.file.file().as_raw_fd();
        // SAFETY: the call takes integers only.
        let _ = unsafe { libc::fallocate(descriptor, 0, offset as i64, len as i64) };
    }

    fn offset_of(&self, address: GuestAddress, len: usize) -> io::Result<u64> {
        let offset = self.facts.offset_of(address, len);
        offset.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Writes pages that were copied.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_copied(&self, copied: &CopiedPages) -> Result<(), SnapshotError> {
        let failed = SnapshotError::write(self.file.path());
        let mut rest = &*copied.bytes;
        let write = |(address, len): (GuestAddress, usize)| {
            let Some((run, others)) = rest.split_at_checked(len) else {
                return Ok(());
            };
            rest = others;
            let offset = self.offset_of(address, len)?;
            self.file.file().write_all_at(run, offset)
        };
        let mut runs = copied.pages.runs(usize::MAX);
        runs.try_for_each(write).map_err(failed)
    }

    /// Seals the file. It can then be put in its place.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn finish(self) -> Result<NewFile, SnapshotError> {
        let end = self.facts.memory_size();
        let written = self.file.file().write_all_at(&seal(self.facts.id), end);
        written.map_err(SnapshotError::write(self.file.path()))?;
        Ok(self.file)
    }
}
