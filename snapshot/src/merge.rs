//! Makes a full snapshot of one and of the differential ones that follow it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use bantam_memory::PageSet;

use crate::facts::Facts;
use crate::{MemoryFile, MemoryWriter, SnapshotError, SnapshotFiles, StateFile, put_in_place};

/// Most bytes that the kernel copies at once.
const MAX_COPY: usize = 64 << 20;
/// Most bytes that are read at once if the kernel does not copy.
const MAX_READ: usize = 1 << 20;

/// Writes to `target` the snapshot that the last of `differential` is, with all its memory. Each of them is based on the
/// one before, and the first on `base`, a full snapshot.
///
/// It has the id of the last, so differential snapshots that are based on that one are based on it as well.
///
/// # Errors
/// If a snapshot cannot be read, or is not based on the one before, or the new one cannot be written.
pub fn merge(
    base: &SnapshotFiles,
    differential: &[SnapshotFiles],
    target: &SnapshotFiles,
) -> Result<(), SnapshotError> {
    let mut last = StateFile::open(&base.state)?;
    let first = MemoryFile::open(&base.memory, &last)?;
    if !first.is_complete(&last)? {
        return Err(SnapshotError::Differential {
            path: last.path().to_path_buf(),
        });
    }
    let mut layers = vec![first];
    let mut pages = vec![None];
    for files in differential {
        let next = StateFile::open(&files.state)?;
        let follows = next.facts().base == Some(last.facts().id);
        if !follows || next.facts().regions != last.facts().regions {
            return Err(SnapshotError::NotBased {
                next: next.path().to_path_buf(),
                base: last.path().to_path_buf(),
            });
        }
        layers.push(MemoryFile::open(&files.memory, &next)?);
        pages.push(next.pages().cloned());
        last = next;
    }
    let facts = Facts {
        base: None,
        ..last.facts().clone()
    };
    let writer = MemoryWriter::create(&target.memory, &facts)?;
    for (layer, pages) in layers.iter().zip(pages) {
        let pages = match pages {
            Some(pages) => pages,
            None => layer
                .data_pages()
                .map_err(SnapshotError::read(layer.path()))?,
        };
        copy(layer.file(), writer.file(), &facts, &pages)
            .map_err(SnapshotError::write(&target.memory))?;
    }
    let memory = writer.finish()?;
    let state = StateFile::new(&target.state, facts, None, last.sections().to_vec()).write()?;
    put_in_place([memory, state])
}

/// Copies the content of `pages` from one memory file to another. On a file system that can do so, both have the same blocks
/// then.
pub(crate) fn copy(from: &File, to: &File, facts: &Facts, pages: &PageSet) -> io::Result<()> {
    let mut bytes = Vec::new();
    for (address, len) in pages.runs(MAX_COPY) {
        let offset = facts.offset_of(address, len);
        let offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        let copied = copy_in_kernel(from, to, offset, len);
        if copied == len {
            continue;
        }
        // The files are on different file systems, for example. If the host cannot write at all, this says why.
        for start in (copied..len).step_by(MAX_READ) {
            bytes.resize(MAX_READ.min(len - start), 0);
            let offset = offset + start as u64;
            from.read_exact_at(&mut bytes, offset)?;
            to.write_all_at(&bytes, offset)?;
        }
    }
    Ok(())
}

/// Copies `len` bytes at `offset` by `copy_file_range`, and returns how many it has copied.
fn copy_in_kernel(from: &File, to: &File, offset: u64, len: usize) -> usize {
    let mut copied = 0;
    while copied < len {
        let mut position = offset as i64 + copied as i64;
        let mut target = position;
        // SAFETY: both positions outlive the call, which writes nothing else.
        let count = unsafe {
            libc::copy_file_range(
                from.as_raw_fd(),
                &raw mut position,
                to.as_raw_fd(),
                &raw mut target,
                len - copied,
                0,
            )
        };
        match usize::try_from(count) {
            Ok(count @ 1..) => copied += count,
            _ => break,
        }
    }
    copied
}
