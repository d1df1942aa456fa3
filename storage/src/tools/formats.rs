//! Formats by their names: the one place where an image of any format is opened or created.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use thiserror::Error;

use crate::foreign::{ForeignFormat, ForeignOptions, OpenError, VmdkDetails};
use crate::{HostFile, Image, ImageFile, ImageTarget, OptionError, Options, RawImage, Target};

const SECTOR: u64 = 512;
const PROBED: usize = 4096;
const QCOW2_MAGIC: &[u8; 4] = b"QFI\xfb";
/// The largest disk: offsets in it are signed numbers for the host.
const MAX_SIZE: u64 = i64::MAX as u64 - SECTOR + 1;

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// Of QEMU.
    Qcow2,
    /// Of another monitor.
    Foreign(ForeignFormat),
}

const NAMES: [(&str, Format); 6] = [
    ("raw", Format::Raw),
    ("qcow2", Format::Qcow2),
    ("vmdk", Format::Foreign(ForeignFormat::Vmdk)),
    ("vpc", Format::Foreign(ForeignFormat::Vhd)),
    ("vhdx", Format::Foreign(ForeignFormat::Vhdx)),
    ("vdi", Format::Foreign(ForeignFormat::Vdi)),
];

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, format)| format == self);
        formatter.write_str(name.map_or("", |(name, _)| name))
    }
}

/// A format that Bantam does not know.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("unknown format '{0}'; the formats are raw, qcow2, vmdk, vpc, vhdx and vdi")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Format, UnknownFormat> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found
            .map(|&(_, format)| format)
            .ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// Why an image cannot be opened.
#[derive(Debug, Error)]
#[error("cannot open '{}': {reason}", path.display())]
pub struct OpenImageError {
    path: PathBuf,
    reason: OpenError,
}

/// Why an image cannot be created.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The host refuses.
    #[error("cannot create '{}': {error}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },

    /// An option of the format is not right.
    #[error("cannot create '{}': {error}", path.display())]
    Option {
        /// The image.
        path: PathBuf,
        /// The reason.
        error: OptionError,
    },
}

/// An image that is open.
#[derive(Debug)]
pub struct Opened {
    /// The disk.
    pub image: Arc<dyn Image>,
    /// Its format.
    pub format: Format,
    /// Its files, by their numbers in [`crate::Content`].
    pub files: Vec<PathBuf>,
    /// The size of a block in bytes, if the format has blocks.
    pub cluster_size: Option<u64>,
    /// More about a VMDK image.
    pub vmdk: Option<VmdkDetails>,
}

/// Returns the format of an image by its first bytes. What is none of the other formats is raw.
///
/// This is for an image that is read by someone who knows where it comes from. It must never decide for a disk
/// of a machine: the guest could write the header of another format to a raw disk, with the name of a file of the
/// host as its backing file.
///
/// # Errors
/// If the file cannot be read.
pub fn probe(file: &dyn ImageFile) -> io::Result<Format> {
    let mut start = [0; PROBED];
    file.read_at(&mut start, 0)?;
    if start.starts_with(QCOW2_MAGIC) {
        return Ok(Format::Qcow2);
    }
    let length = file.size()?.min(PROBED as u64) as usize;
    let foreign = ForeignFormat::probe(&start[..length]);
    Ok(foreign.map_or(Format::Raw, Format::Foreign))
}

/// Opens an image. Without a format, [`probe`] decides.
///
/// # Errors
/// If a file cannot be opened or read, or is not an image of this format that Bantam can read; with `writable`, also
/// if it is of a format that is only read.
pub fn open(path: &Path, format: Option<Format>, writable: bool) -> Result<Opened, OpenImageError> {
    open_any(path, format, writable).map_err(|reason| OpenImageError {
        path: path.to_owned(),
        reason,
    })
}

fn open_any(path: &Path, format: Option<Format>, writable: bool) -> Result<Opened, OpenError> {
    let file = open_file(path, writable, 0)?;
    let format = match format {
        Some(format) => format,
        None => probe(&*file)?,
    };
    let mut files = vec![path.to_owned()];
    match format {
        Format::Raw => Ok(Opened {
            image: Arc::new(RawImage::new(file, !writable)?),
            format,
            files,
            cluster_size: None,
            vmdk: None,
        }),
        Format::Qcow2 => Err(OpenError::Unsupported(
            "qcow2 images are not supported".to_owned(),
        )),
        Format::Foreign(_) if writable => Err(OpenError::Unsupported(format!(
            "an image of the format {format} can only be read; convert it to change it"
        ))),
        Format::Foreign(foreign) => {
            let folder = path.parent().unwrap_or(Path::new(""));
            // A link would let the owner of the image choose any file of the host.
            let opened = foreign.open(file, &mut |name| {
                open_file(&folder.join(name), false, O_NOFOLLOW)
            })?;
            files.extend(opened.siblings.iter().map(|name| folder.join(name)));
            Ok(Opened {
                image: opened.image,
                format,
                files,
                cluster_size: opened.cluster_size,
                vmdk: opened.vmdk,
            })
        }
    }
}

/// Creates an image of a disk that reads as zeroes. A file that is there is replaced; a block device keeps what
/// it has.
///
/// # Errors
/// If the host refuses, or the format has not these options.
pub fn create(
    path: &Path,
    format: Format,
    size: u64,
    mut options: Options,
) -> Result<Created, CreateError> {
    let failed = |error| CreateError::Io {
        path: path.to_owned(),
        error,
    };
    let wrong = |error| CreateError::Option {
        path: path.to_owned(),
        error,
    };
    if size > MAX_SIZE {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    let size = size.next_multiple_of(SECTOR);
    match format {
        Format::Raw => {
            let preallocation = options
                .take_choice("preallocation", &PREALLOCATIONS)
                .map_err(wrong)?;
            options.finish("raw").map_err(wrong)?;
            let (file, is_new) = create_file(path, size).map_err(failed)?;
            let prepared = prepare(&file, 0, size, preallocation);
            prepared.map_err(|error| {
                remove_created(path, is_new);
                failed(error)
            })?;
            let file = Arc::new(HostFile::new(file));
            let image = RawImage::new(file, false).map_err(failed)?;
            Ok(Created {
                target: Box::new(ImageTarget(Arc::new(image))),
                reads_as_zeroes: is_new,
                file: is_new.then(|| path.to_owned()),
            })
        }
        Format::Foreign(foreign) => {
            let options = ForeignOptions::parse(foreign, options).map_err(wrong)?;
            let (file, is_new) = create_file(path, 0).map_err(failed)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let file = Arc::new(HostFile::new(file));
            let target = options.create(file, size, &name).map_err(|error| {
                remove_created(path, is_new);
                failed(error)
            })?;
            Ok(Created {
                target,
                reads_as_zeroes: true,
                file: is_new.then(|| path.to_owned()),
            })
        }
        Format::Qcow2 => Err(failed(io::Error::new(
            io::ErrorKind::Unsupported,
            "qcow2 images are not supported",
        ))),
    }
}

/// Lists the options that an image is created with, each after a space, in the way of qemu-img.
pub fn describe_options(format: Format, options: &Options) -> String {
    let mut text = String::new();
    for (key, default) in option_names(format) {
        let Some(value) = options.get(key).or(*default) else {
            continue;
        };
        match crate::parse_size(value) {
            Ok(size) if key.ends_with("_size") => text.push_str(&format!(" {key}={size}")),
            _ => text.push_str(&format!(" {key}={value}")),
        }
    }
    text
}

/// Returns the options of a format, in the order in which qemu-img tells them, and what it tells of one that is not
/// given.
fn option_names(format: Format) -> &'static [(&'static str, Option<&'static str>)] {
    match format {
        Format::Raw => &[("preallocation", None)],
        Format::Foreign(ForeignFormat::Vmdk) => &[
            ("adapter_type", None),
            ("compat6", Some("off")),
            ("hwversion", Some("undefined")),
            ("subformat", None),
        ],
        Format::Foreign(ForeignFormat::Vhd) => &[("subformat", None), ("force_size", None)],
        Format::Foreign(ForeignFormat::Vhdx) => &[
            ("log_size", Some("1048576")),
            ("block_size", Some("0")),
            ("subformat", None),
        ],
        Format::Foreign(ForeignFormat::Vdi) => &[("static", Some("off"))],
        Format::Qcow2 => &[],
    }
}

/// An image that has been created, to be written.
pub struct Created {
    /// What writes it.
    pub target: Box<dyn Target>,
    /// Whether it reads as zeroes.
    pub reads_as_zeroes: bool,
    /// The file that there is now. `None` for a block device.
    file: Option<PathBuf>,
}

impl Created {
    /// Removes the file: it is not whole.
    pub fn remove(self) {
        if let Some(path) = self.file {
            remove_created(&path, true);
        }
    }
}

fn remove_created(path: &Path, is_new: bool) {
    if is_new {
        // The error that led here is the one to report.
        let _ = fs::remove_file(path);
    }
}

/// Opens an image that is there, to be written as a target.
///
/// # Errors
/// Those of [`open`].
pub fn open_target(
    path: &Path,
    format: Format,
) -> Result<(Opened, Box<dyn Target>), OpenImageError> {
    let opened = open(path, Some(format), true)?;
    let target = Box::new(ImageTarget(Arc::clone(&opened.image)));
    Ok((opened, target))
}

/// Sets the size of the disk of an image. What is added reads as zeroes.
///
/// # Errors
/// If the image cannot be opened for writing, or the host cannot change its size.
pub fn resize(
    path: &Path,
    format: Option<Format>,
    size: u64,
    preallocation: Preallocation,
) -> Result<(), OpenImageError> {
    // This also says whether the format can be written.
    let before = open(path, format, true)?.image.size();
    let resized = || -> io::Result<()> {
        let file = host_file(path, true, 0)?;
        if size > MAX_SIZE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let size = size.next_multiple_of(SECTOR);
        file.set_len(size)?;
        prepare(&file, before.min(size), size, preallocation)
    };
    resized().map_err(|error| OpenImageError {
        path: path.to_owned(),
        reason: OpenError::Io(error),
    })
}

/// How much of the storage of an image is reserved when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    Off,
    /// All, by telling the file system.
    Falloc,
    /// All, by writing zeroes.
    Full,
}

/// The names of [`Preallocation`].
pub const PREALLOCATIONS: [(&str, Preallocation); 3] = [
    ("off", Preallocation::Off),
    ("falloc", Preallocation::Falloc),
    ("full", Preallocation::Full),
];

/// Reserves the storage of a raw image from `start` to `end`.
fn prepare(file: &File, start: u64, end: u64, preallocation: Preallocation) -> io::Result<()> {
    match preallocation {
        Preallocation::Off => Ok(()),
        _ if start == end => Ok(()),
        Preallocation::Falloc => {
            // Both are below the largest signed number.
            let (start, len) = (start as i64, (end - start) as i64);
            Ok(fallocate(file, FallocateFlags::empty(), start, len)?)
        }
        Preallocation::Full => {
            let zeroes = vec![0; 1 << 20];
            let mut at = start;
            while at < end {
                let len = (end - at).min(zeroes.len() as u64);
                file.write_all_at(&zeroes[..len as usize], at)?;
                at += len;
            }
            file.sync_data()
        }
    }
}

fn open_file(path: &Path, writable: bool, flags: i32) -> io::Result<Arc<dyn ImageFile>> {
    Ok(Arc::new(HostFile::new(host_file(path, writable, flags)?)))
}

/// Opens a regular file or block device.
fn host_file(path: &Path, writable: bool, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    // A pipe must not be waited for.
    check_type(options.custom_flags(flags | O_NONBLOCK).open(path)?)
}

/// Creates a file of `size` zeroes, or opens a block device that is large enough. Returns whether it is a file.
fn create_file(path: &Path, size: u64) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true);
    let file = check_type(options.custom_flags(O_NONBLOCK).open(path)?)?;
    if file.metadata()?.is_file() {
        file.set_len(0)?;
        file.set_len(size)?;
        return Ok((file, true));
    }
    let device_size = HostFile::new(file.try_clone()?).size()?;
    match device_size < size {
        true => Err(io::Error::new(
            io::ErrorKind::StorageFull,
            format!("the device has {device_size} bytes, fewer than the {size} of the disk"),
        )),
        false => Ok((file, false)),
    }
}

fn check_type(file: File) -> io::Result<File> {
    let file_type = file.metadata()?.file_type();
    if file_type.is_file() || file_type.is_block_device() {
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "it is neither a regular file nor a block device",
    ))
}
