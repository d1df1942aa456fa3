//! Makes a full snapshot of one and of the differential ones that follow it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bantam_memory::PageSet;
use vm_memory::GuestAddress;

use crate::facts::Facts;
use crate::{MemoryFile, MemoryWriter, SnapshotError, SnapshotFiles, StateFile};

/// Most bytes that are copied at once.
const MAX_COPY: usize = 1 << 20;

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
    memory.put_in_place()?;
    state.put_in_place()?;
    Ok(())
}

/// Copies the content of `pages` from one memory file to another.
pub(crate) fn copy(from: &File, to: &File, facts: &Facts, pages: &PageSet) -> io::Result<()> {
    let mut bytes = vec![0; MAX_COPY];
    let mut copy_run = |(address, len): (GuestAddress, usize)| {
        let offset = facts.offset_of(address, len);
        let offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        let run = &mut bytes[..len];
        from.read_exact_at(run, offset)?;
        to.write_all_at(run, offset)
    };
    pages.runs(MAX_COPY).try_for_each(&mut copy_run)
}
