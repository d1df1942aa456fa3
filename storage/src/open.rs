//! Opening of a machine's disk, with all files that its image is kept in.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::direct_file::LayerFile;
use crate::disk::{Disk, DiskLayer, FormattedDisk};
use crate::file::HostFile;
use crate::image::Image;
use crate::lock::LockMode;
use crate::opener::{FileOpener, HostOpener};
use crate::qcow2::{self, Layer, Qcow2, Unsynced, open_chain};
use crate::raw::{
    Access, CacheMode, DiskError, DiskFile, DiskOptions, ImageFormat, format_of_name, open_again,
    open_direct, open_file, open_locked,
};
use crate::raw_image::RawImage;

/// Two accesses, past the page cache and through it, must not be to the same page.
const PAGE_SIZE: u64 = 4096;

impl Disk {
    /// Opens and locks the image at `path`, and its backing files, with `opener`.
    ///
    /// The format is that of `options`, or else the one that the name of the file says. The content never
    /// decides, as a guest can write anything to a raw disk.
    ///
    /// # Errors
    /// If a file cannot be opened, is not an image of its format, is in use, or cannot be used with `options`.
    pub fn open_by(
        opener: &dyn FileOpener,
        path: &Path,
        options: &DiskOptions,
    ) -> Result<Disk, DiskError> {
        match options.format.unwrap_or_else(|| format_of_name(path)) {
            ImageFormat::Raw => DiskFile::open_by(opener, path, options).map(Disk::Raw),
            ImageFormat::Qcow2 => open_qcow2(opener, path, options).map(Disk::Formatted),
        }
    }

    /// Checks whether [`Disk::open_by`] could open the image at `path`, provided that it is not in use then.
    ///
    /// # Errors
    /// Those of [`Disk::open_by`].
    pub fn check(path: &Path, options: &DiskOptions) -> Result<(), DiskError> {
        match options.format.unwrap_or_else(|| format_of_name(path)) {
            ImageFormat::Raw => DiskFile::check(path, options),
            ImageFormat::Qcow2 => {
                open_file(&HostOpener, path, options.read_only)?;
                // An image that is opened to be written is changed.
                let options = DiskOptions {
                    read_only: true,
                    lock: LockMode::Off,
                    ..options.clone()
                };
                open_qcow2(&HostOpener, path, &options).map(drop)
            }
        }
    }

    /// Returns the same open disk as one that is served through an [`Image`], as jobs need it. A raw image that bypasses
    /// the page cache is opened once more with `opener`, for the bytes behind its last whole block, without a lock of
    /// its own.
    ///
    /// # Errors
    /// If a file cannot be opened or duplicated.
    pub fn to_formatted(&self, opener: &dyn FileOpener) -> Result<FormattedDisk, DiskError> {
        self.to_formatted_of(opener, Some(self.size()))
    }

    /// Returns the same as [`Self::to_formatted`], but with all bytes of a raw image: an image of which it is the backing
    /// file has those behind the last whole block of the disk, too.
    pub(crate) fn to_backing(&self, opener: &dyn FileOpener) -> Result<FormattedDisk, DiskError> {
        self.to_formatted_of(opener, None)
    }

    /// `size` is that of a raw disk, if it is not that of the file.
    fn to_formatted_of(
        &self,
        opener: &dyn FileOpener,
        size: Option<u64>,
    ) -> Result<FormattedDisk, DiskError> {
        let failed = |source| DiskError::Io {
            path: self.path().to_path_buf(),
            action: "set up",
            source,
        };
        let raw = match self {
            Disk::Raw(raw) => raw,
            Disk::Formatted(disk) => {
                let files = disk.files().iter().map(LayerFile::try_clone);
                let files: io::Result<Vec<LayerFile>> = files.collect();
                let files = files.map_err(failed);
                let image = Arc::clone(disk.image());
                let same = FormattedDisk::new(self.path(), image, files?, disk.options())?;
                return Ok(same.with_layers(disk.layers().to_vec()));
            }
        };
        let file = raw.file(Access::Usual);
        let file = file.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let file = match raw.direct_file().map_err(failed)? {
            None => LayerFile::from(file.try_clone().map_err(failed)?),
            Some(direct) => {
                let cached = open_again(opener, self.path(), file, self.is_read_only())?;
                LayerFile::beside_locked(cached, direct).map_err(failed)?
            }
        };
        let image = HostFile::from(file.try_clone().map_err(failed)?);
        let image = Arc::new(image);
        let image = match size {
            Some(size) => RawImage::with_size(image, size, self.is_read_only()),
            None => RawImage::new(image, self.is_read_only()).map_err(failed)?,
        };
        let options = DiskOptions {
            block_size: Some(self.logical_block_size()),
            ..self.options().clone()
        };
        let layer = DiskLayer {
            path: self.path().to_path_buf(),
            format: ImageFormat::Raw,
        };
        let disk = FormattedDisk::new(self.path(), Arc::new(image), vec![file], &options)?;
        Ok(disk.with_layers(vec![layer]))
    }
}

/// Returns the options of the qcow2 image of a disk with `options`.
pub(crate) fn image_options(options: &DiskOptions) -> qcow2::Options {
    let defaults = qcow2::Options::default();
    qcow2::Options {
        read_only: options.read_only,
        // No flush would write what is pending, and the syncs that this saves do nothing.
        max_pending: match options.cache {
            CacheMode::Unsafe => 0,
            _ => defaults.max_pending,
        },
        ..defaults
    }
}

fn open_qcow2(
    opener: &dyn FileOpener,
    path: &Path,
    options: &DiskOptions,
) -> Result<FormattedDisk, DiskError> {
    let is_unsafe = options.cache == CacheMode::Unsafe;
    let image_options = image_options(options);
    let mut files = Vec::new();
    let mut layers = Vec::new();
    let mut failure = None;
    let image = open_chain(path, image_options, &mut |layer, format, read_only| {
        if !options.backing && !files.is_empty() {
            failure = Some(DiskError::BackingFile {
                path: path.to_path_buf(),
                backing: layer.to_path_buf(),
            });
        } else {
            let options = DiskOptions {
                read_only,
                cache: match options.cache {
                    CacheMode::None => CacheMode::None,
                    _ => CacheMode::default(),
                },
                lock: options.lock,
                ..DiskOptions::default()
            };
            match open_layer(opener, layer, format, options, &mut files) {
                Ok((opened, format)) => {
                    let path = layer.to_path_buf();
                    layers.push(DiskLayer { path, format });
                    return Ok(match opened {
                        Layer::Qcow2(file) if is_unsafe => Layer::Qcow2(Arc::new(Unsynced(file))),
                        layer => layer,
                    });
                }
                Err(error) => failure = Some(error),
            }
        }
        Err(io::ErrorKind::Other.into())
    });
    let image = match (image, failure) {
        (_, Some(failure)) => return Err(failure),
        (Ok(image), None) => image,
        (Err(source), None) => {
            return Err(DiskError::Qcow2 {
                path: path.to_path_buf(),
                source,
            });
        }
    };
    let options = DiskOptions {
        format: Some(ImageFormat::Qcow2),
        ..options.clone()
    };
    if let Some(file) = files.first() {
        check_direct(path, &image, file)?;
    }
    let disk = FormattedDisk::new(path, Arc::new(image), files, &options)?;
    Ok(disk.with_layers(layers))
}

/// Refuses to write an image past the page cache if its tables and its data, or two parts of its data that have
/// different places, can share a block of the storage.
pub(crate) fn check_direct(path: &Path, image: &Qcow2, file: &LayerFile) -> Result<(), DiskError> {
    let Some(direct) = file.direct.as_ref().filter(|_| !image.is_read_only()) else {
        return Ok(());
    };
    let (cluster, subcluster) = image.unit_sizes();
    let block = direct.alignment().offset;
    for (unit, size, block) in [
        ("clusters", cluster, block.max(PAGE_SIZE)),
        ("subclusters", subcluster, block),
    ] {
        if size < block {
            return Err(DiskError::DirectClusters {
                path: path.to_path_buf(),
                unit,
                size,
                block,
            });
        }
    }
    Ok(())
}

/// Opens and locks a file of a chain, and adds it to `files`. Returns its format too.
fn open_layer(
    opener: &dyn FileOpener,
    path: &Path,
    format: &str,
    options: DiskOptions,
    files: &mut Vec<LayerFile>,
) -> Result<(Layer, ImageFormat), DiskError> {
    let with_path = |source| DiskError::Io {
        path: path.to_path_buf(),
        action: "set up",
        source,
    };
    match format {
        "qcow2" => {
            let file = open_locked(opener, path, &options)?;
            let file = open_direct(opener, path, file, &options)?;
            files.push(file.try_clone().map_err(with_path)?);
            let layer = Layer::Qcow2(Arc::new(HostFile::from(file)));
            Ok((layer, ImageFormat::Qcow2))
        }
        "raw" => {
            let options = DiskOptions {
                format: Some(ImageFormat::Raw),
                any_size: true,
                ..options
            };
            let disk = Disk::Raw(DiskFile::open_by(opener, path, &options)?);
            // Locks are those of the open file, and last as long as one of its descriptors.
            let disk = disk.to_backing(opener)?;
            let image = Arc::clone(disk.image());
            files.extend(disk.into_files());
            Ok((Layer::Other(image), ImageFormat::Raw))
        }
        _ => Err(DiskError::BackingFormat {
            path: path.to_path_buf(),
            format: format.to_owned(),
        }),
    }
}
