//! Copies what an image holds into one of its backing files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use super::{CopyJob, CopyJobOptions, JobError, as_qcow2};
use crate::direct_file::LayerFile;
use crate::disk::{Disk, FormattedDisk};
use crate::lock::{LockMode, give_back, take_over};
use crate::open::check_direct;
use crate::opener::FileOpener;
use crate::qcow2::{self, ALL, Qcow2, Unsynced};
use crate::raw::{
    CacheMode, DiskError, DiskFile, DiskOptions, ImageFormat, lock_as_wanted, open_direct,
    open_image,
};
use crate::{Access, DiskLayer, HostFile, Image, ImageFile, RawImage};

/// Copies what the image of a disk holds into one of its backing files, the base, while the guest uses the disk, which
/// goes on with the base afterwards.
///
/// The job is a [`CopyJob`] of what the layers above the base hold, and is used as one. Once it is open, the layers above
/// read the base from the image that the job writes.
///
/// # Crashes
/// At every moment the image, with its layers, reads as the disk does, and holds all that was flushed:
///
/// - The base changes only where the layers above hold bytes, or end before it. It is not read there.
/// - An entry of the image that is not on stable storage when the host crashes is lost, and the disk has the bytes of the
///   base there again. These are right too. Until its entry is on stable storage, a cluster of the image differs from the
///   base only in what the guest has written since its last flush. If the job has copied the cluster, the base has some
///   of that, and nothing else that is new.
/// - An entry that is on stable storage never gives way to one that leaves the bytes to the base: with a backing file, a
///   discard makes zeroes or does nothing.
#[derive(Debug)]
pub struct CommitJob {
    copy: Arc<CopyJob>,
    disk: Arc<Disk>,
    /// The layer above the base.
    above: Arc<dyn Image>,
    base: Base,
}

/// The base as the image had it before.
#[derive(Debug)]
struct Base {
    layer: DiskLayer,
    /// Opened for reading.
    reader: LayerFile,
    /// Opened for writing.
    writer: File,
    below: Option<Arc<dyn Image>>,
    is_locked: bool,
}

impl CommitJob {
    /// Opens the base of `disk` to be written, which is below the first `layers` layers: 1 stands for the image alone,
    /// whose backing file is the base. If the base is smaller than the disk, it grows. Its lock becomes that of a
    /// writer.
    ///
    /// # Errors
    /// If the disk is read-only or has not that many layers, the base is in use by others, or cannot be opened to be
    /// written.
    pub fn open(
        opener: &dyn FileOpener,
        disk: &FormattedDisk,
        layers: usize,
    ) -> Result<CommitJob, JobError> {
        if disk.options().read_only {
            return Err(JobError::ReadOnly("the disk"));
        }
        let image = as_qcow2(&**disk.image()).ok_or(JobError::NotQcow2)?;
        let missing = || JobError::Depth(layers);
        let below = image.layer_below(Some(layers)).ok().flatten();
        let below = below.filter(|_| layers > 0).ok_or_else(missing)?;
        let above = match layers {
            1 => Arc::clone(disk.image()),
            _ => {
                let above = image.layer_below(Some(layers - 1)).ok().flatten();
                above.ok_or_else(missing)?.image
            }
        };
        let number = below.distance;
        let layer = disk.layers().get(number).ok_or_else(missing)?;
        let former = disk.files().get(number).ok_or_else(missing)?;
        let base = OpenBase {
            opener,
            layer,
            former,
            size: image.size(),
            options: DiskOptions {
                read_only: false,
                format: Some(layer.format),
                block_size: Some(disk.logical_block_size()),
                ..disk.options().clone()
            },
        };
        let reader = former
            .try_clone()
            .map_err(|error| base.failed("set up", error))?;
        let opened = match layer.format {
            ImageFormat::Raw => base.open_raw(),
            ImageFormat::Qcow2 => base.open_qcow2(&*below.image, number, disk),
        };
        let (target, new_disk, writer) = opened?;
        let base = Base {
            layer: layer.clone(),
            reader,
            writer,
            below: as_qcow2(&*below.image).and_then(Qcow2::backing),
            is_locked: disk.options().lock != LockMode::Off,
        };
        let prepared = as_qcow2(&*above)
            .ok_or(JobError::NotQcow2)
            .and_then(|above| Ok(above.replace_backing(Arc::clone(&target))?))
            .and_then(|()| {
                let options = CopyJobOptions {
                    target_is_zero: false,
                    layers: Some(layers),
                };
                CopyJob::new(Arc::clone(disk.image()), target, options)
            });
        match prepared {
            Ok(copy) => Ok(CommitJob {
                copy,
                disk: Arc::new(new_disk),
                above,
                base,
            }),
            Err(error) => {
                base.give_back_lock();
                Err(error)
            }
        }
    }

    /// Returns the copy that the job is.
    pub fn copy(&self) -> &Arc<CopyJob> {
        &self.copy
    }

    /// Returns the base as the disk with which the guest goes on. It has the cache mode and block size of the present
    /// disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Cancels the job, has the layers above the base read it as before, and returns its lock to that of a reader. The
    /// owner drops the filter and the job then.
    ///
    /// # Errors
    /// If the base cannot be opened again. The layers above it go on reading it from the image that was written then,
    /// and the lock remains that of a writer.
    pub fn close(&self) -> io::Result<()> {
        self.copy.control().cancel();
        // A request that began before can still write to the base. It has ended after this.
        drop(self.copy.locks.exclusive(ALL));
        // What was not copied completely is of no use, so an error of this changes nothing.
        let _ = self.copy.target().flush();
        let reader = HostFile::from(self.base.reader.try_clone()?);
        let former: Arc<dyn Image> = match self.base.layer.format {
            ImageFormat::Raw => Arc::new(RawImage::new(Arc::new(reader), true)?),
            ImageFormat::Qcow2 => {
                let options = qcow2::Options {
                    read_only: true,
                    backing: self.base.below.clone(),
                    ..qcow2::Options::default()
                };
                Arc::new(Qcow2::open(Arc::new(reader), options)?)
            }
        };
        if let Some(above) = as_qcow2(&*self.above) {
            above.replace_backing(former)?;
        }
        self.base.give_back_lock();
        Ok(())
    }
}

impl Base {
    fn give_back_lock(&self) {
        if self.is_locked {
            give_back(&self.writer, self.reader.locked());
        }
    }
}

/// A base that is to be opened for writing.
struct OpenBase<'a> {
    opener: &'a dyn FileOpener,
    layer: &'a DiskLayer,
    /// The base, open for reading.
    former: &'a LayerFile,
    /// Size that it must have at least, in bytes.
    size: u64,
    options: DiskOptions,
}

/// An image to copy to, the same as a disk, and its file.
type Opened = (Arc<dyn Image>, Disk, File);

impl OpenBase<'_> {
    fn path(&self) -> &Path {
        &self.layer.path
    }

    fn failed(&self, action: &'static str, source: io::Error) -> DiskError {
        DiskError::Io {
            path: self.path().to_path_buf(),
            action,
            source,
        }
    }

    /// Takes the lock for `file`, the base, which has just been opened for writing.
    fn lock(&self, file: &File) -> Result<(), DiskError> {
        let identity = |file: &File| file.metadata().map(|it| (it.dev(), it.ino()));
        let same = identity(file).and_then(|new| Ok(new == identity(&self.former.cached)?));
        if !same.map_err(|error| self.failed("examine", error))? {
            return Err(DiskError::Replaced {
                path: self.path().to_path_buf(),
            });
        }
        lock_as_wanted(self.path(), &self.options, || {
            take_over(file, self.former.locked())
        })
    }

    /// Returns the lock if what follows it has failed.
    fn or_unlock<T, E>(&self, file: &File, result: Result<T, E>) -> Result<T, E> {
        if result.is_err() && self.options.lock != LockMode::Off {
            give_back(file, self.former.locked());
        }
        result
    }

    fn open_raw(&self) -> Result<Opened, JobError> {
        let path = self.path();
        let mut locked = None;
        let lock = |file: &File| {
            self.lock(file)?;
            locked = file.try_clone().ok();
            let file = HostFile::new(
                file.try_clone()
                    .map_err(|error| self.failed("set up", error))?,
            );
            let resized = file.size().and_then(|size| match size < self.size {
                true => file.set_size(self.size),
                false => Ok(()),
            });
            resized.map_err(|error| self.failed("resize", error))
        };
        let opened = DiskFile::open_silently(self.opener, path, &self.options, lock);
        let made = opened.map_err(JobError::from).and_then(|(disk, _)| {
            let failed = |error| self.failed("set up", error);
            let file = disk.file(Access::Usual).ok_or(JobError::Depth(1))?;
            let writer = file.try_clone().map_err(failed)?;
            let disk = Disk::Raw(disk);
            let image = Arc::clone(disk.to_formatted(self.opener)?.image());
            Ok((image, disk, writer))
        });
        match &locked {
            Some(file) => self.or_unlock(file, made),
            None => made,
        }
    }

    /// `below` is the base as it is open for reading, `number` that of its file.
    fn open_qcow2(
        &self,
        below: &dyn Image,
        number: usize,
        disk: &FormattedDisk,
    ) -> Result<Opened, JobError> {
        let path = self.path();
        let lock = |file: &File| self.lock(file);
        let locked = open_image(self.opener, path, &self.options, lock)?;
        let made = locked
            .try_clone()
            .map_err(|error| JobError::Disk(self.failed("set up", error)))
            .and_then(|file| Ok(open_direct(self.opener, path, file, &self.options)?))
            .and_then(|file| self.make_qcow2(&file, below, number, disk));
        self.or_unlock(&locked, made)
    }

    fn make_qcow2(
        &self,
        file: &LayerFile,
        below: &dyn Image,
        number: usize,
        disk: &FormattedDisk,
    ) -> Result<Opened, JobError> {
        let path = self.path();
        let failed = |error| self.failed("set up", error);
        let below = as_qcow2(below).ok_or(JobError::NotQcow2)?;
        let host: Arc<dyn ImageFile> = Arc::new(HostFile::from(file.try_clone().map_err(failed)?));
        let is_unsafe = self.options.cache == CacheMode::Unsafe;
        let defaults = qcow2::Options::default();
        let options = qcow2::Options {
            backing: below.backing(),
            max_pending: if is_unsafe { 0 } else { defaults.max_pending },
            ..defaults
        };
        let host = match is_unsafe {
            true => Arc::new(Unsynced(host)),
            false => host,
        };
        let image = Qcow2::open(host, options).map_err(|source| DiskError::Qcow2 {
            path: path.to_path_buf(),
            source,
        })?;
        check_direct(path, &image, file)?;
        image.share_backing_of(below);
        if image.size() < self.size {
            image.resize(self.size)?;
        }
        let image: Arc<dyn Image> = Arc::new(image);
        let mut files = vec![file.try_clone().map_err(failed)?];
        for file in disk.files().iter().skip(number + 1) {
            files.push(file.try_clone().map_err(failed)?);
        }
        let layers = disk.layers().iter().skip(number).cloned().collect();
        let disk = FormattedDisk::new(path, Arc::clone(&image), files, &self.options)?;
        let writer = file.cached.try_clone().map_err(failed)?;
        Ok((image, Disk::Formatted(disk.with_layers(layers)), writer))
    }
}
