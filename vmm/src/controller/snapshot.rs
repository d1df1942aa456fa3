//! Taking snapshots of a machine, and going on from them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bantam_memory::{GuestMemory, PAGE_SIZE, PageSet};
use bantam_snapshot::{CopiedPages, Facts, MemoryWriter, NewFile, SnapshotId, StateFile, Witness};
use bantam_state::Section;

use super::{Controller, Life};
use crate::command::DiskSnapshot;
use crate::config::MachineConfig;
use crate::devices::{DeviceTable, SavedDevice};
use crate::error::Error;
use crate::kvm::{SavedProcessors, VmState};
use crate::lock::lock;
use crate::machine::{Machine, Origin};
use crate::snapshot::{
    Changes, FrozenDisk, GuestFacts, Sections, Selection, Snapshot, SnapshotBase, SnapshotDisks,
    SnapshotOptions, SnapshotTaken, changes_since,
};
use crate::state::State;
use crate::vm::Vm;

/// Most bytes of changed pages that are copied while the machine is paused, to be written when it goes on. More are
/// written before that, so that the monitor needs no memory for them.
const MAX_COPY: usize = 64 << 20;

/// The parts of a paused machine that a snapshot is made of.
pub(super) struct PausedParts {
    vm: Arc<Vm>,
    memory: Arc<GuestMemory>,
    devices: Arc<DeviceTable>,
    vcpu_count: usize,
    guest: GuestFacts,
    changes: Arc<Mutex<Changes>>,
}

impl PausedParts {
    fn of(machine: &Machine) -> PausedParts {
        PausedParts {
            vm: machine.vm().clone(),
            memory: machine.memory().clone(),
            devices: machine.devices().clone(),
            vcpu_count: machine.vcpu_count(),
            guest: machine.guest(),
            changes: machine.changes().clone(),
        }
    }
}

/// What has been read of a paused machine, and the files that are not complete yet.
struct Taken {
    facts: Facts,
    config: MachineConfig,
    guest: GuestFacts,
    processors: Vec<Section>,
    devices: Vec<SavedDevice>,
    /// The pages of a differential snapshot.
    pages: Option<PageSet>,
    /// The witnesses of a differential snapshot.
    witnesses: Vec<Witness>,
    page_count: usize,
    writer: MemoryWriter,
    /// What is still to be written.
    copied: Option<CopiedPages>,
    changes: Arc<Mutex<Changes>>,
}

impl Controller {
    /// Takes a snapshot of the machine ([`Command::Snapshot`](crate::Command::Snapshot)). A machine that runs is paused
    /// meanwhile.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, cannot be paused, or has a part that cannot be saved; if the files cannot
    /// be written; if the changes since the base are not known; or if a disk cannot go on with an overlay. The machine
    /// then goes on as it was, but some of its disks may have new overlays.
    pub fn snapshot(&self, options: SnapshotOptions) -> Result<SnapshotTaken, Error> {
        let runs = self.state() != State::Paused;
        let paused_at = Instant::now();
        if runs {
            self.pause()?;
        }
        let taken = self.take_paused(&options);
        let mut paused_for = paused_at.elapsed();
        let goes_on = runs && !(options.stop && taken.is_ok());
        if goes_on {
            let resumed = self.resume();
            paused_for = paused_at.elapsed();
            // Without an answer, whoever asked would wait for a machine that does not run.
            if taken.is_ok() {
                resumed?;
            }
        }
        let (taken, disks) = taken?;
        let changes = taken.changes.clone();
        let page_count = taken.page_count as u64;
        let is_logging = taken.config.track_dirty_pages;
        let memory = taken.write_memory()?;
        if options.stop {
            self.stop();
            self.wait().map_err(Error::Shared)?;
        }
        let state = memory.put_in_place(&options, disks)?;
        lock(&changes).note(&state, is_logging);
        Ok(SnapshotTaken {
            id: state.facts().id,
            pages: page_count,
            paused_for,
        })
    }

    /// Reads the state of a paused machine, and gives its disks their overlays. Returns the disks whose images stay as they
    /// are.
    fn take_paused(&self, options: &SnapshotOptions) -> Result<(Taken, Vec<DiskSnapshot>), Error> {
        let taken = self.while_paused("take a snapshot", |parts| {
            if options.disks == SnapshotDisks::Unprotected {
                // A copy of an image has all that the guest has written.
                parts.devices.flush_disks()?;
            }
            self.read(parts, options)
        })?;
        let overlays = match &options.disks {
            _ if options.stop => Vec::new(),
            SnapshotDisks::Unprotected => Vec::new(),
            SnapshotDisks::OverlaysAt(overlays) => overlays.clone(),
            SnapshotDisks::Overlays => default_overlays(&taken.config, taken.facts.id),
        };
        if !overlays.is_empty() {
            self.snapshot_disks(overlays.clone())?;
        }
        Ok((taken, overlays))
    }

    /// Calls `work` while nothing else changes the paused machine.
    pub(super) fn while_paused<T>(
        &self,
        action: &'static str,
        work: impl FnOnce(&PausedParts) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let parts = {
            let mut life = self.0.life();
            match self.0.take(&mut life) {
                Some(Life::Paused(machine)) => {
                    let parts = PausedParts::of(&machine);
                    // This keeps others from resuming it meanwhile.
                    self.0.enter(&mut life, Life::Pausing(machine));
                    parts
                }
                other => return Err(self.0.put_back(life, other, action)),
            }
        };
        let result = work(&parts);
        let mut life = self.0.life();
        match self.0.take(&mut life) {
            Some(Life::Pausing(machine)) => self.0.enter(&mut life, Life::Paused(machine)),
            other => return Err(self.0.put_back(life, other, action)),
        }
        result
    }

    /// Returns the state of the processors of a paused machine.
    pub(super) fn read_processors(&self, parts: &PausedParts) -> Result<Vec<Section>, Error> {
        let vm = VmState::save(&parts.vm)?;
        match self.0.control().save_vcpus(parts.vcpu_count) {
            Some(vcpus) => Ok(SavedProcessors::new(vm, vcpus?).encode()?),
            // It ended just now.
            None => Err(self.0.wrong_state(&self.0.life(), "save the processors")),
        }
    }

    fn read(&self, parts: &PausedParts, options: &SnapshotOptions) -> Result<Taken, Error> {
        let mut config = self.configuration()?;
        // Whoever restores it may be in another folder.
        if let Ok(folder) = std::env::current_dir() {
            config.rebase_paths(&folder);
        }
        let processors = self.read_processors(parts)?;
        let devices = parts.devices.save()?;
        let memory = &parts.memory;
        let mut changes = lock(&parts.changes);
        let Selection { pages, base } = changes_since(
            options.base.as_ref(),
            &mut changes,
            config.track_dirty_pages,
            &parts.vm,
            memory,
        )?;
        let is_since_last = matches!(options.base, Some(SnapshotBase::Last));
        let earlier = match base.filter(|_| is_since_last) {
            Some(base) => changes.earlier(&options.files.memory, base)?,
            None => None,
        };
        drop(changes);
        let (base_of_all, all_pages) = match &earlier {
            None => (base, base.map(|_| pages.clone())),
            Some(earlier) => {
                let mut all_pages = earlier.pages.clone();
                if let Some(all_pages) = &mut all_pages {
                    all_pages.add(&pages);
                }
                (earlier.base, all_pages)
            }
        };
        let regions = memory.regions().map(|region| (region.start.0, region.len));
        let facts = Facts::now(base_of_all, regions).map_err(Error::RandomSeed)?;
        let mut writer = MemoryWriter::create(&options.files.memory, &facts)?;
        if is_since_last {
            writer = writer.writing_zeroes();
        }
        if let Some(earlier) = &earlier {
            writer.copy(&earlier.file, earlier.pages.as_ref())?;
        }
        let witnesses = match all_pages.as_ref().filter(|_| is_since_last) {
            Some(pages) => Witness::find(memory, &facts, pages),
            None => Vec::new(),
        };
        let page_count = pages.len();
        let is_small = base.is_some() && page_count * PAGE_SIZE <= MAX_COPY;
        let copied = match is_small {
            true => {
                let copied = CopiedPages::copy(memory, pages.clone());
                Some(copied.map_err(Error::resource("a copy of changed pages"))?)
            }
            false => {
                writer.write(memory, &pages)?;
                None
            }
        };
        Ok(Taken {
            facts,
            config,
            guest: parts.guest,
            processors,
            devices,
            pages: all_pages,
            witnesses,
            page_count,
            writer,
            copied,
            changes: parts.changes.clone(),
        })
    }

    /// Starts the machine from a snapshot instead of booting it. It is paused then, and [`Controller::resume`] lets it go on.
    ///
    /// The machine has to be configured as [`Snapshot::config`] says, but for what it uses of its host: other images with
    /// the same content, taps, sockets and ends of streams.
    ///
    /// The guest's clocks go on from where they were: the time of day is behind until the guest sets it.
    /// [`Snapshot::catch_up_clock`] changes that.
    ///
    /// # Errors
    /// Those of [`Controller::start`], and [`Error::Restore`] if the state does not fit the machine or this host.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.check_unchanged()?;
        self.0.start(Origin::Snapshot(snapshot))
    }
}

impl Taken {
    /// Writes what is left of the memory.
    fn write_memory(self) -> Result<Written, Error> {
        if let Some(copied) = &self.copied {
            self.writer.write_copied(copied)?;
        }
        Ok(Written {
            memory: self.writer.finish()?,
            facts: self.facts,
            config: self.config,
            guest: self.guest,
            processors: self.processors,
            devices: self.devices,
            pages: self.pages,
            witnesses: self.witnesses,
        })
    }
}

/// A snapshot whose memory is written.
struct Written {
    memory: NewFile,
    facts: Facts,
    config: MachineConfig,
    guest: GuestFacts,
    processors: Vec<Section>,
    devices: Vec<SavedDevice>,
    pages: Option<PageSet>,
    witnesses: Vec<Witness>,
}

impl Written {
    /// Writes the state file, and puts both in place. Returns the content of the state file.
    fn put_in_place(
        self,
        options: &SnapshotOptions,
        overlays: Vec<DiskSnapshot>,
    ) -> Result<StateFile, Error> {
        let is_frozen = |name: &crate::config::DeviceName, readonly: bool| {
            options.stop || readonly || overlays.iter().any(|it| it.disk == *name)
        };
        let frozen = match options.disks {
            SnapshotDisks::Unprotected => Vec::new(),
            _ => self
                .config
                .disk_names()
                .zip(&self.config.disks)
                .filter(|(name, disk)| is_frozen(name, disk.readonly))
                .map(|(name, disk)| {
                    FrozenDisk::now(name, &disk.path).map_err(|source| Error::FrozenDisk {
                        path: disk.path.clone(),
                        source,
                    })
                })
                .collect::<Result<_, _>>()?,
        };
        let sections = Sections::new(
            &self.config,
            options.note.clone(),
            self.guest,
            frozen,
            self.processors,
            self.devices,
        );
        let path = &options.files.state;
        let state = StateFile::new(path, self.facts, self.pages, sections.write()?)
            .with_witnesses(self.witnesses);
        let file = state.write()?;
        self.memory.put_in_place()?;
        file.put_in_place()?;
        Ok(state)
    }
}

/// Returns an overlay beside the image of each disk that can be written to.
fn default_overlays(config: &MachineConfig, id: SnapshotId) -> Vec<DiskSnapshot> {
    let disks = config.disk_names().zip(&config.disks);
    let writable = disks.filter(|(_, disk)| !disk.readonly);
    writable
        .map(|(name, disk)| DiskSnapshot {
            disk: name,
            path: overlay_of(&disk.path, id),
        })
        .collect()
}

/// Returns the path of the overlay that a machine goes on with after snapshot `id`.
fn overlay_of(image: &Path, id: SnapshotId) -> PathBuf {
    let id = id.to_string();
    let mut name = OsString::from(image.file_stem().unwrap_or_default());
    name.push(format!("-{}.qcow2", id.get(..8).unwrap_or(&id)));
    image.with_file_name(name)
}
