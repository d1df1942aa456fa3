//! Disks whose image is somebody else's for now.

use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::LayerFile;
use crate::disk::{Disk, FormattedDisk};
use crate::image::{BlockStatus, Direction, Extent, Image};
use crate::lock::unlock;
use crate::raw::{Access, DiskError};

/// Stands for an image that was released: it has a size, and all requests fail.
#[derive(Debug)]
struct Released {
    size: u64,
    read_only: bool,
}

fn refused<T>() -> io::Result<T> {
    let reason = "the image was handed over to another machine";
    Err(io::Error::new(io::ErrorKind::NotConnected, reason))
}

impl Image for Released {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn map(&self, range: Range<u64>, _: Direction) -> Extent {
        Extent::Slow {
            len: range.end - range.start,
        }
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        refused()
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        refused()
    }

    fn write_zeroes(&self, _: Range<u64>, _: bool) -> io::Result<()> {
        refused()
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        refused()
    }

    /// There is nothing to flush.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn status(&self, _: Range<u64>) -> io::Result<BlockStatus> {
        refused()
    }
}

impl Disk {
    /// Returns a disk with the path, size and options of this one that has no image: all requests to it fail.
    ///
    /// # Errors
    /// If the size cannot be that of such a disk.
    pub fn without_image(&self) -> Result<Disk, DiskError> {
        let mut options = self.options().clone();
        options.block_size = Some(self.logical_block_size());
        let image = Released {
            size: self.size(),
            read_only: self.is_read_only(),
        };
        let disk = FormattedDisk::new(self.path(), Arc::new(image), Vec::new(), &options)?;
        Ok(Disk::Formatted(disk))
    }

    /// Returns whether it is one that [`Disk::without_image`] has returned.
    pub fn is_without_image(&self) -> bool {
        match self {
            Disk::Raw(_) => false,
            Disk::Formatted(disk) => {
                let image: &dyn Any = &**disk.image();
                image.is::<Released>()
            }
        }
    }

    /// Brings everything to stable storage, writes no more to the image, and gives up its locks, so that others may use
    /// it in any way. No request to it is under way, and none is made later.
    ///
    /// # Errors
    /// If the host has failed to write something, or does not give up a lock.
    pub fn release(&self) -> io::Result<()> {
        let files: Vec<_> = match self {
            Disk::Raw(disk) => {
                if !self.is_read_only() {
                    disk.flush()?;
                }
                disk.file(Access::Usual).into_iter().collect()
            }
            Disk::Formatted(disk) => {
                if !self.is_read_only() {
                    disk.image().end_writing()?;
                }
                disk.files().iter().map(LayerFile::locked).collect()
            }
        };
        files.into_iter().try_for_each(unlock)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use tempfile::tempdir;

    use super::*;
    use crate::qcow2::{CreateOptions, Qcow2};
    use crate::{DiskOptions, HostFile, HostOpener, ImageFormat};

    fn open(path: &Path, format: ImageFormat) -> Result<Disk, DiskError> {
        let options = DiskOptions {
            format: Some(format),
            ..DiskOptions::default()
        };
        Disk::open_by(&HostOpener, path, &options)
    }

    #[test]
    fn a_released_image_is_free_at_once_with_all_that_was_written() {
        let folder = tempdir().unwrap();
        for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
            let path = folder.path().join(format!("{format:?}"));
            let file = fs::File::create_new(&path).unwrap();
            match format {
                ImageFormat::Raw => file.set_len(1 << 20).unwrap(),
                ImageFormat::Qcow2 => {
                    let options = CreateOptions {
                        size: 1 << 20,
                        ..CreateOptions::default()
                    };
                    Qcow2::create(Arc::new(HostFile::new(file)), &options).unwrap();
                }
            }
            let disk = open(&path, format).unwrap();
            open(&path, format).unwrap_err();
            if let Disk::Formatted(disk) = &disk {
                disk.image().write_at(b"written", 70_000).unwrap();
            }
            let without = disk.without_image().unwrap();
            assert_eq!((without.size(), without.path()), (disk.size(), disk.path()));
            assert!(without.is_without_image() && !disk.is_without_image());
            without.flush().unwrap();
            disk.release().unwrap();
            let next = open(&path, format).unwrap();
            if let Disk::Formatted(next) = &next {
                let mut bytes = [0; 7];
                next.image().read_at(&mut bytes, 70_000).unwrap();
                assert_eq!(&bytes, b"written");
            }
            // What is released later does not take its lock away.
            drop(disk);
            open(&path, format).unwrap_err();
        }
    }
}
