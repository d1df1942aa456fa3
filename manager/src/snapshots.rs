//! Snapshots of named machines: disks and, of a machine that runs, memory.
//!
//! A snapshot keeps the images that the disks had, and the machine goes on with overlays of them. What is planned is
//! written down before the machine does it ([`MachineSnapshot`]), so a command that is killed leaves a snapshot that counts or none:
//! the next one that changes the machine finishes it, or takes it back ([`Machine::mend`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bantam_control::ControlError;
use bantam_vmm::config::{DeviceName, MachineConfig};
use bantam_vmm::{Command, DiskSnapshot, SnapshotDisks, SnapshotFiles, SnapshotOptions};
use serde::{Deserialize, Serialize};

use crate::definition::{machine_file, parse_machine_file};
use crate::error::Error;
use crate::files;
use crate::history::{EndReason, RunOrigin, now};
use crate::images::{create_overlay, use_overlay};
use crate::machine::{Change, Machine, file};
use crate::name::MachineName;
use crate::saved::WRITE_TIME;
use crate::start::Launch;

/// The file with what is known of a snapshot.
const RECORD: &str = "snapshot.json";
/// Begins the name of the folder of a snapshot that is not complete.
const NEW: &str = ".new-";
/// Begins the name of the folder of a snapshot that is being removed.
const GONE: &str = ".gone-";

/// A snapshot of a named machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineSnapshot {
    /// Its name.
    pub name: MachineName,
    /// When it was taken, in seconds since 1970.
    pub created: u64,
    /// The snapshot that the machine had made or gone back to before.
    pub parent: Option<String>,
    /// Whether it has the memory of a machine that ran.
    pub has_memory: bool,
    /// What its owner says of it.
    pub description: Option<String>,
    /// The disks that could be written to, and the images that the snapshot keeps.
    pub disks: Vec<KeptDisk>,
    /// The machine file, with the images that the snapshot keeps.
    pub machine_file: String,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct KeptDisk {
    /// The disk.
    pub name: DeviceName,
    /// The image that it had, which stays as it is.
    pub image: PathBuf,
    /// The overlay that it has gone on with.
    pub overlay: PathBuf,
}

/// How a snapshot is taken.
#[derive(Clone, Debug, Default)]
pub struct SnapshotPlan {
    /// Its name; by default the time in seconds since 1970.
    pub name: Option<MachineName>,
    /// What its owner says of it.
    pub description: Option<String>,
    /// Leaves out the memory of a machine that runs.
    pub disk_only: bool,
}

impl Machine {
    /// Returns the snapshots, the oldest first.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn snapshots(&self) -> Result<Vec<MachineSnapshot>, Error> {
        let folder = self.file(file::SNAPSHOTS);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("read", &folder)(error)),
        };
        let mut snapshots = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::file("read", &folder))?;
            let is_name = entry.file_name().to_str().map(str::parse::<MachineName>);
            if matches!(is_name, Some(Ok(_))) {
                snapshots.push(read_record(&entry.path())?);
            }
        }
        snapshots.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
        Ok(snapshots)
    }

    /// Returns the snapshot called `name`.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn snapshot(&self, name: &MachineName) -> Result<MachineSnapshot, Error> {
        let folder = self.snapshot_folder(name);
        match folder.exists() {
            true => read_record(&folder),
            false => Err(self.refused(
                "find a snapshot of",
                format!(
                    "it has none called '{name}'; `bantam snapshot list {}` shows those that it has",
                    self.name()
                ),
            )),
        }
    }

    /// Returns the folder of a snapshot. If it has memory, that is in the files `state` and `memory` there.
    pub fn snapshot_folder(&self, name: &MachineName) -> PathBuf {
        self.file(file::SNAPSHOTS).join(name.as_str())
    }

    /// Takes a snapshot of all disks at one instant and, if the machine runs and nothing else is asked for, of its memory.
    /// The machine goes on with overlays.
    ///
    /// # Errors
    /// If there is a snapshot of that name, another command is at work on the machine, or the host or the machine refuses
    /// it; then the machine is as it was.
    pub fn take_named_snapshot(&self, plan: &SnapshotPlan) -> Result<MachineSnapshot, Error> {
        let change = self.change("take a snapshot of")?;
        self.mend(&change)?;
        self.take_snapshot_with(&change, plan)
    }

    /// The same for a command that has the right to change the machine.
    pub(crate) fn take_snapshot_with(
        &self,
        _change: &Change,
        plan: &SnapshotPlan,
    ) -> Result<MachineSnapshot, Error> {
        let action = "take a snapshot of";
        self.require_persistent(action)?;
        if self.has_managed_save() {
            let reason = "it has a managed save, whose disks must not change; start it, or remove that first";
            return Err(self.refused(action, reason));
        }
        let name = match &plan.name {
            Some(name) => name.clone(),
            None => now().to_string().parse()?,
        };
        if self.snapshot_folder(&name).exists() {
            return Err(self.refused(action, format!("it has one called '{name}' already")));
        }
        let is_active = self.is_active()?;
        let config = self.config()?;
        let overlays = self.new_overlays(&config)?;
        let mut settings = self.settings()?;
        let record = MachineSnapshot {
            name: name.clone(),
            created: now(),
            parent: settings.current_snapshot.clone(),
            has_memory: is_active && !plan.disk_only,
            description: plan.description.clone(),
            disks: kept_disks(&config, &overlays),
            machine_file: machine_file(&config),
        };
        let new = self.file(file::SNAPSHOTS).join(format!("{NEW}{name}"));
        files::create_folders(&new).map_err(Error::file("create", &new))?;
        let path = new.join(RECORD);
        let text = serde_json::to_string(&record).map_err(io::Error::from);
        let written = text
            .and_then(|text| files::replace(&path, &text))
            .map_err(Error::file("write", &path));
        let taken = written.and_then(|()| match is_active {
            true => self.snapshot_running(&record, &new),
            false => snapshot_at_rest(&config, &record),
        });
        if let Err(error) = taken {
            for disk in &record.disks {
                // It is there only if the machine has not gone on with it.
                let _ = files::remove_file(&disk.overlay);
            }
            // The first error says more.
            let _ = files::remove_folder(&new);
            return Err(error);
        }
        self.finish_snapshot(&record, &new)?;
        settings.current_snapshot = Some(name.to_string());
        self.write_settings(&settings)?;
        Ok(record)
    }

    fn snapshot_running(&self, record: &MachineSnapshot, folder: &Path) -> Result<(), Error> {
        let action = "take a snapshot of";
        let live = self.live_config()?;
        let images = |config: &MachineConfig| -> Vec<_> {
            config.disks.iter().map(|disk| disk.path.clone()).collect()
        };
        if images(&live) != images(&self.config()?) {
            let reason = "its machine file has other disks than it runs with; end it and start it again first";
            return Err(self.refused(action, reason));
        }
        let disks: Vec<_> = record
            .disks
            .iter()
            .map(|disk| DiskSnapshot {
                disk: disk.name.clone(),
                path: disk.overlay.clone(),
            })
            .collect();
        if record.has_memory {
            let options = SnapshotOptions {
                disks: match disks.is_empty() {
                    true => SnapshotDisks::Overlays,
                    false => SnapshotDisks::OverlaysAt(disks),
                },
                ..SnapshotOptions::new(SnapshotFiles::in_directory(folder))
            };
            return self.take_snapshot(action, options).map(drop);
        }
        match disks.is_empty() {
            true => Ok(()),
            false => self
                .execute(action, Command::SnapshotDisks(disks))
                .map(drop),
        }
    }

    /// Has the machine file name the overlays, and the snapshot count.
    fn finish_snapshot(&self, record: &MachineSnapshot, folder: &Path) -> Result<(), Error> {
        self.update_config(|config| {
            let names: Vec<_> = config.disk_names().collect();
            for (disk, name) in config.disks.iter_mut().zip(names) {
                let kept = record.disks.iter().find(|kept| kept.name == name);
                if let Some(kept) = kept.filter(|kept| kept.image == disk.path) {
                    use_overlay(disk, &kept.overlay);
                }
            }
        })?;
        let target = self.snapshot_folder(&record.name);
        fs::rename(folder, &target).map_err(Error::file("create", &target))?;
        let snapshots = self.file(file::SNAPSHOTS);
        files::sync_folder(&snapshots).map_err(Error::file("write", &snapshots))
    }

    /// Finishes what a command has left that was killed: a snapshot whose disks have gone on with their overlays counts,
    /// another one is taken back, and one that was being deleted is gone.
    pub(crate) fn mend(&self, _change: &Change) -> Result<(), Error> {
        self.mend_merge()?;
        self.mend_identity()?;
        let folder = self.file(file::SNAPSHOTS);
        let Ok(entries) = fs::read_dir(&folder) else {
            return Ok(());
        };
        let names: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        for path in names {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(GONE) {
                if let Ok(record) = read_record(&path)
                    && let Err(error) = self.merge_overlays(&record, &path)
                {
                    tracing::warn!("an overlay stays: {error}");
                }
                let removed = self.remove_unused();
                files::remove_folder(&path).map_err(Error::file("remove", &path))?;
                removed?;
            } else if name.starts_with(NEW) {
                self.mend_snapshot(&path)?;
            }
        }
        Ok(())
    }

    /// Returns whether a command that was killed has left something that [`Machine::mend`] finishes.
    pub(crate) fn needs_mending(&self) -> bool {
        let is_left = |entry: io::Result<fs::DirEntry>| {
            let name = entry.map(|entry| entry.file_name());
            let name = name.unwrap_or_default();
            let name = name.to_string_lossy();
            name.starts_with(GONE) || name.starts_with(NEW)
        };
        let snapshots = fs::read_dir(self.file(file::SNAPSHOTS));
        self.file(file::MERGING).exists()
            || self.file(file::SYSPREP).exists()
            || snapshots.is_ok_and(|mut entries| entries.any(is_left))
    }

    /// Waits until the machine has executed the commands of clients that have gone, which are executed one after another.
    pub(crate) fn await_commands(&self) -> Result<(), Error> {
        let action = "take a snapshot of";
        let mut client = self.connect(action)?;
        client.set_answer_time(WRITE_TIME);
        match client.execute(Command::SnapshotDisks(Vec::new())) {
            // A machine that is about to end may refuse it.
            Ok(_) | Err(ControlError::Refused(_) | ControlError::Ended) => Ok(()),
            Err(error) => Err(self.control_error(action, error)),
        }
    }

    fn mend_snapshot(&self, folder: &Path) -> Result<(), Error> {
        let remove = || files::remove_folder(folder).map_err(Error::file("remove", folder));
        let Ok(record) = read_record(folder) else {
            // Nothing was done before it was written.
            return remove();
        };
        let has_state = !record.has_memory || folder.join("state").exists();
        let has_gone_on = match self.is_active()? {
            true => {
                self.await_commands()?;
                let live = self.live_config()?;
                let mut disks = record.disks.iter();
                disks.all(|kept| live.disks.iter().any(|disk| disk.path == kept.overlay))
            }
            // A machine that has ended may have written to those that are there.
            false => record.disks.iter().all(|kept| kept.overlay.exists()),
        };
        match (has_gone_on, has_state) {
            (true, true) => self.finish_snapshot(&record, folder),
            (true, false) => {
                let disk_only = MachineSnapshot {
                    has_memory: false,
                    ..record
                };
                let path = folder.join(RECORD);
                let text = serde_json::to_string(&disk_only).map_err(io::Error::from);
                text.and_then(|text| files::replace(&path, &text))
                    .map_err(Error::file("write", &path))?;
                self.finish_snapshot(&disk_only, folder)
            }
            (false, _) => {
                for kept in &record.disks {
                    let path = &kept.overlay;
                    files::remove_file(path).map_err(Error::file("remove", path))?;
                }
                remove()
            }
        }
    }

    /// Brings the machine back to where it was at a snapshot. One that runs ends as if its power were cut. If the snapshot
    /// has memory, the machine goes on from there, and otherwise it is shut off. All that its disks have been given since
    /// is lost, unless another snapshot keeps it.
    ///
    /// # Errors
    /// If there is no such snapshot, its images have been changed, another command is at work on the machine, or the host
    /// refuses it.
    pub fn revert(&self, name: &MachineName) -> Result<MachineSnapshot, Error> {
        let change = self.change("revert")?;
        self.mend(&change)?;
        let record = self.snapshot(name)?;
        let folder = self.snapshot_folder(name);
        let mut config = parse_machine_file(&record.machine_file, &self.machine_file())?;
        if self.is_active()? {
            self.destroy(None)?;
            self.note_end(EndReason::Reverted)?;
        }
        let overlays = self.new_overlays(&config)?;
        let names: Vec<_> = config.disk_names().collect();
        for (disk, name) in config.disks.iter_mut().zip(names) {
            if let Some((_, overlay)) = overlays.iter().find(|(it, _)| *it == name) {
                create_overlay(disk, overlay)?;
                use_overlay(disk, overlay);
            }
        }
        self.write_config(&machine_file(&config))?;
        let save = self.file(file::SAVE);
        files::remove_folder(&save).map_err(Error::file("remove", &save))?;
        let mut settings = self.settings()?;
        settings.current_snapshot = Some(name.to_string());
        self.write_settings(&settings)?;
        if record.has_memory {
            self.launch(
                &change,
                &Launch {
                    from: Some((&folder, RunOrigin::Reverted)),
                    ..Launch::default()
                },
            )?;
        }
        self.remove_unused()?;
        Ok(record)
    }

    /// Deletes a snapshot. The images that it keeps stay as long as the machine or another snapshot needs them. Their overlays
    /// go back into them, if nothing else needs these.
    ///
    /// # Errors
    /// If there is no such snapshot, another command is at work on the machine, or the host refuses it.
    pub fn delete_snapshot(&self, name: &MachineName) -> Result<(), Error> {
        let change = self.change("delete a snapshot of")?;
        self.mend(&change)?;
        self.delete_snapshot_with(&change, name)
    }

    /// The same for a command that has the right to change the machine.
    pub(crate) fn delete_snapshot_with(
        &self,
        _change: &Change,
        name: &MachineName,
    ) -> Result<(), Error> {
        let record = self.snapshot(name)?;
        for mut child in self.snapshots()? {
            if child.parent.as_deref() == Some(name.as_str()) {
                child.parent.clone_from(&record.parent);
                self.write_record(&child)?;
            }
        }
        let mut settings = self.settings()?;
        if settings.current_snapshot.as_deref() == Some(name.as_str()) {
            settings.current_snapshot.clone_from(&record.parent);
            self.write_settings(&settings)?;
        }
        let folder = self.snapshot_folder(name);
        let gone = self.file(file::SNAPSHOTS).join(format!("{GONE}{name}"));
        fs::rename(&folder, &gone).map_err(Error::file("remove", &folder))?;
        let merged = self.merge_overlays(&record, &gone);
        let removed = merged.and_then(|()| self.remove_unused());
        // The folder goes last: another command finds it, and does all this, if this one is killed.
        files::remove_folder(&gone).map_err(Error::file("remove", &gone))?;
        removed
    }

    /// Writes what is known of a snapshot.
    pub(crate) fn write_record(&self, snapshot: &MachineSnapshot) -> Result<(), Error> {
        let path = self.snapshot_folder(&snapshot.name).join(RECORD);
        let text = serde_json::to_string(snapshot).map_err(io::Error::from);
        text.and_then(|text| files::replace(&path, &text))
            .map_err(Error::file("write", &path))
    }

    /// Removes the overlays that nothing needs any more.
    pub(crate) fn remove_unused(&self) -> Result<(), Error> {
        let snapshots = self.snapshots()?;
        let kept = snapshots.iter().flat_map(|snapshot| &snapshot.disks);
        let images: Vec<_> = kept.map(|kept| kept.image.clone()).collect();
        self.remove_unused_overlays(&images)
    }
}

fn kept_disks(config: &MachineConfig, overlays: &[(DeviceName, PathBuf)]) -> Vec<KeptDisk> {
    let disks = config.disk_names().zip(&config.disks);
    let kept = disks.filter_map(|(name, disk)| {
        let (_, overlay) = overlays.iter().find(|(it, _)| *it == name)?;
        Some(KeptDisk {
            name,
            image: disk.path.clone(),
            overlay: overlay.clone(),
        })
    });
    kept.collect()
}

/// Takes a snapshot of a machine that does not run: its disks get overlays.
fn snapshot_at_rest(config: &MachineConfig, record: &MachineSnapshot) -> Result<(), Error> {
    for (name, disk) in config.disk_names().zip(&config.disks) {
        if let Some(kept) = record.disks.iter().find(|kept| kept.name == name) {
            create_overlay(disk, &kept.overlay)?;
        }
    }
    Ok(())
}

fn read_record(folder: &Path) -> Result<MachineSnapshot, Error> {
    let path = folder.join(RECORD);
    let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    serde_json::from_str(&text).map_err(|error| Error::file("read", &path)(error.into()))
}
