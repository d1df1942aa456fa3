//! Writes a qcow2 image as a whole.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::formats::{NewContent, PREALLOCATIONS};
use crate::qcow2::{self, BackingName, Compression, CreateOptions, Qcow2, Unsynced};
use crate::{Image, ImageFile, OptionError, Options, Target};

const SECTOR: u64 = 512;
const SWITCH: [(&str, bool); 2] = [("off", false), ("on", true)];

/// Reads the options of a qcow2 image of `size` bytes.
pub fn qcow2_options(mut options: Options, size: u64) -> Result<CreateOptions, OptionError> {
    let versions = [("1.1", 3), ("v3", 3), ("0.10", 2), ("v2", 2)];
    let compressions = [("zlib", Compression::Zlib), ("zstd", Compression::Zstd)];
    let widths = [
        ("16", 16),
        ("1", 1),
        ("2", 2),
        ("4", 4),
        ("8", 8),
        ("32", 32),
        ("64", 64),
    ];
    let format = options.take("backing_fmt");
    let backing = options.take("backing_file");
    let created = CreateOptions {
        size,
        version: options.take_choice("compat", &versions)?,
        cluster_size: options.take_size("cluster_size")?.unwrap_or(64 << 10),
        refcount_bits: options.take_choice("refcount_bits", &widths)?,
        lazy_refcounts: options.take_choice("lazy_refcounts", &SWITCH)?,
        extended_l2: options.take_choice("extended_l2", &SWITCH)?,
        compression: options.take_choice("compression_type", &compressions)?,
        preallocation: options.take_choice("preallocation", &PREALLOCATIONS)?,
        backing: backing.map(|name| BackingName { name, format }),
    };
    options.finish("qcow2")?;
    Ok(created)
}

/// A qcow2 image that is created. Its file is brought to stable storage once, in the end.
pub struct Qcow2Target {
    file: Arc<dyn ImageFile>,
    /// An image whose backing file is not open is only created.
    image: Option<Qcow2>,
    compress: bool,
}

impl Qcow2Target {
    /// Creates an image in an empty file.
    pub fn create(
        file: Arc<dyn ImageFile>,
        options: &CreateOptions,
        content: NewContent,
    ) -> Result<Qcow2Target, qcow2::Error> {
        let unsynced: Arc<dyn ImageFile> = Arc::new(Unsynced(Arc::clone(&file)));
        Qcow2::create(Arc::clone(&unsynced), options)?;
        let image = if options.backing.is_some() && content.backing.is_none() {
            None
        } else {
            let options = qcow2::Options {
                backing: content.backing,
                ..Default::default()
            };
            Some(Qcow2::open(unsynced, options)?)
        };
        Ok(Qcow2Target {
            file,
            image,
            compress: content.compress,
        })
    }

    fn image(&self) -> io::Result<&Qcow2> {
        self.image.as_ref().ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, "the backing file is not open")
        })
    }
}

impl Target for Qcow2Target {
    fn unit(&self) -> u64 {
        match (&self.image, self.compress) {
            (Some(image), true) => image.header().cluster_size(),
            _ => SECTOR,
        }
    }

    fn is_sequential(&self) -> bool {
        false
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self.compress {
            true => self.image()?.write_compressed(bytes, offset),
            false => self.image()?.write_at(bytes, offset),
        }
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        self.image()?.write_zeroes(range, true)
    }

    fn finish(&self, sync: bool) -> io::Result<()> {
        if let Some(image) = &self.image {
            image.flush()?;
        }
        if sync { self.file.sync() } else { Ok(()) }
    }
}
