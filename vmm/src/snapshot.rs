//! Snapshots of machines: what they consist of, and what is asked of them.

mod changes;
mod descriptors;
mod sections;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bantam_memory::{GuestMemory, Layer, MapError, PageSet};
pub use bantam_snapshot::{
    Facts as SnapshotFacts, SnapshotError as SnapshotFileError, SnapshotFiles, SnapshotId,
};
use bantam_snapshot::{MemoryFile, StateFile, read_working_set};
use bantam_storage::DiskError;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::command::DiskSnapshot;
use crate::config::{HugePages, MachineConfig};
use crate::error::Error;
use crate::lock::lock;
use crate::machine::MachineContext;
use crate::memory::{allocate_memory, check_regions};
use crate::memory_load::{MemoryLoad, MemoryService, Plan};

pub(crate) use changes::{Changes, Earlier, Selection, changes_since};
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

impl SnapshotOptions {
    /// Asks for a full snapshot of a machine that goes on with overlays.
    pub fn new(files: SnapshotFiles) -> SnapshotOptions {
        SnapshotOptions {
            files,
            base: None,
            disks: SnapshotDisks::Overlays,
            stop: false,
            note: None,
        }
    }
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

/// What is known of a snapshot from its state file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotDescription {
    /// Facts about the snapshot.
    pub facts: SnapshotFacts,
    /// The number of pages of 4 KiB of a differential snapshot; `None` for a full one.
    pub changed_pages: Option<u64>,
    /// The host that it was taken on.
    pub host: HostFacts,
    /// The configuration of its machine, with the images that its disks had.
    pub config: MachineConfig,
    /// The disks that were frozen with it.
    pub disks: Vec<FrozenDisk>,
}

impl SnapshotDescription {
    /// Reads the state file of a snapshot, full or differential.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, or was written in a format that this program does not know.
    pub fn read(files: &SnapshotFiles) -> Result<SnapshotDescription, Error> {
        let state = StateFile::open(&files.state)?;
        let sections = Sections::read(state.sections())?;
        Ok(SnapshotDescription {
            facts: state.facts().clone(),
            changed_pages: state.pages().map(|pages| pages.len() as u64),
            config: sections.config()?,
            host: sections.host,
            disks: sections.disks,
        })
    }
}

/// A snapshot that is open, for a machine to go on from.
#[derive(Debug)]
pub struct Snapshot {
    facts: SnapshotFacts,
    memory: SnapshotMemory,
    sections: Sections,
    config: MachineConfig,
    clock_catches_up: bool,
    takes_changed_disks: bool,
    memory_load: MemoryLoad,
    /// The pages that an earlier machine has needed first, if that was recorded.
    working_set: Option<PageSet>,
    /// Where the working set is, or is to be, recorded. Only a snapshot in a directory of its own has such a place.
    working_set_path: Option<PathBuf>,
    records_working_set: bool,
}

/// Where the memory of a snapshot is.
#[derive(Debug)]
enum SnapshotMemory {
    /// In its memory file.
    File(Arc<MemoryFile>),
    /// With a program that listens on this socket.
    Server(PathBuf),
    /// In memory that other machines share.
    Shared(Vec<Layer>),
    /// In memory that was received, until a machine has it.
    Received(Mutex<Option<Arc<GuestMemory>>>),
}

impl Snapshot {
    /// Opens the snapshot that is in a directory of its own. If a working set was recorded there, its pages are read ahead when a
    /// machine goes on.
    ///
    /// # Errors
    /// Those of [`Snapshot::open_files`].
    pub fn open(directory: &Path) -> Result<Snapshot, Error> {
        let mut snapshot = Snapshot::open_files(&SnapshotFiles::in_directory(directory))?;
        let path = SnapshotFiles::working_set_in_directory(directory);
        snapshot.working_set = read_working_set(&path, &snapshot.facts).unwrap_or_else(|error| {
            tracing::warn!("{error}; record it again");
            None
        });
        snapshot.working_set_path = Some(path);
        Ok(snapshot)
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
        Snapshot::of(&state, SnapshotMemory::File(Arc::new(memory)))
    }

    /// Opens a snapshot whose memory another program serves, in the protocol of Firecracker: it listens on `socket` and fills
    /// pages when they are touched. It knows which memory that is, and Bantam does not check it.
    ///
    /// # Errors
    /// If the state file cannot be read, is damaged, or was written in a format that this program does not know.
    pub fn open_served(state: &Path, socket: &Path) -> Result<Snapshot, Error> {
        let state = StateFile::open(state)?;
        Snapshot::of(&state, SnapshotMemory::Server(socket.to_path_buf()))
    }

    /// Puts together a snapshot whose memory was received. One machine can go on from it.
    ///
    /// # Errors
    /// If the state is damaged, or in a format that this program does not know.
    pub(crate) fn received(state: &StateFile, memory: Arc<GuestMemory>) -> Result<Snapshot, Error> {
        Snapshot::of(state, SnapshotMemory::Received(Mutex::new(Some(memory))))
    }

    fn of(state: &StateFile, memory: SnapshotMemory) -> Result<Snapshot, Error> {
        let sections = Sections::read(state.sections())?;
        let config = sections.config()?;
        Ok(Snapshot::new(
            state.facts().clone(),
            memory,
            sections,
            config,
        ))
    }

    fn new(
        facts: SnapshotFacts,
        memory: SnapshotMemory,
        sections: Sections,
        config: MachineConfig,
    ) -> Snapshot {
        Snapshot {
            facts,
            memory,
            sections,
            config,
            clock_catches_up: false,
            takes_changed_disks: false,
            memory_load: MemoryLoad::default(),
            working_set: None,
            working_set_path: None,
            records_working_set: false,
        }
    }

    /// Puts together a snapshot whose memory other machines share.
    pub(crate) fn shared(
        facts: SnapshotFacts,
        layers: Vec<Layer>,
        sections: Sections,
        config: MachineConfig,
    ) -> Snapshot {
        Snapshot::new(facts, SnapshotMemory::Shared(layers), sections, config)
    }

    /// Sets how a machine gets its memory from the memory file.
    pub fn set_memory_load(&mut self, load: MemoryLoad) {
        self.memory_load = load;
    }

    /// Has the pages recorded that a machine touches in the first ten seconds, in the directory of the snapshot. An earlier
    /// record is not used then.
    ///
    /// # Errors
    /// If the snapshot is not in a directory of its own.
    pub fn record_working_set(&mut self) -> Result<(), Error> {
        if self.working_set_path.is_none() {
            let reason = "the snapshot is not in a directory of its own";
            return Err(Error::WorkingSet(reason));
        }
        self.records_working_set = true;
        Ok(())
    }

    /// Lets the clock of KVM (kvm-clock) go on as if the machine had run since the snapshot, and not from where it was.
    pub fn catch_up_clock(&mut self) {
        self.clock_catches_up = true;
    }

    /// Returns the facts about the snapshot.
    pub fn facts(&self) -> &SnapshotFacts {
        &self.facts
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

    /// Lets a machine go on from this snapshot although an image has been changed since. Its guest knows nothing of the
    /// change: it may find a damaged file system, or damage it.
    pub fn take_changed_disks(&mut self) {
        self.takes_changed_disks = true;
    }

    /// Checks that the images of `config` that were frozen with this snapshot are as they were.
    ///
    /// # Errors
    /// [`Error::ChangedDisk`] if one has been changed or is not there.
    pub fn check_disks(&self, config: &MachineConfig) -> Result<(), Error> {
        if self.takes_changed_disks {
            return Ok(());
        }
        for (name, disk) in config.disk_names().zip(&config.disks) {
            let mut frozen = self.disks().iter();
            let is_it = |it: &&FrozenDisk| it.name == name && it.path == disk.path;
            let Some(frozen) = frozen.find(is_it) else {
                continue;
            };
            let unchanged = frozen.is_unchanged();
            let unchanged = unchanged.map_err(|source| DiskError::Open {
                path: disk.path.clone(),
                access: "reading",
                source,
                remedy: "",
            })?;
            if !unchanged {
                return Err(Error::ChangedDisk {
                    path: disk.path.clone(),
                });
            }
        }
        Ok(())
    }

    pub(crate) fn machine_state(&self) -> MachineState<'_> {
        let taken_at = Duration::from_secs(self.facts().taken_at);
        self.sections.machine_state(
            self.clock_catches_up.then_some(taken_at),
            matches!(self.memory, SnapshotMemory::Shared(_)),
        )
    }

    /// Returns guest memory with the content of the snapshot, in the pages that `config` asks for, and what brings it back
    /// while the machine runs.
    pub(crate) fn guest_memory(
        &self,
        config: &MachineConfig,
        context: &MachineContext,
    ) -> Result<(Arc<GuestMemory>, Option<MemoryService>), Error> {
        let mapped = |error: MapError| Error::Memory {
            mib: self.facts.memory_size() >> 20,
            reason: error.to_string(),
        };
        match &self.memory {
            SnapshotMemory::File(file) => {
                let load = self.memory_load;
                let memory = match config.huge_pages {
                    _ if load.copies() => self.empty_memory(config)?,
                    HugePages::None => Arc::new(file.map().map_err(mapped)?),
                    HugePages::Transparent | HugePages::TwoMib => {
                        let memory = Arc::new(allocate_memory(config)?);
                        file.read_into(&memory)?;
                        memory
                    }
                };
                let plan = Plan {
                    file,
                    load,
                    working_set: self.working_set.as_ref(),
                    record: self.record(config)?,
                };
                let service = MemoryService::of_file(&plan, &memory, context)?;
                Ok((memory, service))
            }
            SnapshotMemory::Server(socket) => {
                let memory = self.empty_memory(config)?;
                let service = MemoryService::of_server(socket.clone(), &memory, context)?;
                Ok((memory, Some(service)))
            }
            SnapshotMemory::Shared(layers) => {
                let regions = self.facts.regions.iter();
                let regions = regions.map(|&(start, len)| (GuestAddress(start), len as usize));
                let regions: Vec<_> = regions.collect();
                let memory = GuestMemory::from_layers(&regions, layers).map_err(mapped)?;
                Ok((Arc::new(memory), None))
            }
            SnapshotMemory::Received(memory) => {
                let memory = lock(memory).take().ok_or_else(|| Error::Memory {
                    mib: self.facts.memory_size() >> 20,
                    reason: "another machine has gone on with it".to_owned(),
                });
                check_regions(self.facts.regions.iter().copied(), config)?;
                Ok((memory?, None))
            }
        }
    }

    /// Returns memory whose pages are to be filled.
    fn empty_memory(&self, config: &MachineConfig) -> Result<Arc<GuestMemory>, Error> {
        let memory = allocate_memory(config)?;
        check_regions(self.facts.regions.iter().copied(), config)?;
        Ok(Arc::new(memory))
    }

    /// Returns where the working set is to be recorded, if it is.
    fn record(&self, config: &MachineConfig) -> Result<Option<(&Path, &SnapshotFacts)>, Error> {
        let Some(path) = self
            .working_set_path
            .as_ref()
            .filter(|_| self.records_working_set)
        else {
            return Ok(None);
        };
        let reads_at_start = config.huge_pages != HugePages::None && !self.memory_load.copies();
        match self.memory_load.reads_all() || reads_at_start {
            true => Err(Error::WorkingSet(
                "all memory is read, whatever the guest needs; load it lazily, or copy it",
            )),
            false => Ok(Some((path, &self.facts))),
        }
    }

    /// Checks that the memory file has not been changed since it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), Error> {
        match &self.memory {
            SnapshotMemory::File(file) => Ok(file.check_unchanged()?),
            SnapshotMemory::Server(_) | SnapshotMemory::Shared(_) | SnapshotMemory::Received(_) => {
                Ok(())
            }
        }
    }

    /// Returns what a machine that goes on from this snapshot knows of changes of its memory.
    pub(crate) fn changes(&self, memory: &GuestMemory) -> Changes {
        let path = match &self.memory {
            SnapshotMemory::File(file) => file.path(),
            SnapshotMemory::Server(socket) => socket,
            // There are no files to base another on.
            SnapshotMemory::Shared(_) | SnapshotMemory::Received(_) => return Changes::default(),
        };
        Changes::of_restored(path, &self.facts, memory.knows_written_pages())
    }
}
