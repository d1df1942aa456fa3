//! Opening of a machine's disk, with all files that its image is kept in.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::disk::{Disk, DiskLayer, FormattedDisk};
use crate::file::HostFile;
use crate::lock::LockMode;
use crate::opener::{FileOpener, HostOpener};
use crate::qcow2::{self, Layer, Unsynced, open_chain};
use crate::raw::{
    Access, CacheMode, DiskError, DiskFile, DiskOptions, ImageFormat, format_of_name, open_again,
    open_file, open_locked,
};
use crate::raw_image::RawImage;

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

    /// Returns the same open disk as one that is served through an [`Image`](crate::Image), as jobs need it. A raw image that bypasses
    /// the page cache is opened once more with `opener` for that, without a lock of its own.
    ///
    /// # Errors
    /// If a file cannot be opened or duplicated.
    pub fn to_formatted(&self, opener: &dyn FileOpener) -> Result<FormattedDisk, DiskError> {
        let failed = |source| DiskError::Io {
            path: self.path().to_path_buf(),
            action: "set up",
            source,
        };
        let clone = |file: &File| file.try_clone().map_err(failed);
        let raw = match self {
            Disk::Raw(raw) => raw,
            Disk::Formatted(disk) => {
                let files: Result<Vec<File>, DiskError> = disk.files().iter().map(clone).collect();
                let image = Arc::clone(disk.image());
                let same = FormattedDisk::new(self.path(), image, files?, disk.options())?;
                return Ok(same.with_layers(disk.layers().to_vec()));
            }
        };
        let file = match raw.file(Access::Usual) {
            Some(file) if !raw.is_direct() => clone(file)?,
            Some(file) => open_again(opener, self.path(), file, self.is_read_only())?,
            None => return Err(failed(io::ErrorKind::NotFound.into())),
        };
        let image = HostFile::new(clone(&file)?);
        let image = RawImage::new(Arc::new(image), self.is_read_only()).map_err(failed)?;
        let options = DiskOptions {
            cache: match self.cache() {
                CacheMode::None => CacheMode::Writeback,
                cache => cache,
            },
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
    if options.cache == CacheMode::None {
        return Err(DiskError::DirectFormat {
            path: path.to_path_buf(),
        });
    }
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
    let disk = FormattedDisk::new(path, Arc::new(image), files, &options)?;
    Ok(disk.with_layers(layers))
}

/// Opens and locks a file of a chain, and adds it to `files`. Returns its format too.
fn open_layer(
    opener: &dyn FileOpener,
    path: &Path,
    format: &str,
    options: DiskOptions,
    files: &mut Vec<File>,
) -> Result<(Layer, ImageFormat), DiskError> {
    let with_path = |source| DiskError::Io {
        path: path.to_path_buf(),
        action: "set up",
        source,
    };
    match format {
        "qcow2" => {
            let file = open_locked(opener, path, &options)?;
            files.push(file.try_clone().map_err(with_path)?);
            let layer = Layer::Qcow2(Arc::new(HostFile::new(file)));
            Ok((layer, ImageFormat::Qcow2))
        }
        "raw" => {
            let options = DiskOptions {
                format: Some(ImageFormat::Raw),
                any_size: true,
                ..options
            };
            let disk = DiskFile::open_by(opener, path, &options)?;
            let file = disk.file(Access::Usual);
            let file = file.ok_or_else(|| with_path(io::ErrorKind::NotFound.into()))?;
            files.push(file.try_clone().map_err(with_path)?);
            // Locks are those of the open file, and last as long as one of its descriptors.
            let file = HostFile::new(file.try_clone().map_err(with_path)?);
            let image = RawImage::new(Arc::new(file), true).map_err(with_path)?;
            Ok((Layer::Other(Arc::new(image)), ImageFormat::Raw))
        }
        _ => Err(DiskError::BackingFormat {
            path: path.to_path_buf(),
            format: format.to_owned(),
        }),
    }
}
