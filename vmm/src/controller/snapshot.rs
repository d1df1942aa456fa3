//! Taking snapshots of a machine, and going on from them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bantam_memory::{GuestMemory, PAGE_SIZE, PageSet};
use bantam_snapshot::{
    CopiedPages, Facts, MemoryWriter, SnapshotId, StateFile, Witness, put_in_place,
};
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
    Changes, Earlier, FrozenDisk, GuestFacts, Sections, Selection, Snapshot, SnapshotBase,
    SnapshotDisks, SnapshotOptions, SnapshotTaken, changes_since,
};
use crate::state::State;
use crate::vm::Vm;

/// Most bytes of changed pages that are copied while the machine is paused, to be written when it goes on. More are
/// written before that, so that the monitor needs no memory for them.
const MAX_COPY: usize = 64 << 20;

/// The parts of a machine that a snapshot is made of.
pub(super) struct Parts {
    pub(super) vm: Arc<Vm>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) devices: Arc<DeviceTable>,
    vcpu_count: usize,
    guest: GuestFacts,
    pub(super) changes: Arc<Mutex<Changes>>,
}

impl Parts {
    pub(super) fn of(machine: &Machine) -> Parts {
        Parts {
            vm: machine.vm().clone(),
            memory: machine.memory().clone(),
            devices: machine.devices().clone(),
            vcpu_count: machine.vcpu_count(),
            guest: machine.guest(),
            changes: machine.changes().clone(),
        }
    }
}

/// The state of a machine, besides memory.
pub(super) struct SavedMachine {
    pub(super) config: MachineConfig,
    guest: GuestFacts,
    processors: Vec<Section>,
    devices: Vec<SavedDevice>,
}

impl SavedMachine {
    /// Returns the sections of a state file, with a note of the owner and the disks that stay as they are.
    pub(super) fn into_sections(self, note: Option<String>, disks: Vec<FrozenDisk>) -> Sections {
        Sections::new(
            &self.config,
            note,
            self.guest,
            disks,
            self.processors,
            self.devices,
        )
    }

    /// Describes the images that stay as they are: those of disks with `overlays`, and those that are only read, or all
    /// if the machine has ended.
    pub(super) fn frozen_disks(
        &self,
        overlays: &[DiskSnapshot],
        has_ended: bool,
    ) -> Result<Vec<FrozenDisk>, Error> {
        let disks = self.config.disk_names().zip(&self.config.disks);
        let frozen = disks.filter(|(name, disk)| {
            has_ended || disk.readonly || overlays.iter().any(|it| it.disk == *name)
        });
        let frozen = frozen.map(|(name, disk)| {
            FrozenDisk::now(name, &disk.path).map_err(|source| Error::FrozenDisk {
                path: disk.path.clone(),
                source,
            })
        });
        frozen.collect()
    }
}

/// What has been read of a paused machine, and the memory file that is not complete yet.
struct Taken {
    machine: SavedMachine,
    facts: Facts,
    /// The pages of a differential snapshot.
    pages: Option<PageSet>,
    /// The witnesses of a differential snapshot.
    witnesses: Vec<Witness>,
    /// The pages that were read.
    read: PageSet,
    writer: MemoryWriter,
    /// What is still to be written.
    copied: Option<CopiedPages>,
    /// The memory file that has the other pages.
    earlier: Option<Earlier>,
    changes: Arc<Mutex<Changes>>,
    memory: Arc<GuestMemory>,
}

impl Controller {
    /// Takes a snapshot of the machine ([`Command::Snapshot`](crate::Command::Snapshot)). A machine that runs is paused
    /// meanwhile. A call waits for an earlier one, and for a fork, to be done.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, cannot be paused, or has a part that cannot be saved; if the files cannot
    /// be written; if the changes since the base are not known; or if a disk cannot go on with an overlay. The machine
    /// then goes on as it was, but some of its disks may have new overlays.
    pub fn snapshot(&self, options: SnapshotOptions) -> Result<SnapshotTaken, Error> {
        // The next one is based on what this one notes of changes.
        let _one_at_a_time = lock(&self.0.snapshots);
        let disks = match options.stop {
            true => &SnapshotDisks::Unprotected,
            false => &options.disks,
        };
        let ((taken, overlays), paused_for) = self.while_at_rest(options.stop, || {
            self.while_paused("take a snapshot", |parts| {
                if options.disks == SnapshotDisks::Unprotected && !options.stop {
                    // A copy of an image has all that the guest has written.
                    parts.devices.flush_disks()?;
                }
                let taken = self.read(parts, &options)?;
                let overlays = self.freeze(&taken.machine.config, disks, taken.facts.id)?;
                Ok((taken, overlays))
            })
        })?;
        let page_count = taken.read.len() as u64;
        if let Some(earlier) = taken.earlier {
            taken
                .writer
                .copy(&earlier.file, earlier.pages, &taken.read)?;
        }
        if let Some(copied) = &taken.copied {
            taken.writer.write_copied(copied)?;
        }
        let memory = taken.writer.finish()?;
        self.require_memory(&taken.memory)?;
        if options.stop {
            // The machine is still there if its memory cannot be kept.
            memory.sync()?;
            self.stop();
            self.wait().map_err(Error::Shared)?;
        }
        let frozen = match options.disks {
            SnapshotDisks::Unprotected => Vec::new(),
            _ => taken.machine.frozen_disks(&overlays, options.stop)?,
        };
        let is_logging = taken.machine.config.track_dirty_pages;
        let sections = taken.machine.into_sections(options.note, frozen).write()?;
        let path = &options.files.state;
        let state = StateFile::new(path, taken.facts, taken.pages, sections)
            .with_witnesses(taken.witnesses);
        let file = state.write()?;
        put_in_place([memory, file])?;
        lock(&taken.changes).note(&state, is_logging);
        Ok(SnapshotTaken {
            id: state.facts().id,
            pages: page_count,
            paused_for,
        })
    }

    /// Calls `work` on a paused machine, and lets one that ran go on, unless `work` succeeds and it `ends` the machine.
    /// Returns also for how long the guest did not run.
    pub(super) fn while_at_rest<T>(
        &self,
        ends: bool,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<(T, Duration), Error> {
        let runs = self.state() != State::Paused;
        let paused_at = Instant::now();
        if runs {
            self.pause()?;
        }
        let result = work();
        if runs && !(ends && result.is_ok()) {
            let resumed = self.resume();
            // The first error says more.
            if result.is_ok() {
                resumed?;
            }
        }
        Ok((result?, paused_at.elapsed()))
    }

    /// Has the paused machine go on with overlays as `disks` says, and returns them. Nothing may let the guest run between
    /// this and the reading of its state, as the disks would be from another moment.
    pub(super) fn freeze(
        &self,
        config: &MachineConfig,
        disks: &SnapshotDisks,
        id: SnapshotId,
    ) -> Result<Vec<DiskSnapshot>, Error> {
        let overlays = match disks {
            SnapshotDisks::Unprotected => Vec::new(),
            SnapshotDisks::OverlaysAt(overlays) => overlays.clone(),
            SnapshotDisks::Overlays => default_overlays(config, id),
        };
        if !overlays.is_empty() {
            self.snapshot_disks(overlays.clone())?;
        }
        Ok(overlays)
    }

    /// Calls `work` while nothing else changes the paused machine.
    pub(super) fn while_paused<T>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Parts) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.require_own(action)?;
        let parts = {
            let mut life = self.0.life();
            match self.0.take(&mut life) {
                Some(Life::Paused(machine)) => {
                    let parts = Parts::of(&machine);
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
    pub(super) fn read_processors(&self, parts: &Parts) -> Result<Vec<Section>, Error> {
        let vm = VmState::save(&parts.vm)?;
        match self.0.control().save_vcpus(parts.vcpu_count) {
            Some(vcpus) => Ok(SavedProcessors::new(vm, vcpus?).encode()?),
            // It ended just now.
            None => Err(self.0.wrong_state(&self.0.life(), "save the processors")),
        }
    }

    pub(super) fn read_state(&self, parts: &Parts) -> Result<SavedMachine, Error> {
        let mut config = self.configuration()?;
        // The guest has begun, and who debugs it is not a part of its machine.
        config.gdb = None;
        // Whoever restores it may be in another folder.
        if let Ok(folder) = std::env::current_dir() {
            config.rebase_paths(&folder);
        }
        Ok(SavedMachine {
            config,
            guest: parts.guest,
            processors: self.read_processors(parts)?,
            devices: parts.devices.save()?,
        })
    }

    fn read(&self, parts: &Parts, options: &SnapshotOptions) -> Result<Taken, Error> {
        let machine = self.read_state(parts)?;
        let memory = &parts.memory;
        let mut changes = lock(&parts.changes);
        let Selection { pages, base } = changes_since(
            options.base.as_ref(),
            &mut changes,
            machine.config.track_dirty_pages,
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
        let witnesses = match all_pages.as_ref().filter(|_| is_since_last) {
            Some(pages) => Witness::find(memory, &facts, pages),
            None => Vec::new(),
        };
        let is_small = base.is_some() && pages.len() * PAGE_SIZE <= MAX_COPY;
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
            machine,
            facts,
            pages: all_pages,
            witnesses,
            read: pages,
            writer,
            copied,
            earlier,
            changes: parts.changes.clone(),
            memory: memory.clone(),
        })
    }

    /// Checks that what was read of guest memory is its content: it may have been lost meanwhile, which ends the machine.
    pub(super) fn require_memory(&self, memory: &GuestMemory) -> Result<(), Error> {
        match memory.is_lost() {
            true => Err(self
                .0
                .wrong_state(&self.0.life(), "read the memory of the machine")),
            false => Ok(()),
        }
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
    /// Those of [`Controller::start`] and of [`Snapshot::check_disks`], and [`Error::Restore`] if the state does not fit the machine or this host.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.check_unchanged()?;
        snapshot.check_disks(&self.configuration()?)?;
        self.0.start(Origin::Snapshot(snapshot))
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
    let stem = image.file_stem().unwrap_or_default();
    // The image may be such an overlay itself, and names must not get longer and longer.
    let first = stem.to_str().and_then(|stem| stem.rsplit_once('-'));
    let is_id = |text: &str| text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let stem = match first {
        Some((first, last)) if is_id(last) => first.as_ref(),
        _ => stem,
    };
    let mut name = OsString::from(stem);
    name.push(format!("-{}.qcow2", id.get(..8).unwrap_or(&id)));
    image.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlay_of_an_overlay_has_a_name_of_the_same_length() {
        let id = SnapshotId([0xab; 16]);
        for (image, expected) in [
            ("/vm/root.img", "/vm/root-abababab.qcow2"),
            ("root-01234567.qcow2", "root-abababab.qcow2"),
            ("root-0123456.qcow2", "root-0123456-abababab.qcow2"),
            ("my-data-disk", "my-data-disk-abababab.qcow2"),
        ] {
            assert_eq!(overlay_of(Path::new(image), id), Path::new(expected));
        }
    }
}
