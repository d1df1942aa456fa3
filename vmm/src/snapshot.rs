//! Snapshots of machines: what they consist of, and what is asked of them.

mod changes;
mod sections;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bantam_memory::{Backing, GuestMemory};
pub use bantam_snapshot::{
    Facts as SnapshotFacts, SnapshotError as SnapshotFileError, SnapshotFiles, SnapshotId,
};
use bantam_snapshot::{MemoryFile, StateFile};
use serde::{Deserialize, Serialize};

use crate::command::DiskSnapshot;
use crate::config::{HugePages, MachineConfig};
use crate::error::Error;
use crate::memory::allocate_memory;

pub(crate) use changes::{Changes, Selection, changes_since};
pub use sections::{FrozenDisk, HostFacts};
pub(crate) use sections::{GuestFacts, MachineState, Sections};

/// What [`Command::Snapshot`](crate::Command::Snapshot) is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotOptions {
    /// The files to write. They replace earlier ones.
    pub files: SnapshotFiles,
    /// An earlier snapshot of the machine, or the one that it was restored from. The new one then has only the pages that
    /// were written since.
    #[serde(default)]
    pub base: Option<SnapshotBase>,
    /// What becomes of the disks.
    #[serde(default)]
    pub disks: SnapshotDisks,
    /// Ends the machine, as if its power were cut, instead of letting it go on.
    #[serde(default)]
    pub stop: bool,
    /// What the owner of the machine wants to find in the snapshot again ([`Snapshot::note`]).
    #[serde(default)]
    pub note: Option<String>,
}

/// What a differential snapshot is based on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotBase {
    /// The snapshot in these files.
    Files(SnapshotFiles),
    /// The last snapshot, wherever its files are: of those that were taken, or the one that the machine goes on from. The
    /// new one may have more pages than those that were written since. If these are not known at all, it has all pages. If
    /// its memory file is to replace that of the last snapshot, it gets the other pages from there.
    Last,
}

/// How the disks of a machine stay as they were at a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotDisks {
    /// The machine goes on with a new overlay of each disk that it can write to, beside the disk's image. The image stays
    /// as it is. A machine that ends needs none.
    #[default]
    Overlays,
    /// The same with overlays at these paths. Each disk that can be written to has one.
    OverlaysAt(Vec<DiskSnapshot>),
    /// The machine goes on with its images. Whoever takes the snapshot keeps copies of them, and brings these back before
    /// the snapshot is used.
    Unprotected,
}

/// A snapshot that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotTaken {
    /// Its id.
    pub id: SnapshotId,
    /// How many pages of 4 KiB were read; some of those of a full snapshot may be zero.
    pub pages: u64,
    /// For how long the guest did not run.
    pub paused_for: Duration,
}

/// A snapshot that is open, for a machine to go on from.
#[derive(Debug)]
pub struct Snapshot {
    state: StateFile,
    memory: MemoryFile,
    sections: Sections,
    config: MachineConfig,
    clock_catches_up: bool,
}

impl Snapshot {
    /// Opens the snapshot that is in a directory of its own.
    ///
    /// # Errors
    /// Those of [`Snapshot::open_files`].
    pub fn open(directory: &Path) -> Result<Snapshot, Error> {
        Snapshot::open_files(&SnapshotFiles::in_directory(directory))
    }

    /// Opens a snapshot.
    ///
    /// # Errors
    /// If a file cannot be read, is damaged, or was written in a format that this program does not know; if the files do
    /// not belong together; or if the snapshot is differential and its memory file has not been completed.
    pub fn open_files(files: &SnapshotFiles) -> Result<Snapshot, Error> {
        let state = StateFile::open(&files.state)?;
        let memory = MemoryFile::open(&files.memory, &state)?;
        if !memory.is_complete(&state)? {
            let path = files.state.clone();
            return Err(SnapshotFileError::Differential { path }.into());
        }
        let sections = Sections::read(state.sections())?;
        let config = sections.config()?;
        Ok(Snapshot {
            state,
            memory,
            sections,
            config,
            clock_catches_up: false,
        })
    }

    /// Lets the clock of KVM (kvm-clock) go on as if the machine had run since the snapshot, and not from where it was.
    pub fn catch_up_clock(&mut self) {
        self.clock_catches_up = true;
    }

    /// Returns the facts about the snapshot.
    pub fn facts(&self) -> &SnapshotFacts {
        self.state.facts()
    }

    /// Returns the facts about the host that it was taken on.
    pub fn host(&self) -> &HostFacts {
        &self.sections.host
    }

    /// Returns the configuration of the machine at the snapshot, with the images that its disks had.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Returns what the owner of the machine has left in it ([`SnapshotOptions::note`]).
    pub fn note(&self) -> Option<&str> {
        self.sections.note.as_deref()
    }

    /// Returns the disks that were frozen with it.
    pub fn disks(&self) -> &[FrozenDisk] {
        &self.sections.disks
    }

    pub(crate) fn machine_state(&self) -> MachineState<'_> {
        let taken_at = Duration::from_secs(self.facts().taken_at);
        self.sections
            .machine_state(self.clock_catches_up.then_some(taken_at))
    }

    /// Returns guest memory with the content of the snapshot, in the pages that `config` asks for.
    pub(crate) fn guest_memory(&self, config: &MachineConfig) -> Result<GuestMemory, Error> {
        match config.huge_pages {
            HugePages::None => self.memory.map().map_err(|error| Error::Memory {
                mib: self.facts().memory_size() >> 20,
                reason: error.to_string(),
            }),
            HugePages::Transparent | HugePages::TwoMib => {
                let memory = Arc::new(allocate_memory(config)?);
                self.memory.read_into(&memory)?;
                Arc::into_inner(memory).ok_or_else(|| Error::Memory {
                    mib: self.facts().memory_size() >> 20,
                    reason: "it is still being read".to_owned(),
                })
            }
        }
    }

    /// Checks that the memory file has not been changed since it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), Error> {
        Ok(self.memory.check_unchanged()?)
    }

    /// Returns what a machine that goes on from this snapshot knows of changes of its memory.
    pub(crate) fn changes(&self, memory: &GuestMemory) -> Changes {
        let is_mapped = memory.backing() == Backing::PrivateFile;
        Changes::of_restored(self.state.path(), self.facts(), is_mapped)
    }
}
