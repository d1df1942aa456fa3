//! Overlays that go back into the images below them, once no snapshot keeps these.

use std::collections::HashSet;
use std::fs;
use std::iter;
use std::path::PathBuf;

use bantam_storage::job::{CommitJob, JobState};
use bantam_storage::{Disk, DiskOptions, HostOpener, ImageFormat, LockMode};
use bantam_vmm::config::DiskConfig;

use crate::definition::parse_machine_file;
use crate::error::Error;
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
        let Some(needed) = self.images_that_others_need()? else {
            return Ok(());
        };
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
            let real = fs::canonicalize(&image.path).map_err(Error::file("find", &image.path))?;
            if needed.contains(&real) {
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

    /// Returns the images that snapshots or other machines need; `None` if there may be more.
    fn images_that_others_need(&self) -> Result<Option<HashSet<PathBuf>>, Error> {
        let others = Manager::new(self.folders.clone()).machines()?;
        let others = others.iter().filter(|other| other.name() != self.name());
        let mut files = HashSet::new();
        for needed in
            iter::once(self.images_of_snapshots()).chain(others.map(Machine::needed_images))
        {
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
