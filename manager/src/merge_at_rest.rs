//! Overlays of a machine that does not run, which go back into the images below them: at the top of a chain of images or
//! within it.
//!
//! When an overlay has been copied into the image below it, both have the same content, and all that names the overlay is
//! changed to name the image, one after the other: the machine file, snapshots, and overlays above. Each of them is right
//! before its change and after it. A note says meanwhile that the copy is complete, so that another command goes on with the
//! changes if this one is killed. Without the note, the copy begins anew.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bantam_storage::qcow2::{BackingName, Qcow2};
use bantam_storage::tools::{Purpose, open, open_file_of_qcow2};
use bantam_vmm::config::DiskConfig;
use serde::{Deserialize, Serialize};

use crate::definition::parse_machine_file;
use crate::error::Error;
use crate::files;
use crate::images::{format_of, use_overlay};
use crate::machine::Machine;
use crate::merge::{commit, exchange};

/// An overlay of the one that is merged. Its content stays.
#[derive(Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Child {
    path: PathBuf,
    /// When it was changed last, by which a snapshot with memory knows it.
    modified: SystemTime,
}

impl Machine {
    /// Merges `overlay` into `image`, whose overlay it is, unless something else needs either of them. `note` is the path of
    /// the note.
    pub(crate) fn merge_at_rest(
        &self,
        overlay: &Path,
        image: &DiskConfig,
        note: &Path,
        needed_by_others: &HashSet<PathBuf>,
    ) -> Result<(), Error> {
        let text = files::read(note).map_err(Error::file("read", note))?;
        let children: Vec<Child> = match text {
            Some(text) => serde_json::from_str(&text)
                .map_err(io::Error::from)
                .map_err(Error::file("read", note))?,
            None => {
                let Some(children) = self.overlays_of(overlay, image, needed_by_others)? else {
                    return Ok(());
                };
                let mut disk = image.clone();
                use_overlay(&mut disk, overlay);
                commit(&disk)?;
                let text = serde_json::to_vec(&children).map_err(io::Error::from);
                text.and_then(|text| files::replace(note, text))
                    .map_err(Error::file("write", note))?;
                children
            }
        };
        for child in &children {
            rebase(child, image)?;
        }
        for mut snapshot in self.snapshots()? {
            let mut kept = snapshot.disks.iter_mut();
            if let Some(kept) = kept.find(|kept| kept.image == overlay) {
                kept.image.clone_from(&image.path);
                let mut config = parse_machine_file(&snapshot.machine_file, &self.machine_file())?;
                exchange(&mut config, overlay, image);
                snapshot.machine_file = crate::definition::machine_file(&config);
                self.write_record(&snapshot)?;
            }
        }
        self.update_config(|config| exchange(config, overlay, image))
    }

    /// Returns the overlays of `overlay`, which is that of `image`, if nothing but what is above `overlay` needs either.
    fn overlays_of(
        &self,
        overlay: &Path,
        image: &DiskConfig,
        needed_by_others: &HashSet<PathBuf>,
    ) -> Result<Option<Vec<Child>>, Error> {
        let Ok(overlay) = fs::canonicalize(overlay) else {
            // The machine has gone back to a snapshot since, and nothing has needed it.
            return Ok(None);
        };
        let real = fs::canonicalize(&image.path).map_err(Error::file("find", &image.path))?;
        if needed_by_others.contains(&real) || needed_by_others.contains(&overlay) {
            return Ok(None);
        }
        let snapshots = self.snapshots()?;
        let mut disks = self.config()?.disks;
        for snapshot in &snapshots {
            let config = parse_machine_file(&snapshot.machine_file, &self.machine_file())?;
            let mut keeps = config.disks.iter().map(|disk| fs::canonicalize(&disk.path));
            // Its memory knows the image by its name.
            if snapshot.has_memory && keeps.any(|it| it.is_ok_and(|it| it == overlay)) {
                return Ok(None);
            }
            disks.extend(config.disks);
        }
        let mut is_used = false;
        let mut children = HashSet::new();
        for disk in disks {
            let chain = match open(&disk.path, Some(format_of(&disk)), Purpose::ReadShared) {
                Ok(opened) => opened.files,
                Err(error) => {
                    tracing::warn!("overlays stay, as it is not known which are needed: {error}");
                    return Ok(None);
                }
            };
            // The image of the disk comes first, and each one is an overlay of the next.
            let chain: Vec<_> = chain.iter().flat_map(fs::canonicalize).collect();
            let Some(place) = chain.iter().position(|file| *file == real) else {
                continue;
            };
            let above = chain.get(..place).unwrap_or_default();
            match above {
                [.., child, last] if *last == overlay => {
                    children.insert(child.clone());
                }
                [last] if *last == overlay => {}
                _ => return Ok(None),
            }
            is_used = true;
        }
        if !is_used {
            return Ok(None);
        }
        let children = children.into_iter().map(|path| {
            let modified = fs::metadata(&path).and_then(|file| file.modified());
            let modified = modified.map_err(Error::file("examine", &path))?;
            Ok(Child { path, modified })
        });
        children.collect::<Result<_, Error>>().map(Some)
    }
}

/// Has an overlay name `image` as its backing file.
fn rebase(child: &Child, image: &DiskConfig) -> Result<(), Error> {
    let path = &child.path;
    let refused = |reason: String| Error::Image {
        path: path.display().to_string(),
        reason,
    };
    let name = image.path.to_str();
    let name =
        name.ok_or_else(|| refused("its backing file has a name that is not UTF-8".into()))?;
    let backing = BackingName {
        name: name.to_owned(),
        format: Some(format_of(image).to_string()),
    };
    let file = open_file_of_qcow2(path, Purpose::Write);
    let file = file.map_err(|error| refused(error.to_string()))?;
    Qcow2::rename_backing(file, Some(backing)).map_err(|error| refused(error.to_string()))?;
    File::options()
        .write(true)
        .open(path)
        .and_then(|file| {
            file.set_modified(child.modified)?;
            file.sync_all()
        })
        .map_err(Error::file("write", path))
}
