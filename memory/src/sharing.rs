//! Moves the content of guest memory to files in memory, from which other machines map it too.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd};
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::{Backing, FilePosition, GuestBuffers, GuestMemory, Layer, PageSet};

/// Name of the files, for people who look at the mappings of a process.
const NAME: &CStr = c"bantam-guest-memory";
/// Most bytes of one write.
const MAX_WRITE: usize = 1 << 20;
/// Most parts of memory that are mapped one by one. A process has 65,530 mappings at most, and may have a thousand
/// machines.
const MAX_LAYERS: usize = 32;
/// Most parts that one call adds. Pages between those that were written are moved with them.
const MAX_PARTS: usize = 8;

/// Moves what `memory` has of its own to a file in memory, and returns the files from which all of its content is mapped.
///
/// `memory` itself is mapped from there as well, so that it shares the pages until it writes to them. What it has moved
/// before stays where it is: the time that this takes grows with the pages that were written since. The caller makes sure
/// that neither the guest nor a device accesses the memory meanwhile. Memory of huge pages is copied, and stays as it is.
///
/// # Errors
/// If the host has too little memory, or refuses.
pub fn share(memory: &Arc<GuestMemory>) -> io::Result<Vec<Layer>> {
    let is_shared = memory.backing() == Backing::PrivateFile && !memory.is_missing_pages();
    let written = match is_shared {
        true => memory.written_pages()?,
        false => memory.pages_with_content()?,
    };
    if is_shared {
        let parts = parts(memory, &written);
        if memory.layers().len() + 2 * parts.len() <= MAX_LAYERS {
            memory.put_layers(&copy_parts(memory, &parts)?)?;
            return Ok(memory.layers());
        }
    }
    let pages = match is_shared {
        true => memory.pages_with_content()?,
        false => written,
    };
    let layers = copy_all(memory, &pages)?;
    match memory.put_layers(&layers) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(layers),
        Err(error) => Err(error),
        Ok(()) => Ok(memory.layers()),
    }
}

/// Returns a few parts of memory that have all `pages`, in ascending order, each with its address and its length in bytes.
/// What is between them is as much as possible.
fn parts(memory: &GuestMemory, pages: &PageSet) -> Vec<(GuestAddress, usize)> {
    let runs: Vec<_> = pages.runs(usize::MAX).collect();
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
            memory.host_range(part.0, longer)?;
            part.1 = longer;
            Some(())
        });
        if longer.is_none() {
            parts.push((start, len));
        }
    }
    parts
}

/// Copies parts of memory, one after another, to a file.
fn copy_parts(
    memory: &Arc<GuestMemory>,
    parts: &[(GuestAddress, usize)],
) -> io::Result<Vec<Layer>> {
    let size: usize = parts.iter().map(|part| part.1).sum();
    let file = Arc::new(file_in_memory(size as u64)?);
    let mut offset = 0;
    let mut layers = Vec::new();
    for &(start, len) in parts {
        let first = offset;
        let mut written = 0;
        while written < len {
            let part = MAX_WRITE.min(len - written);
            let address = GuestAddress(start.0 + written as u64);
            write(memory, &file, address, part, offset)?;
            written += part;
            offset += part as u64;
        }
        layers.push(Layer {
            start,
            len: len as u64,
            file: file.clone(),
            offset: first,
        });
    }
    Ok(layers)
}

/// Copies `pages`, all that can differ from zero, to a file that has a place for each page of memory.
fn copy_all(memory: &Arc<GuestMemory>, pages: &PageSet) -> io::Result<Vec<Layer>> {
    let file = Arc::new(file_in_memory(memory.size())?);
    let mut next = 0;
    let layers = memory.regions().map(|region| {
        let offset = next;
        next += region.len;
        Layer {
            start: region.start,
            len: region.len,
            file: file.clone(),
            offset,
        }
    });
    let layers: Vec<_> = layers.collect();
    for (address, len) in pages.runs(MAX_WRITE) {
        let region = layers.iter().rfind(|layer| layer.start <= address);
        let region = region.ok_or(io::ErrorKind::InvalidInput)?;
        let offset = region.offset + (address.0 - region.start.0);
        write(memory, &file, address, len, offset)?;
    }
    Ok(layers)
}

fn write(
    memory: &Arc<GuestMemory>,
    file: &File,
    address: GuestAddress,
    len: usize,
    mut offset: u64,
) -> io::Result<()> {
    let mut buffers = GuestBuffers::new(memory.clone());
    buffers
        .push(address, len as u32)
        .map_err(io::Error::other)?;
    while !buffers.is_empty() {
        let position = FilePosition { offset, flags: 0 };
        match buffers.write_to(file.as_fd(), Some(position)) {
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
    // SAFETY: the name is a string, which the call only reads.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now and belongs to nothing else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
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

    proptest! {
        #[test]
        fn each_copy_keeps_what_the_memory_was(
            rounds in prop::collection::vec(
                prop::collection::btree_map(0..100_u64, (any::<u8>(), any::<bool>()), 0..30), 1..6),
        ) {
            let memory = Arc::new(GuestMemory::from_ranges(&RANGES).unwrap());
            let mut copies = Vec::new();
            for round in rounds {
                for (page, (byte, discard)) in round {
                    if discard {
                        let mut buffers = GuestBuffers::new(memory.clone());
                        buffers.push(address(page), PAGE as u32).unwrap();
                        buffers.discard_front(PAGE_SIZE).unwrap();
                    } else {
                        memory.write_slice(&[byte; PAGE_SIZE], address(page)).unwrap();
                    }
                }
                let expected = content(&memory);
                let layers = share(&memory).unwrap();
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
