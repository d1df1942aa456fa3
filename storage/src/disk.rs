//! The disk of a machine: an open image of any format.

use std::any::Any;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bantam_memory::GuestBuffers;

use crate::direct_file::LayerFile;
use crate::image::Image;
use crate::qcow2::{self, Qcow2};
use crate::raw::{
    CacheMode, DiskError, DiskFile, DiskOptions, ImageFormat, SECTOR_SIZE, disk_size, fill_from,
};

/// Physical block size of an image that is not raw, in bytes: a page.
const PHYSICAL_BLOCK_SIZE: u32 = 4096;

/// An open disk image, as a device serves it.
#[derive(Debug)]
pub enum Disk {
    /// A file whose bytes are those of the disk.
    Raw(DiskFile),
    /// An image of another format.
    Formatted(FormattedDisk),
}

/// A layer of an image: the image itself, or one of its backing files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLayer {
    /// The path with which its file was opened.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
}

/// An open image of a format other than raw, and the files that it is kept in.
#[derive(Debug)]
pub struct FormattedDisk {
    path: PathBuf,
    image: Arc<dyn Image>,
    files: Vec<LayerFile>,
    /// What each of the files is, if that is known.
    layers: Vec<DiskLayer>,
    /// Size of the disk in bytes.
    size: AtomicU64,
    options: DiskOptions,
    logical_block_size: u32,
}

impl FormattedDisk {
    /// Makes a disk of `image`, which was opened from `path` with `options`. `files` are those that
    /// [`Image::map`] names, in that order, opened as the cache mode requires.
    ///
    /// # Errors
    /// If its size cannot be that of a disk.
    pub fn new(
        path: &Path,
        image: Arc<dyn Image>,
        files: Vec<LayerFile>,
        options: &DiskOptions,
    ) -> Result<FormattedDisk, DiskError> {
        let path = path.to_path_buf();
        let options = DiskOptions {
            read_only: options.read_only || image.is_read_only(),
            ..options.clone()
        };
        let logical_block_size = options.block_size.unwrap_or(SECTOR_SIZE as u32);
        let length = image.size();
        let size = disk_size(length, logical_block_size, false, &options).map_err(|reason| {
            DiskError::Size {
                path: path.clone(),
                size: length,
                reason,
            }
        })?;
        Ok(FormattedDisk {
            path,
            image,
            files,
            layers: Vec::new(),
            size: AtomicU64::new(size),
            options,
            logical_block_size,
        })
    }

    /// Says what each of the files is, in the same order. A commit and a pull need to know.
    #[must_use]
    pub fn with_layers(mut self, layers: Vec<DiskLayer>) -> FormattedDisk {
        self.layers = layers;
        self
    }

    /// Has the disk go through `image`, which has the size and the numbers of files of its image.
    #[must_use]
    pub fn with_image(mut self, image: Arc<dyn Image>) -> FormattedDisk {
        self.image = image;
        self
    }

    /// Returns the image.
    pub fn image(&self) -> &Arc<dyn Image> {
        &self.image
    }

    /// Returns the same disk without the files below the image itself, which needs them no more.
    ///
    /// # Errors
    /// If a file cannot be duplicated.
    pub fn without_backing_files(&self) -> Result<FormattedDisk, DiskError> {
        let layers = self.layers.iter().take(1).cloned().collect();
        let files = self.files.iter().take(1).map(LayerFile::try_clone);
        let files: io::Result<Vec<LayerFile>> = files.collect();
        let files = files.map_err(|source| DiskError::Io {
            path: self.path.clone(),
            action: "set up",
            source,
        })?;
        let disk = FormattedDisk::new(&self.path, Arc::clone(&self.image), files, &self.options)?;
        Ok(disk.with_layers(layers))
    }

    /// Returns the files that [`Image::map`] names.
    pub fn files(&self) -> &[LayerFile] {
        &self.files
    }

    /// Returns the files alone.
    pub(crate) fn into_files(self) -> Vec<LayerFile> {
        self.files
    }

    /// Returns the blocks of the storage, as offsets of the disk, that a write to `range` reads or writes, and whether
    /// it covers all of them. A write that does not must not run while another write to one of them does. `None` if no
    /// block is read to be written.
    pub fn block_span(&self, range: Range<u64>) -> Option<(Range<u64>, bool)> {
        // A block of the disk is one of the file, as clusters are not smaller.
        self.files.first()?.block_span(&range)
    }

    /// Forgets what the image itself holds, so that the disk is what its backing file has.
    ///
    /// # Errors
    /// If the image has no backing file, or the host cannot write.
    pub fn empty(&self) -> Result<(), qcow2::Error> {
        let image: &dyn Any = &*self.image;
        match image.downcast_ref::<Qcow2>() {
            Some(image) if image.backing().is_some() => image.make_empty(),
            _ => Err(qcow2::Error::NotPossible(
                "the image has no backing file".to_owned(),
            )),
        }
    }

    /// Returns what each of the files is. Empty if that is not known.
    pub fn layers(&self) -> &[DiskLayer] {
        &self.layers
    }

    /// Returns the options with which the image was opened.
    pub fn options(&self) -> &DiskOptions {
        &self.options
    }

    /// Returns the smallest unit in which the guest should address the disk, in bytes.
    pub fn logical_block_size(&self) -> u32 {
        self.logical_block_size
    }

    /// Returns the size of a block that direct access writes as a whole, in bytes.
    fn storage_block_size(&self) -> u32 {
        let direct = self.files.first().and_then(|file| file.direct.as_ref());
        direct.map_or(0, |direct| direct.alignment().offset as u32)
    }

    fn update_size(&self) -> io::Result<u64> {
        let length = self.image.size();
        let size = disk_size(length, self.logical_block_size, false, &self.options);
        let size = size.map_err(|reason| {
            let error = format!("it has {length} bytes now: {reason}");
            io::Error::new(io::ErrorKind::InvalidData, error)
        })?;
        self.size.store(size, Ordering::Release);
        Ok(size)
    }
}

impl From<DiskFile> for Disk {
    fn from(disk: DiskFile) -> Disk {
        Disk::Raw(disk)
    }
}

impl From<FormattedDisk> for Disk {
    fn from(disk: FormattedDisk) -> Disk {
        Disk::Formatted(disk)
    }
}

impl Disk {
    /// Returns the path with which the image was opened.
    pub fn path(&self) -> &Path {
        match self {
            Disk::Raw(disk) => disk.path(),
            Disk::Formatted(disk) => &disk.path,
        }
    }

    /// Whether `file` is the image that is open.
    ///
    /// # Errors
    /// If one of the two cannot be examined.
    pub fn is_same_file(&self, file: &File) -> io::Result<bool> {
        match self {
            Disk::Raw(disk) => disk.is_same_file(file),
            Disk::Formatted(disk) => {
                let Some(open) = disk.files.first() else {
                    return Ok(false);
                };
                let (open, other) = (open.cached.metadata()?, file.metadata()?);
                Ok((open.dev(), open.ino()) == (other.dev(), other.ino()))
            }
        }
    }

    /// Returns the disk's size in bytes, a multiple of [`Disk::logical_block_size`].
    pub fn size(&self) -> u64 {
        match self {
            Disk::Raw(disk) => disk.size(),
            Disk::Formatted(disk) => disk.size.load(Ordering::Acquire),
        }
    }

    /// Updates the disk's size to that of the image, and returns it.
    ///
    /// # Errors
    /// If the image cannot be measured, or its size cannot be that of this disk.
    pub fn update_size(&self) -> io::Result<u64> {
        match self {
            Disk::Raw(disk) => disk.update_size(),
            Disk::Formatted(disk) => disk.update_size(),
        }
    }

    /// Makes the image larger, and the disk with it, beside other requests. What is added reads as zeroes.
    ///
    /// # Errors
    /// If the disk is read-only or on a block device, it cannot have this size or would become smaller, or the host
    /// cannot change the image.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        let block = self.logical_block_size();
        let refused = if self.is_read_only() {
            Some("it is read-only".to_owned())
        } else if size < self.size() {
            let size = self.size();
            Some(format!(
                "it has {size} bytes, and cannot become smaller while a machine uses it"
            ))
        } else if !size.is_multiple_of(block.into()) {
            Some(format!("its size has to be a multiple of {block} bytes"))
        } else {
            None
        };
        if let Some(reason) = refused {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        match self {
            Disk::Raw(disk) => disk.grow(size)?,
            Disk::Formatted(disk) if size > disk.image.size() => disk.image.grow(size)?,
            Disk::Formatted(_) => {}
        }
        self.update_size()?;
        Ok(())
    }

    /// Returns the options with which the image was opened.
    pub fn options(&self) -> &DiskOptions {
        match self {
            Disk::Raw(disk) => disk.options(),
            Disk::Formatted(disk) => &disk.options,
        }
    }

    /// Whether the disk is read-only.
    pub fn is_read_only(&self) -> bool {
        self.options().read_only
    }

    /// Returns how written data is cached.
    pub fn cache(&self) -> CacheMode {
        self.options().cache
    }

    /// Returns the smallest unit in which the guest should address the disk, in bytes.
    pub fn logical_block_size(&self) -> u32 {
        match self {
            Disk::Raw(disk) => disk.logical_block_size(),
            Disk::Formatted(disk) => disk.logical_block_size,
        }
    }

    /// Returns the unit that the host writes without a read-modify-write, in bytes; a multiple of
    /// [`Disk::logical_block_size`].
    pub fn physical_block_size(&self) -> u32 {
        match self {
            Disk::Raw(disk) => disk.physical_block_size(),
            Disk::Formatted(disk) => PHYSICAL_BLOCK_SIZE
                .max(disk.logical_block_size)
                .max(disk.storage_block_size()),
        }
    }

    /// Fills `bytes` with those from `offset` on, for the monitor itself. Bytes beyond the end of the disk read as zeroes.
    ///
    /// # Errors
    /// If the host cannot read them, or the image is damaged.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let there = (bytes.len() as u64).min(self.size().saturating_sub(offset));
        let (bytes, beyond) = bytes.split_at_mut(there as usize);
        beyond.fill(0);
        if bytes.is_empty() {
            return Ok(());
        }
        match self {
            Disk::Raw(disk) => disk.read_at(bytes, offset),
            Disk::Formatted(disk) => disk.image.read_at(bytes, offset),
        }
    }

    /// Zeroes and drops the part of `buffers`, to be filled from `offset` on, that lies beyond the end of the
    /// image.
    pub fn fill_beyond_end(&self, buffers: &mut GuestBuffers, offset: u64) {
        match self {
            Disk::Raw(disk) => disk.fill_beyond_end(buffers, offset),
            Disk::Formatted(disk) => fill_from(disk.image.size(), buffers, offset),
        }
    }

    /// Brings everything written so far to stable storage, unless the cache mode is
    /// [`CacheMode::Unsafe`].
    ///
    /// # Errors
    /// If the host has failed to write something.
    pub fn flush(&self) -> io::Result<()> {
        match self {
            Disk::Raw(disk) => disk.flush(),
            Disk::Formatted(disk) => match disk.options.cache {
                CacheMode::Unsafe => Ok(()),
                _ => disk.image.flush(),
            },
        }
    }
}
