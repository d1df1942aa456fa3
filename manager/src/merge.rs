//! Overlays that go back into the images below them, once no snapshot keeps these.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use bantam_control::ControlError;
use bantam_storage::job::{CommitJob, JobState};
use bantam_storage::{Disk, DiskOptions, HostOpener, ImageFormat, LockMode};
use bantam_vmm::config::{DeviceName, DiskConfig, MachineConfig};
use bantam_vmm::{Answer, Command, DeviceAnswer, DeviceCommand, DiskJob, JobState as CopyState};

use crate::definition::parse_machine_file;
use crate::error::Error;
use crate::files;
use crate::machine::{Machine, file};
use crate::manager::Manager;
use crate::snapshots::MachineSnapshot;

const ACTION: &str = "merge an overlay of";
/// How long it takes at first, and at most, until a machine is asked again how far its copy is.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

impl Machine {
    /// Merges the overlays of the images that the snapshot `deleted` has kept into these images, unless something else needs
    /// them, or the machine has a managed save. `folder` is that of the snapshot, until this is done.
    ///
    /// The overlays of a machine that does not run may be anywhere in a chain of images ([`Machine::merge_at_rest`]). One that
    /// runs is on the overlay, and keeps it if it cannot be merged now.
    ///
    /// At every moment the machine file names an image that has the disk's content: an overlay hides what has been copied
    /// out of it, and is removed only when nothing names it any more.
    pub(crate) fn merge_overlays(
        &self,
        deleted: &MachineSnapshot,
        folder: &Path,
    ) -> Result<(), Error> {
        if self.has_managed_save() {
            return Ok(());
        }
        let former = parse_machine_file(&deleted.machine_file, &self.machine_file())?;
        let Some(needed) = self.images_that_other_machines_need()? else {
            return Ok(());
        };
        let is_active = self.is_active()?;
        for (name, image) in former.disk_names().zip(&former.disks) {
            let kept = deleted.disks.iter().find(|kept| kept.name == name);
            let Some(kept) = kept.filter(|kept| kept.image == image.path) else {
                continue;
            };
            if !is_active {
                let note = folder.join(format!("merged-{name}.json"));
                self.merge_at_rest(&kept.overlay, image, &note, &needed)?;
                continue;
            }
            let real = fs::canonicalize(&image.path).map_err(Error::file("find", &image.path))?;
            let own = self.images_of_snapshots();
            if needed.contains(&real) || own.unknown.is_some() || own.files.contains(&real) {
                continue;
            }
            // The machine may have gone back to another snapshot meanwhile.
            let config = self.config()?;
            let mut disks = config.disk_names().zip(&config.disks);
            if let Some((_, disk)) =
                disks.find(|(it, disk)| *it == name && disk.path == kept.overlay)
                && let Err(error) = self.commit_running(&name, disk, image)
            {
                tracing::warn!("disk '{name}' keeps its overlay: {error}");
            }
        }
        Ok(())
    }

    /// Has the machine file name the image of `new` where it names that of `old`.
    fn exchange_image(&self, old: &DiskConfig, new: &DiskConfig) -> Result<(), Error> {
        self.update_config(|config| exchange(config, &old.path, new))
    }

    /// Has a machine that runs copy what the image of `overlay`, which is that of disk `name`, holds into `image`, and go on
    /// with that.
    fn commit_running(
        &self,
        name: &DeviceName,
        overlay: &DiskConfig,
        image: &DiskConfig,
    ) -> Result<(), Error> {
        let note = self.file(file::MERGING);
        files::replace(&note, name.as_str()).map_err(Error::file("write", &note))?;
        let merged = self.commit_noted(name, overlay, image);
        files::remove_file(&note).map_err(Error::file("remove", &note))?;
        merged
    }

    fn commit_noted(
        &self,
        name: &DeviceName,
        overlay: &DiskConfig,
        image: &DiskConfig,
    ) -> Result<(), Error> {
        self.command_disk(name, DeviceCommand::StartJob(DiskJob::Commit))?;
        let cancel = |error| {
            // The first error says more, and a job that has failed is none any more.
            let _ = self.command_disk(name, DeviceCommand::CancelJob);
            Err(error)
        };
        if let Err(error) = self.await_commit(name) {
            return cancel(error);
        }
        // Both images are equal from now on until the machine goes on with the lower one, so the machine file may name either
        // meanwhile, and the lower one is right whatever becomes of this process and that of the machine.
        if let Err(error) = self.exchange_image(overlay, image) {
            return cancel(error);
        }
        match self.command_disk(name, DeviceCommand::FinishJob) {
            Err(
                error @ Error::Control {
                    source: ControlError::Refused(_),
                    ..
                },
            ) => {
                self.exchange_image(image, overlay)?;
                cancel(error)
            }
            result => result.map(drop),
        }
    }

    /// Finishes or cancels the merge of an overlay whose command was killed, while the machine ran.
    pub(crate) fn mend_merge(&self) -> Result<(), Error> {
        let note = self.file(file::MERGING);
        let Ok(text) = fs::read_to_string(&note) else {
            return Ok(());
        };
        if let (true, Ok(name)) = (self.is_active()?, text.parse()) {
            self.await_commands()?;
            self.end_commit(&name)?;
        }
        files::remove_file(&note).map_err(Error::file("remove", &note))?;
        self.remove_unused()
    }

    fn end_commit(&self, name: &DeviceName) -> Result<(), Error> {
        let image = |config: &MachineConfig| {
            let mut disks = config.disk_names().zip(&config.disks);
            disks
                .find(|(it, _)| it == name)
                .map(|(_, disk)| disk.clone())
        };
        let (Some(live), Some(stored)) = (image(&self.live_config()?), image(&self.config()?))
        else {
            return Ok(());
        };
        let command = match live.path == stored.path {
            true => DeviceCommand::CancelJob,
            false => DeviceCommand::FinishJob,
        };
        match self.command_disk(name, command) {
            // There is no job any more: what the machine goes on with is right.
            Err(Error::Control {
                source: ControlError::Refused(_),
                ..
            }) => self.exchange_image(&stored, &live),
            result => result.map(drop),
        }
    }

    /// Waits until the copy that a commit makes is complete.
    fn await_commit(&self, name: &DeviceName) -> Result<(), Error> {
        let mut pause = FIRST_PAUSE;
        loop {
            let state = match self.command_disk(name, DeviceCommand::Job)? {
                Answer::Device(DeviceAnswer::Job(Some(status))) => status.state,
                _ => return Err(self.unexpected(ACTION)),
            };
            let reason = match state {
                CopyState::Ready => return Ok(()),
                CopyState::Copying => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    continue;
                }
                CopyState::Failed { reason } => reason,
                CopyState::Ending | CopyState::Finished | CopyState::Cancelled => {
                    "the copy has been ended by another command".to_owned()
                }
            };
            return Err(self.refused(ACTION, reason));
        }
    }

    fn command_disk(&self, name: &DeviceName, command: DeviceCommand) -> Result<Answer, Error> {
        let name = name.clone();
        self.execute(ACTION, Command::Device { name, command })
    }

    /// Returns the images that other machines need; `None` if there may be more.
    fn images_that_other_machines_need(&self) -> Result<Option<HashSet<PathBuf>>, Error> {
        let others = Manager::new(self.folders.clone()).machines()?;
        let others = others.iter().filter(|other| other.name() != self.name());
        let mut files = HashSet::new();
        for needed in others.map(Machine::needed_images) {
            if let Some(reason) = needed.unknown {
                tracing::warn!(
                    "overlays stay, as it is not known which images are needed: {reason}"
                );
                return Ok(None);
            }
            files.extend(needed.files);
        }
        Ok(Some(files))
    }
}

/// Has a machine use the image of `new` where it uses `old`.
pub(crate) fn exchange(config: &mut MachineConfig, old: &Path, new: &DiskConfig) {
    if let Some(disk) = config.disks.iter_mut().find(|it| it.path == old) {
        disk.path.clone_from(&new.path);
        disk.format = new.format;
        disk.backing = new.backing;
    }
}

/// Copies what the image of `disk` holds into its backing file.
pub(crate) fn commit(disk: &DiskConfig) -> Result<(), Error> {
    let refused = |reason: String| Error::Image {
        path: disk.path.display().to_string(),
        reason,
    };
    let options = DiskOptions {
        format: Some(ImageFormat::Qcow2),
        backing: true,
        lock: LockMode::WherePossible,
        any_size: true,
        ..DiskOptions::default()
    };
    let opened = Disk::open_by(&HostOpener, &disk.path, &options);
    let opened = opened.and_then(|disk| disk.to_formatted(&HostOpener));
    let opened = opened.map_err(|error| refused(error.to_string()))?;
    let job = CommitJob::open(&HostOpener, &opened, 1);
    let job = job.map_err(|error| refused(error.to_string()))?;
    if let JobState::Failed(reason) = job.copy().run() {
        return Err(refused(reason));
    }
    let switched = job.copy().begin_switch();
    switched.map_err(|error| refused(error.to_string()))
}
