//! Copies into an image what its backing files hold.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Control, JobError, JobState, WINDOW, as_qcow2};
use crate::disk::FormattedDisk;
use crate::qcow2::{BackingName, Error};
use crate::raw::ImageFormat;
use crate::{DiskLayer, Image};

/// Copies into the image of a disk, while its guest uses it, what comes from its backing files, and then has it do
/// without them.
///
/// The guest's requests go to the image as ever: whatever the image does not hold is copied under the locks that a
/// write takes, so a write of the guest comes before or after it and is never undone. When the job is ready, the image
/// needs the backing files no more, on stable storage. The numbers of files in the answers of [`Image::map`] stay what
/// they are.
///
/// A job that has failed or is cancelled leaves an image that reads as before, has its backing files, and holds more
/// itself. No internal snapshot may be applied to the image while the job runs.
#[derive(Debug)]
pub struct PullJob {
    image: Arc<dyn Image>,
    /// The number of layers that become one.
    layers: Option<usize>,
    /// The name of the backing file that is left.
    name: Option<BackingName>,
    control: Control,
}

impl PullJob {
    /// Prepares to copy the first `layers` layers of a disk into one: 2 stands for the image and its backing file,
    /// `None` for all.
    ///
    /// # Errors
    /// If the image is not a writable qcow2 image with that many layers and one more, or has snapshots, which need
    /// the backing files.
    pub fn new(disk: &FormattedDisk, layers: Option<usize>) -> Result<PullJob, JobError> {
        let image = Arc::clone(disk.image());
        let qcow2 = as_qcow2(&*image).ok_or(JobError::NotQcow2)?;
        if qcow2.is_read_only() {
            return Err(JobError::ReadOnly("the disk"));
        }
        if qcow2.backing().is_none() {
            return Err(JobError::Depth(1));
        }
        qcow2.check_unneeded_by_snapshots()?;
        let name = match layers {
            None => None,
            Some(layers) => {
                let rest = qcow2.layer_below(Some(layers)).ok().flatten();
                let rest = rest.and_then(|rest| disk.layers().get(rest.distance));
                let (Some(rest), Some(image)) = (rest, disk.layers().first()) else {
                    return Err(JobError::Depth(layers));
                };
                Some(backing_name(rest, &image.path)?)
            }
        };
        let total = image.size();
        Ok(PullJob {
            image,
            layers,
            name,
            control: Control::new(total),
        })
    }

    /// Returns what watches and ends the job.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Copies, until everything is copied and the image has lost the backing files, or the job ends otherwise. Returns
    /// the state of the job.
    pub fn run(&self) -> JobState {
        if let Err(error) = self.pull() {
            self.control.fail(&error.to_string());
        }
        self.control.state()
    }

    fn pull(&self) -> Result<(), Error> {
        let Some(image) = as_qcow2(&*self.image) else {
            return Ok(());
        };
        let mut next = 0;
        while self.control.is_live() {
            // The size can change meanwhile.
            let size = image.size();
            if next >= size {
                if self.control.seal() {
                    image.finish_pull(self.layers, self.name.clone())?;
                    self.control.become_ready();
                }
                break;
            }
            let pulled = image.pull(next..next.saturating_add(WINDOW).min(size), self.layers);
            let pulled = pulled.map_err(|error| Error::Io {
                action: "copy from the backing file",
                error,
            })?;
            next += pulled.max(1);
            self.control.set_done(next.min(size));
        }
        Ok(())
    }
}

/// Returns the name by which an image at `image` finds the backing file `layer`.
fn backing_name(layer: &DiskLayer, image: &Path) -> Result<BackingName, Error> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|error| Error::Io {
            action: "find the path of the backing file",
            error,
        })
    };
    let folder = |path: &Path| path.parent().map(PathBuf::from);
    let (layer_path, image) = (absolute(&layer.path)?, absolute(image)?);
    let name = match layer_path.file_name() {
        Some(name) if folder(&layer_path) == folder(&image) => PathBuf::from(name),
        _ => layer_path,
    };
    let name = name.into_os_string().into_string().map_err(|_| {
        let error = "the path of the backing file is not text";
        Error::NotPossible(error.to_owned())
    })?;
    let format = match layer.format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
    };
    Ok(BackingName {
        name,
        format: Some(format.to_owned()),
    })
}
