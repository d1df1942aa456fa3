//! Overlays that go back into the images below them, once no snapshot keeps these.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use bantam_storage::job::{CommitJob, JobState};
use bantam_storage::{Disk, DiskOptions, HostOpener, ImageFormat, LockMode};
use bantam_vmm::config::DiskConfig;

use crate::definition::parse_machine_file;
use crate::error::Error;
use crate::images::chain;
use crate::machine::Machine;
use crate::manager::Manager;
use crate::snapshots::MachineSnapshot;

impl Machine {
    /// Has the disks go on with the images that the snapshot `deleted` has kept, with what their overlays hold, unless
    /// another snapshot or another machine needs these images, or the machine runs or has a managed save.
    ///
    /// At every moment the machine file names an image that has the disk's content: an overlay hides what has been copied
    /// out of it, and is removed only when nothing names it any more.
    pub(crate) fn merge_overlays(&self, deleted: &MachineSnapshot) -> Result<(), Error> {
        if self.is_active()? || self.has_managed_save() {
            return Ok(());
        }
        let config = self.config()?;
        let former = parse_machine_file(&deleted.machine_file, &self.machine_file())?;
        let mut needed = None;
        for (name, disk) in config.disk_names().zip(&config.disks) {
            let kept = deleted.disks.iter().find(|kept| kept.name == name);
            let image = former.disk_names().zip(&former.disks);
            let image = image
                .filter(|(it, _)| *it == name)
                .map(|(_, disk)| disk)
                .next();
            let (Some(kept), Some(image)) = (kept, image) else {
                continue;
            };
            // The machine may have gone back to another snapshot meanwhile.
            if disk.path != kept.overlay || image.path != kept.image {
                continue;
            }
            if needed.is_none() {
                needed = Some(self.images_that_others_need()?);
            }
            let real = fs::canonicalize(&image.path).map_err(Error::file("find", &image.path))?;
            if needed.iter().flatten().any(|needed| *needed == real) {
                continue;
            }
            commit(disk)?;
            self.update_config(|config| {
                if let Some(disk) = config.disks.iter_mut().find(|it| it.path == kept.overlay) {
                    disk.path.clone_from(&image.path);
                    disk.format = image.format;
                    disk.backing = image.backing;
                }
            })?;
        }
        Ok(())
    }

    /// Returns the images, with their backing files, of the snapshots and of all other machines.
    fn images_that_others_need(&self) -> Result<HashSet<PathBuf>, Error> {
        let mut needed = HashSet::new();
        let mut add = |disks: &[DiskConfig]| needed.extend(disks.iter().flat_map(chain));
        for snapshot in self.snapshots()? {
            add(&parse_machine_file(&snapshot.machine_file, &self.machine_file())?.disks);
        }
        for other in Manager::new(self.folders.clone()).machines()? {
            if other.name() == self.name() {
                continue;
            }
            if let Ok(config) = other.config() {
                add(&config.disks);
            }
            for snapshot in other.snapshots().unwrap_or_default() {
                add(&parse_machine_file(&snapshot.machine_file, &other.machine_file())?.disks);
            }
        }
        Ok(needed)
    }
}

/// Copies what the image of `disk` holds into its backing file.
fn commit(disk: &DiskConfig) -> Result<(), Error> {
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
