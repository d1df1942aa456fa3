//! Which image files machines need: those of their disks and of their snapshots, with all backing files.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use bantam_storage::tools::{Purpose, open};
use bantam_vmm::config::DiskConfig;

use crate::definition::parse_machine_file;
use crate::error::Error;
use crate::images::format_of;
use crate::machine::Machine;

/// Image files that are needed.
#[derive(Debug, Default)]
pub(crate) struct NeededImages {
    /// Those that are known, without links in their paths.
    pub(crate) files: HashSet<PathBuf>,
    /// Why there may be more, if so.
    pub(crate) unknown: Option<String>,
}

impl NeededImages {
    /// Adds the image of a disk and its backing files.
    fn add(&mut self, disk: &DiskConfig) {
        let Ok(path) = fs::canonicalize(&disk.path) else {
            // One that is not there is based on nothing.
            return;
        };
        if !self.files.insert(path) {
            return;
        }
        match open(&disk.path, Some(format_of(disk)), Purpose::ReadShared) {
            Ok(opened) => {
                let files = opened.files.iter();
                self.files
                    .extend(files.filter_map(|path| fs::canonicalize(path).ok()));
            }
            Err(error) => self.unknown = Some(error.to_string()),
        }
    }
}

impl Machine {
    /// Returns the images of the disks and of the snapshots.
    pub(crate) fn needed_images(&self) -> NeededImages {
        let mut needed = self.images_of_snapshots();
        match self.config() {
            Ok(config) => config.disks.iter().for_each(|disk| needed.add(disk)),
            Err(error) => needed.unknown = Some(error.to_string()),
        }
        needed
    }

    /// Returns the images of the snapshots.
    pub(crate) fn images_of_snapshots(&self) -> NeededImages {
        let mut needed = NeededImages::default();
        if let Err(error) = self.add_snapshots(&mut needed) {
            needed.unknown = Some(error.to_string());
        }
        needed
    }

    /// Returns an error if an image in the machine's folder is based on another there, which it knows by its path.
    pub(crate) fn require_independent_images(&self, action: &'static str) -> Result<(), Error> {
        let home = fs::canonicalize(self.folder()).map_err(Error::file("find", self.folder()))?;
        let disks = self.config()?.disks.into_iter();
        let disks: HashSet<_> = disks
            .filter_map(|disk| fs::canonicalize(disk.path).ok())
            .collect();
        let mut own = self.needed_images().files.into_iter();
        match own.any(|image| image.starts_with(&home) && !disks.contains(&image)) {
            true => {
                let reason = "its disks are overlays of images in its folder; clone it under the other name instead (bantam clone)";
                Err(self.refused(action, reason))
            }
            false => Ok(()),
        }
    }

    fn add_snapshots(&self, needed: &mut NeededImages) -> Result<(), Error> {
        for snapshot in self.snapshots()? {
            let config = parse_machine_file(&snapshot.machine_file, &self.machine_file())?;
            config.disks.iter().for_each(|disk| needed.add(disk));
        }
        Ok(())
    }
}
