//! Snapshots that are kept in memory, for other processes.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bantam_memory::Layer;
use bantam_snapshot::StateFile;
use bantam_state::{RestoreError, SavedState, Section};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::{Sections, Snapshot, SnapshotMemory};
use crate::error::Error;

/// What errors call the state.
const NAME: &str = "fork";

/// Where the memory of a snapshot is.
#[derive(Debug, Serialize, Deserialize)]
struct SharedMemory {
    layers: Vec<SharedLayer>,
}

/// A part of memory.
#[derive(Debug, Serialize, Deserialize)]
struct SharedLayer {
    start: u64,
    len: u64,
    /// Index of its descriptor among those of memory.
    file: usize,
    offset: u64,
}

impl SavedState for SharedMemory {
    const KIND: &'static str = "shared memory";
    const VERSION: u16 = 1;
}

impl Snapshot {
    /// Returns descriptors by which another process of this host opens a fork ([`Snapshot::from_descriptors`]). They are
    /// passed to it over a socket (`SCM_RIGHTS`), or inherited. What they lead to cannot be changed any more by any process,
    /// and exists as long as a process has them or a machine goes on from there.
    ///
    /// # Errors
    /// [`Error::NotFork`] if the snapshot is in files that have names; also if the host is out of descriptors or memory.
    pub fn descriptors(&self) -> Result<Vec<OwnedFd>, Error> {
        let failed = Error::resource("memory that forks share");
        let SnapshotMemory::Shared(layers) = &self.memory else {
            return Err(Error::NotFork);
        };
        let mut files: Vec<&Arc<File>> = Vec::new();
        let layers = layers.iter().map(|layer| {
            let known = files.iter().position(|file| Arc::ptr_eq(file, &layer.file));
            SharedLayer {
                start: layer.start.0,
                len: layer.len,
                file: known.unwrap_or_else(|| {
                    files.push(&layer.file);
                    files.len() - 1
                }),
                offset: layer.offset,
            }
        });
        let layers = layers.collect();
        let mut sections = vec![Section::of(&SharedMemory { layers })?];
        sections.extend(self.sections.write()?);
        let state = memfd_create(
            "bantam-fork",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        );
        let state = File::from(state.map_err(|errno| failed(errno.into()))?);
        StateFile::new(Path::new(NAME), self.facts.clone(), None, sections).write_to(&state)?;
        let mut descriptors = Vec::with_capacity(files.len() + 1);
        for file in [&state]
            .into_iter()
            .chain(files.into_iter().map(|file| &**file))
        {
            bantam_memory::seal(file).map_err(&failed)?;
            descriptors.push(file.try_clone().map_err(&failed)?.into());
        }
        Ok(descriptors)
    }

    /// Opens a fork of a machine of another process by the descriptors that [`Snapshot::descriptors`] has returned there.
    ///
    /// # Errors
    /// If they are not those of a fork, or of another version of Bantam.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Result<Snapshot, Error> {
        let damaged = |reason: &str| RestoreError::Damaged {
            reason: reason.to_owned(),
        };
        let mut files = descriptors.into_iter().map(|it| Arc::new(File::from(it)));
        let state = files.next().ok_or_else(|| damaged("it has no state"))?;
        let mut reader = BufReader::new(FromStart {
            file: &state,
            offset: 0,
        });
        let state = StateFile::read(&mut reader, Path::new(NAME))?;
        let (memory, sections): (Vec<_>, Vec<_>) = state
            .sections()
            .iter()
            .cloned()
            .partition(|section| section.kind() == SharedMemory::KIND);
        let [memory] = memory.as_slice() else {
            return Err(damaged("it does not say where its memory is").into());
        };
        let files: Vec<_> = files.collect();
        let mut end = 0;
        let mut layers = Vec::new();
        for layer in memory.decode::<SharedMemory>()?.layers {
            let file = files.get(layer.file).filter(|_| layer.start >= end);
            let file = file.ok_or_else(|| damaged("a part of its memory is missing"))?;
            let next = layer.start.checked_add(layer.len);
            end = next.ok_or_else(|| damaged("a part of its memory has no place"))?;
            layers.push(Layer {
                start: GuestAddress(layer.start),
                len: layer.len,
                file: file.clone(),
                offset: layer.offset,
            });
        }
        let sections = Sections::read(&sections)?;
        let config = sections.config()?;
        Ok(Snapshot::shared(
            state.facts().clone(),
            layers,
            sections,
            config,
        ))
    }
}

/// Reads a file from its start, wherever the others are that read by the same descriptor.
struct FromStart<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(bytes, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}
