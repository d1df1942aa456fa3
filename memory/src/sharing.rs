//! Moves the content of guest memory to files in memory, from which other machines map it too.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::{Backing, FilePosition, GuestBuffers, GuestMemory, Layer, PageSet};

/// Name of the files, for people who look at the mappings of a process.
const NAME: &CStr = c"bantam-guest-memory";
/// Most bytes of one write.
const MAX_WRITE: usize = 1 << 20;
/// Most parts of memory that are mapped one by one. A process may have a thousand machines, but only 65,530 mappings; and the
/// host's kernel tells each machine of the process of each change of them.
const MAX_LAYERS: usize = 16;
/// Most parts that one file adds. Pages between those that were written are copied with them.
const MAX_PARTS: usize = 4;

/// Moves what guest memory has of its own to a file in memory, from which other machines map it too.
///
/// The machine can run while most of it is copied. [`Sharing::begin`] copies what there is, and [`Sharing::copy`] pages
/// that have been written meanwhile. [`Sharing::finish`] maps the memory from the file, so that it shares the pages until it
/// writes to them. What was moved to another file before stays there.
#[derive(Debug)]
pub struct Sharing {
    memory: Arc<GuestMemory>,
    /// The regions of memory, each with its place in the file.
    regions: Vec<Layer>,
    /// The pages that the file has the content of. All others are zero there.
    copied: PageSet,
    /// Whether it has the content of all pages, and not only of those that were written since the memory was last moved to
    /// a file.
    has_all: bool,
}

impl Sharing {
    /// Copies what `memory` has of its own to a file. Pages that are written meanwhile have to be copied again.
    ///
    /// # Errors
    /// If the host has too little memory, or refuses.
    pub fn begin(memory: &Arc<GuestMemory>) -> io::Result<Sharing> {
        let is_of_files = memory.backing() == Backing::PrivateFile && !memory.is_missing_pages();
        let pages = match is_of_files {
            true => memory.written_pages()?,
            false => memory.pages_with_content()?,
        };
        let file = Arc::new(file_in_memory(memory.size())?);
        let mut next = 0;
        let regions = memory.regions().map(|region| {
            let offset = next;
            next += region.len;
            Layer {
                start: region.start,
                len: region.len,
                file: file.clone(),
                offset,
            }
        });
        let mut sharing = Sharing {
            memory: memory.clone(),
            regions: regions.collect(),
            copied: PageSet::empty(memory.regions().map(|region| (region.start, region.len))),
            has_all: !is_of_files,
        };
        sharing.copy(&pages)?;
        Ok(sharing)
    }

    /// Copies `pages`, which have been written since they were copied, or for the first time.
    ///
    /// # Errors
    /// If the host has too little memory, or refuses.
    pub fn copy(&mut self, pages: &PageSet) -> io::Result<()> {
        let mut new = pages.clone();
        new.subtract(&self.copied);
        self.write(pages)?;
        if self.has_all || new.is_empty() {
            return Ok(());
        }
        let parts = self.parts();
        self.has_all = self.memory.layers().len() + 2 * parts.len() > MAX_LAYERS;
        let mut between = self.memory.pages_with_content()?;
        between.subtract(&self.copied);
        if !self.has_all {
            let mut in_parts = self.copied.clone();
            for (start, len) in parts {
                in_parts.insert_range(start, len);
            }
            between.retain(&in_parts);
            // What has no content is zero in the file too.
            self.copied = in_parts;
        }
        self.write(&between)
    }

    /// Maps the memory from the file, and returns the files from which all of its content is mapped. Memory of huge pages
    /// stays as it is.
    ///
    /// All pages that were written must have been copied. The caller makes sure that neither the guest nor a device has
    /// accessed the memory since, nor does so before this returns.
    ///
    /// # Errors
    /// If the host refuses. Some of the memory may be mapped from the file by then, which has the same content.
    pub fn finish(self) -> io::Result<Vec<Layer>> {
        let layers = match self.has_all {
            true => self.regions,
            false => {
                let parts = self.parts().into_iter();
                let layers = parts.filter_map(|(start, len)| self.layer(start, len as u64));
                layers.collect()
            }
        };
        match self.memory.put_layers(&layers) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(layers),
            Err(error) => Err(error),
            Ok(()) => Ok(self.memory.layers()),
        }
    }

    /// Returns a few parts of memory that have all copied pages, in ascending order, each with its address and its length in
    /// bytes. What is between them is as much as possible.
    fn parts(&self) -> Vec<(GuestAddress, usize)> {
        let runs: Vec<_> = self.copied.runs(usize::MAX).collect();
        // A part begins before each of these runs.
        let mut gaps: Vec<_> = runs
            .windows(2)
            .enumerate()
            .map(|(index, pair)| (pair[1].0.0 - pair[0].0.0 - pair[0].1 as u64, index + 1))
            .collect();
        gaps.sort_unstable_by(|one, other| other.cmp(one));
        gaps.truncate(MAX_PARTS - 1);
        let mut parts: Vec<(GuestAddress, usize)> = Vec::new();
        for (index, &(start, len)) in runs.iter().enumerate() {
            let begins = gaps.iter().any(|gap| gap.1 == index);
            // One is in one region.
            let longer = parts.last_mut().filter(|_| !begins).and_then(|part| {
                let longer = (start.0 - part.0.0) as usize + len;
                self.memory.host_range(part.0, longer)?;
                part.1 = longer;
                Some(())
            });
            if longer.is_none() {
                parts.push((start, len));
            }
        }
        parts
    }

    /// Returns the place in the file of `len` bytes of memory, which are in one region.
    fn layer(&self, start: GuestAddress, len: u64) -> Option<Layer> {
        let region = self.regions.iter().rfind(|region| region.start <= start)?;
        Some(Layer {
            start,
            len,
            file: region.file.clone(),
            offset: region.offset + (start.0 - region.start.0),
        })
    }

    /// Writes `pages` to their places in the file.
    fn write(&mut self, pages: &PageSet) -> io::Result<()> {
        for (start, len) in pages.runs(MAX_WRITE) {
            let layer = self.layer(start, len as u64);
            write(&self.memory, &layer.ok_or(io::ErrorKind::InvalidInput)?)?;
        }
        self.copied.add(pages);
        Ok(())
    }
}

/// Writes what is in memory to its place in a file.
fn write(memory: &Arc<GuestMemory>, layer: &Layer) -> io::Result<()> {
    let mut buffers = GuestBuffers::new(memory.clone());
    buffers
        .push(layer.start, layer.len as u32)
        .map_err(io::Error::other)?;
    let mut offset = layer.offset;
    while !buffers.is_empty() {
        let position = FilePosition { offset, flags: 0 };
        match buffers.write_to(layer.file.as_fd(), Some(position)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => offset += count as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes a file in memory of this size, all zero.
fn file_in_memory(size: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string, which the call only reads.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now and belongs to nothing else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}

/// Makes sure that no process changes or shortens a file in memory any more, whoever has a descriptor of it. Other files
/// are left alone.
///
/// # Errors
/// If a process has mapped the file to write to it, or the host reads from it or writes to it without end.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
    // SAFETY: the request takes no argument.
    let present = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    // It is negative if the file is one that cannot have seals.
    if present < 0 || present & seals == seals {
        return Ok(());
    }
    // SAFETY: the request takes an integer.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;
    use crate::PAGE_SIZE;

    const PAGE: u64 = PAGE_SIZE as u64;
    const RANGES: [(GuestAddress, usize); 2] = [
        (GuestAddress(0), 70 * PAGE_SIZE),
        (GuestAddress(1 << 32), 30 * PAGE_SIZE),
    ];

    fn address(page: u64) -> GuestAddress {
        GuestAddress(match page {
            ..70 => page * PAGE,
            _ => (1 << 32) + (page - 70) * PAGE,
        })
    }

    fn content(memory: &GuestMemory) -> Vec<u8> {
        let byte = |page| memory.read_obj(GuestAddress(address(page).0 + 5)).unwrap();
        (0..100).map(byte).collect()
    }

    fn share(memory: &Arc<GuestMemory>) -> io::Result<Vec<Layer>> {
        Sharing::begin(memory)?.finish()
    }

    /// What is done to pages: they are filled with a byte, or discarded.
    type Changes = BTreeMap<u64, Option<u8>>;

    fn changes() -> impl Strategy<Value = Changes> {
        prop::collection::btree_map(0..100_u64, any::<Option<u8>>(), 0..30)
    }

    fn change(memory: &Arc<GuestMemory>, changes: &Changes) {
        for (&page, &byte) in changes {
            match byte {
                Some(byte) => memory
                    .write_slice(&[byte; PAGE_SIZE], address(page))
                    .unwrap(),
                None => {
                    let mut buffers = GuestBuffers::new(memory.clone());
                    buffers.push(address(page), PAGE as u32).unwrap();
                    buffers.discard_front(PAGE_SIZE).unwrap();
                }
            }
        }
    }

    proptest! {
        #[test]
        fn each_copy_keeps_what_the_memory_was(
            rounds in prop::collection::vec((changes(), prop::collection::vec(changes(), 0..3)), 1..6),
        ) {
            let memory = Arc::new(GuestMemory::from_ranges(&RANGES).unwrap());
            memory.start_dirty_log().unwrap();
            let mut copies = Vec::new();
            for (before, meanwhile) in rounds {
                change(&memory, &before);
                memory.take_dirty().unwrap();
                let mut sharing = Sharing::begin(&memory).unwrap();
                for changes in meanwhile {
                    change(&memory, &changes);
                    sharing.copy(&memory.take_dirty().unwrap()).unwrap();
                }
                let expected = content(&memory);
                let layers = sharing.finish().unwrap();
                prop_assert_eq!(&content(&memory), &expected);
                prop_assert!(memory.written_pages().unwrap().is_empty());
                let copy = GuestMemory::from_layers(&RANGES, &layers).unwrap();
                prop_assert_eq!(&content(&copy), &expected);
                copies.push((copy, expected));
            }
            for (copy, expected) in copies {
                prop_assert_eq!(content(&copy), expected);
            }
        }
    }

    #[test]
    fn memory_that_is_written_here_and_there_stays_in_few_parts() {
        let pages = 8192;
        let ranges = [(GuestAddress(0), pages as usize * PAGE_SIZE)];
        let memory = Arc::new(GuestMemory::from_ranges(&ranges).unwrap());
        share(&memory).unwrap();
        for round in 1..10 {
            let written = |page: &u64| page.is_multiple_of(2 + round);
            for page in (0..pages).filter(written) {
                memory
                    .write_obj(round as u8, GuestAddress(page * PAGE))
                    .unwrap();
            }
            let layers = share(&memory).unwrap();
            assert!(layers.len() <= MAX_LAYERS);
            let copy = GuestMemory::from_layers(&ranges, &layers).unwrap();
            for page in 0..pages {
                let last = (1..=round).rfind(|round| u64::is_multiple_of(page, 2 + round));
                let byte: u8 = copy.read_obj(GuestAddress(page * PAGE)).unwrap();
                assert_eq!(byte, last.unwrap_or(0) as u8, "{page}");
            }
        }
    }
}
