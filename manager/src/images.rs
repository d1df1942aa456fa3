//! The overlays of a machine's disks.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bantam_storage::qcow2::MAX_DEPTH;
use bantam_storage::tools::{self, Format, NewContent, Purpose, open};
use bantam_storage::{ImageFormat, Options};
use bantam_vmm::config::{DeviceName, DiskConfig, DiskFormatOption, MachineConfig};

use crate::error::Error;
use crate::files;
use crate::machine::{Machine, file};

/// Returns the format of a disk's image.
pub(crate) fn format_of(disk: &DiskConfig) -> Format {
    match (disk.format, ImageFormat::of_name(&disk.path)) {
        (Some(DiskFormatOption::Qcow2), _) | (None, ImageFormat::Qcow2) => Format::Qcow2,
        (Some(DiskFormatOption::Raw), _) | (None, ImageFormat::Raw) => Format::Raw,
    }
}

/// Makes an empty image at `overlay` whose backing file is the image of `disk`.
pub(crate) fn create_overlay(disk: &DiskConfig, overlay: &Path) -> Result<(), Error> {
    create_overlay_of_size(disk, overlay, None)
}

/// The same with a disk of at least `size` bytes, or else of the size of the image.
pub(crate) fn create_overlay_of_size(
    disk: &DiskConfig,
    overlay: &Path,
    size: Option<u64>,
) -> Result<(), Error> {
    let refused = |reason: String| Error::Image {
        path: overlay.display().to_string(),
        reason,
    };
    let format = format_of(disk);
    let backing = disk.path.to_str();
    let backing =
        backing.ok_or_else(|| refused("its backing file has a name that is not UTF-8".into()))?;
    let opened = open(&disk.path, Some(format), Purpose::Read);
    let opened = opened.map_err(|error| refused(error.to_string()))?;
    if opened.files.len() >= MAX_DEPTH {
        return Err(refused(format!(
            "a chain has {MAX_DEPTH} files at most; delete snapshots, or merge images (bantam image commit)"
        )));
    }
    let mut options = Options::default();
    options.set("backing_file", backing);
    options.set("backing_fmt", &format.to_string());
    let backing_size = opened.image.size();
    let size = size.unwrap_or(backing_size);
    if size < backing_size {
        return Err(Error::Store {
            action: "use",
            name: backing.to_owned(),
            reason: format!(
                "its disk has {backing_size} bytes, and an overlay cannot be smaller; give a larger size"
            ),
        });
    }
    let content = NewContent {
        compress: false,
        backing: Some(opened.image),
    };
    let created = tools::create(overlay, Format::Qcow2, size, options, content);
    let created = created.map_err(|error| refused(error.to_string()))?;
    let finished = created.target.finish(true);
    if finished.is_err() {
        created.remove();
    }
    finished.map_err(|error| refused(error.to_string()))
}

/// Has a disk use `overlay`.
pub(crate) fn use_overlay(disk: &mut DiskConfig, overlay: &Path) {
    disk.path = overlay.to_path_buf();
    disk.format = Some(DiskFormatOption::Qcow2);
    disk.backing = true;
}

impl Machine {
    /// Chooses paths for new overlays of the disks that can be written to.
    pub(crate) fn new_overlays(
        &self,
        config: &MachineConfig,
    ) -> Result<Vec<(DeviceName, PathBuf)>, Error> {
        let folder = self.file(file::DISKS);
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let stamp = since.unwrap_or_default().as_nanos();
        let written: Vec<_> = config
            .disk_names()
            .zip(&config.disks)
            .filter(|(_, disk)| !disk.readonly)
            .map(|(name, _)| {
                let path = folder.join(format!("{name}-{stamp:x}.qcow2"));
                (name, path)
            })
            .collect();
        if !written.is_empty() {
            files::create_folders(&folder).map_err(Error::file("create", &folder))?;
        }
        Ok(written)
    }

    /// Removes the overlays that neither the machine nor one of `images` needs.
    pub(crate) fn remove_unused_overlays(&self, images: &[PathBuf]) -> Result<(), Error> {
        let folder = self.file(file::DISKS);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::file("read", &folder)(error)),
        };
        let disks = self.config()?.disks;
        let own = disks
            .iter()
            .map(|disk| (disk.path.clone(), format_of(disk)));
        // All that are in the folder have this format.
        let in_folder = images.iter().filter(|image| image.starts_with(&folder));
        let kept = in_folder.map(|image| (image.clone(), Format::Qcow2));
        let mut used = HashSet::new();
        for (path, format) in own.chain(kept) {
            let opened = open(&path, Some(format), Purpose::ReadShared);
            match opened {
                Ok(opened) => used.extend(opened.files),
                // What it needs is not known, so nothing is removed.
                Err(error) => {
                    tracing::warn!("{error}");
                    return Ok(());
                }
            }
        }
        let used: HashSet<_> = used
            .iter()
            .filter_map(|path| fs::canonicalize(path).ok())
            .collect();
        let mut is_empty = true;
        for entry in entries {
            let path = entry.map_err(Error::file("read", &folder))?.path();
            let real = fs::canonicalize(&path).map_err(Error::file("find", &path))?;
            match used.contains(&real) {
                true => is_empty = false,
                false => files::remove_file(&path).map_err(Error::file("remove", &path))?,
            }
        }
        if is_empty {
            files::remove_folder(&folder).map_err(Error::file("remove", &folder))?;
        }
        Ok(())
    }
}
