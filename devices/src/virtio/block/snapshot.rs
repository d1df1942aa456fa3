//! Snapshots of disks: each gets an overlay, and its image stays as it is.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use bantam_storage::{DiskError, FileOpener};

use super::disk_slot::{DiskSlot, Exchanged, OpenDisk, exchange_all};
use super::handle::flush;
use super::new_files::NewFiles;
use super::{BlockHandle, ReplaceError};

/// Why no snapshot was taken. All disks keep the images that they have.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// An overlay cannot be made.
    #[error(transparent)]
    Overlay(#[from] DiskError),
    /// A device cannot use its overlay.
    #[error(transparent)]
    Device(#[from] ReplaceError),
    /// What was written to an image so far cannot be brought to stable storage.
    #[error("cannot flush disk '{path}': {source}", path = .path.display())]
    Flush {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The devices cannot switch to their overlays.
    #[error("cannot use the overlays from now on: {0}")]
    ChangeOver(#[source] io::Error),
    /// A job copies data of a disk.
    #[error("a job is at work on disk '{path}': finish or cancel it first", path = .path.display())]
    Job {
        /// The image.
        path: PathBuf,
    },
    /// A disk is named twice.
    #[error("a snapshot has each disk once")]
    Repeated,
}

/// Puts a new overlay into the place of the image of each of `disks`, all at one instant, and returns for how long
/// their guest had to wait. Each overlay is a qcow2 image, at the path that is given with the disk and must not exist;
/// its backing file is the image that was there, which is not written from then on. What the guest wrote before the
/// snapshot is on stable storage when the guest's next flush is answered, unless the disk's cache mode says otherwise.
///
/// # Errors
/// If this is not possible for one of the disks, or not by `deadline`. Then all keep their images, and there are no
/// new files.
pub fn snapshot(
    disks: &[(&BlockHandle, &Path)],
    opener: &dyn FileOpener,
    deadline: Instant,
) -> Result<Duration, SnapshotError> {
    let taken = try_snapshot(disks, opener, deadline);
    for (disk, _) in disks {
        match &taken {
            Ok(_) => disk.metrics().update_count.add(1),
            Err(_) => disk.metrics().update_fails.add(1),
        }
    }
    taken
}

fn try_snapshot(
    disks: &[(&BlockHandle, &Path)],
    opener: &dyn FileOpener,
    deadline: Instant,
) -> Result<Duration, SnapshotError> {
    let slots: Vec<&DiskSlot> = disks.iter().map(|(disk, _)| &*disk.slot).collect();
    let _changes = change_all(&slots)?;
    let mut files = NewFiles::new(opener);
    let mut new = Vec::with_capacity(disks.len());
    for (disk, path) in disks {
        let present = disk.disk();
        if disk.has_job() {
            let path = present.path().to_path_buf();
            return Err(SnapshotError::Job { path });
        }
        let overlay = present.overlay(opener, path)?;
        files.add(path);
        new.push(disk.prepare(Arc::new(overlay))?);
    }
    // So that little is left for the first flush after the snapshot.
    for slot in &slots {
        let disk = slot.disk();
        flush(&disk).map_err(|source| SnapshotError::Flush {
            path: disk.path().to_path_buf(),
            source,
        })?;
    }
    let exchanges = slots.iter().copied().zip(new).collect();
    let exchanged = exchange_all(exchanges, || Ok(()), deadline);
    let Exchanged { old, held_up } = exchanged.map_err(SnapshotError::ChangeOver)?;
    files.keep();
    for slot in &slots {
        // This flushes the former image too. If it fails, so do all flushes of the guest from now on.
        let disk = slot.disk();
        if let Err(error) = flush(&disk) {
            let path = disk.path().display();
            tracing::error!("cannot flush the image that disk '{path}' is the overlay of: {error}");
        }
    }
    for OpenDisk { disk, ring } in old {
        drop(ring);
        if let Err(error) = disk.end_writing() {
            let path = disk.path().display();
            tracing::warn!("cannot let other programs read disk '{path}': {error}");
        }
    }
    Ok(held_up)
}

/// Keeps other threads from changing the disks, whatever order they name them in.
fn change_all<'a>(slots: &[&'a DiskSlot]) -> Result<Vec<MutexGuard<'a, ()>>, SnapshotError> {
    let mut in_order = slots.to_vec();
    in_order.sort_by_key(|&slot| std::ptr::from_ref(slot));
    if in_order
        .windows(2)
        .any(|pair| std::ptr::eq(pair[0], pair[1]))
    {
        return Err(SnapshotError::Repeated);
    }
    Ok(in_order.into_iter().map(DiskSlot::change).collect())
}
