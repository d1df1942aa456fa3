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

use super::qcow2_target::{Qcow2Target, qcow2_options};
use crate::foreign::{ForeignFormat, ForeignOptions, OpenError, VmdkDetails};
use crate::lock::lock_image;
use crate::qcow2::{self, Layer, Preallocation, Qcow2};
use crate::{
    HostFile, Image, ImageFile, ImageTarget, OptionError, Options, RawImage, Target, parse_size,
};

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

/// Why an image cannot be opened, or changed.
#[derive(Debug, Error)]
#[error("cannot {action} '{}': {reason}", path.display())]
pub struct OpenImageError {
    action: &'static str,
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
    /// The image, if it is of this format.
    pub qcow2: Option<Arc<Qcow2>>,
}

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To be read, while nobody else writes to it.
    Read,
    /// To be read, whoever writes to it. What is read can be of no moment.
    ReadShared,
    /// To be written, while nobody else uses it.
    Write,
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

/// Opens an image with its backing files. Without a format, [`probe`] decides.
///
/// # Errors
/// If a file cannot be opened or read, another program uses it, or it is not an image of this format that
/// Bantam can read; to be written, also if it is of a format that is only read.
pub fn open(
    path: &Path,
    format: Option<Format>,
    purpose: Purpose,
) -> Result<Opened, OpenImageError> {
    open_with(path, format, purpose, open_qcow2)
}

/// Opens an image without its backing files, which may be missing, to examine what is its own. It is read-only, and
/// what the backing files hold reads as zeroes. Without a format, [`probe`] decides.
///
/// # Errors
/// Those of [`open`].
pub fn open_alone(
    path: &Path,
    format: Option<Format>,
    purpose: Purpose,
) -> Result<Opened, OpenImageError> {
    open_with(path, format, purpose, open_qcow2_alone)
}

fn open_with(
    path: &Path,
    format: Option<Format>,
    purpose: Purpose,
    open_qcow2: fn(&Path, Purpose) -> Result<Opened, OpenError>,
) -> Result<Opened, OpenImageError> {
    let opened = format.map_or_else(|| probe_path(path), Ok);
    let opened = opened.and_then(|format| match format {
        Format::Qcow2 => open_qcow2(path, purpose),
        _ => open_single(path, format, purpose),
    });
    opened.map_err(|reason| OpenImageError {
        action: "open",
        path: path.to_owned(),
        reason,
    })
}

/// Opens a qcow2 image without its backing file, to change or examine what is its own.
///
/// # Errors
/// Those of [`open`].
pub fn open_file_of_qcow2(
    path: &Path,
    purpose: Purpose,
) -> Result<Arc<dyn ImageFile>, OpenImageError> {
    let file = open_file(path, purpose, 0);
    file.map_err(|error| OpenImageError {
        action: "open",
        path: path.to_owned(),
        reason: error.into(),
    })
}

fn probe_path(path: &Path) -> Result<Format, OpenError> {
    Ok(probe(&HostFile::new(open_host(path, false, 0)?))?)
}

fn open_qcow2(path: &Path, purpose: Purpose) -> Result<Opened, OpenError> {
    let mut files = Vec::new();
    let options = qcow2::Options {
        read_only: purpose != Purpose::Write,
        ..Default::default()
    };
    let mut open_layer = |path: &Path, format: &str, read_only: bool| {
        let format: Format = format.parse().map_err(io::Error::other)?;
        let purpose = match purpose {
            Purpose::Write if read_only => Purpose::Read,
            purpose => purpose,
        };
        if format == Format::Qcow2 {
            files.push(path.to_owned());
            let file = open_file(path, purpose, 0).map_err(|error| with_path(path, &error))?;
            return Ok(Layer::Qcow2(file));
        }
        let opened = open_single(path, format, purpose);
        let opened = opened.map_err(|error| with_path(path, &error))?;
        files.extend(opened.files);
        Ok(Layer::Other(opened.image))
    };
    let image = qcow2::open_chain(path, options, &mut open_layer);
    let image = Arc::new(image.map_err(|error| OpenError::Unsupported(error.to_string()))?);
    Ok(opened_qcow2(image, files))
}

fn open_qcow2_alone(path: &Path, purpose: Purpose) -> Result<Opened, OpenError> {
    let image = Qcow2::open_alone(open_file(path, purpose, 0)?);
    let image = image.map_err(|error| OpenError::Unsupported(error.to_string()))?;
    Ok(opened_qcow2(Arc::new(image), vec![path.to_owned()]))
}

fn opened_qcow2(image: Arc<Qcow2>, files: Vec<PathBuf>) -> Opened {
    Opened {
        image: Arc::clone(&image) as Arc<dyn Image>,
        format: Format::Qcow2,
        files,
        cluster_size: Some(image.header().cluster_size()),
        vmdk: None,
        qcow2: Some(image),
    }
}

fn with_path(path: &Path, error: &dyn fmt::Display) -> io::Error {
    io::Error::other(format!("'{}': {error}", path.display()))
}

/// Opens an image of a format without backing files.
fn open_single(path: &Path, format: Format, purpose: Purpose) -> Result<Opened, OpenError> {
    let read_only = purpose != Purpose::Write;
    let mut files = vec![path.to_owned()];
    let Format::Foreign(foreign) = format else {
        let file = open_file(path, purpose, 0)?;
        return Ok(Opened {
            image: Arc::new(RawImage::new(file, read_only)?),
            format,
            files,
            cluster_size: None,
            vmdk: None,
            qcow2: None,
        });
    };
    if !read_only {
        return Err(OpenError::Unsupported(format!(
            "an image of the format {format} can only be read; convert it to change it"
        )));
    }
    let file = open_file(path, purpose, 0)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    // A link would let the owner of the image choose any file of the host.
    let opened = foreign.open(file, &mut |name| {
        open_file(&folder.join(name), purpose, O_NOFOLLOW)
    })?;
    files.extend(opened.siblings.iter().map(|name| folder.join(name)));
    Ok(Opened {
        image: opened.image,
        format,
        files,
        cluster_size: opened.cluster_size,
        vmdk: opened.vmdk,
        qcow2: None,
    })
}

/// How an image that is created is written.
#[derive(Debug, Clone, Default)]
pub struct NewContent {
    /// Whether what is written is compressed.
    pub compress: bool,
    /// The backing file that the options name. Without it, an image that has one is only created.
    pub backing: Option<Arc<dyn Image>>,
}

/// Creates an image of a disk that reads as zeroes, or as its backing file. A file that is there is replaced; a
/// block device keeps what it has.
///
/// # Errors
/// If the host refuses, or the format has not these options or no compression.
pub fn create(
    path: &Path,
    format: Format,
    size: u64,
    mut options: Options,
    content: NewContent,
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
    if content.compress && format != Format::Qcow2 {
        return Err(failed(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("the format {format} has no compression of this kind"),
        )));
    }
    let size = size.next_multiple_of(SECTOR);
    match format {
        Format::Raw => {
            let preallocation = options
                .take_choice("preallocation", &RAW_PREALLOCATIONS)
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
        Format::Qcow2 => {
            let options = qcow2_options(options, size).map_err(wrong)?;
            let (file, is_new) = create_file(path, 0).map_err(failed)?;
            let file: Arc<dyn ImageFile> = Arc::new(HostFile::new(file));
            let created = Qcow2Target::create(file, &options, content);
            let target = created.map_err(|error| {
                remove_created(path, is_new);
                failed(io::Error::other(error))
            })?;
            Ok(Created {
                target: Box::new(target),
                reads_as_zeroes: options.backing.is_none(),
                file: is_new.then(|| path.to_owned()),
            })
        }
    }
}

/// Lists the size and the options that an image is created with, each after a space, in the way of qemu-img.
pub fn describe_options(format: Format, size: u64, options: &Options) -> String {
    let mut text = String::new();
    for (key, default) in option_names(format) {
        if *key == "size" {
            text.push_str(&format!(" size={size}"));
            continue;
        }
        let Some(value) = options.get(key).or(*default) else {
            continue;
        };
        match parse_size(value) {
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
        Format::Raw => &[("size", None), ("preallocation", None)],
        Format::Foreign(ForeignFormat::Vmdk) => &[
            ("size", None),
            ("adapter_type", None),
            ("compat6", Some("off")),
            ("hwversion", Some("undefined")),
            ("subformat", None),
        ],
        Format::Foreign(ForeignFormat::Vhd) => {
            &[("size", None), ("subformat", None), ("force_size", None)]
        }
        Format::Foreign(ForeignFormat::Vhdx) => &[
            ("size", None),
            ("log_size", Some("1048576")),
            ("block_size", Some("0")),
            ("subformat", None),
        ],
        Format::Foreign(ForeignFormat::Vdi) => &[("size", None), ("static", Some("off"))],
        Format::Qcow2 => &[
            ("cluster_size", Some("65536")),
            ("extended_l2", Some("off")),
            ("preallocation", None),
            ("compression_type", Some("zlib")),
            ("size", None),
            ("compat", None),
            ("backing_file", None),
            ("backing_fmt", None),
            ("lazy_refcounts", Some("off")),
            ("refcount_bits", Some("16")),
        ],
    }
}

/// Lists the options that an image of a format is created with, in the way of qemu-img.
pub fn option_help(format: Format) -> String {
    let options: &[OptionHelp] = match format {
        Format::Raw => &[RAW_PREALLOCATION_HELP, SIZE_HELP],
        Format::Foreign(ForeignFormat::Vmdk) => &[
            (
                "adapter_type",
                "str",
                "Virtual adapter: ide, buslogic, lsilogic or legacyESX",
            ),
            SIZE_HELP,
            ("subformat", "str", "monolithicSparse or streamOptimized"),
        ],
        Format::Foreign(ForeignFormat::Vhd) => &[
            (
                "force_size",
                SWITCH_TYPE,
                "Size as given, not as cylinders, heads and sectors allow it",
            ),
            SIZE_HELP,
            SUBFORMAT_HELP,
        ],
        Format::Foreign(ForeignFormat::Vhdx) => &[
            (
                "block_size",
                "size",
                "Block size; 0 chooses one that fits the disk",
            ),
            SIZE_HELP,
            SUBFORMAT_HELP,
        ],
        Format::Foreign(ForeignFormat::Vdi) => &[
            SIZE_HELP,
            (
                "static",
                SWITCH_TYPE,
                "Whether all blocks are there from the start",
            ),
        ],
        Format::Qcow2 => &[
            ("backing_file", "str", "File name of the backing file"),
            ("backing_fmt", "str", "Format of the backing file"),
            ("cluster_size", "size", "Size of a cluster"),
            COMPAT_HELP,
            (
                "compression_type",
                "str",
                "Compression of clusters: zlib or zstd",
            ),
            (
                "extended_l2",
                SWITCH_TYPE,
                "Whether clusters have subclusters",
            ),
            LAZY_REFCOUNTS_HELP,
            (
                "preallocation",
                "str",
                "What is allocated in advance: off, metadata, falloc or full",
            ),
            ("refcount_bits", "num", "Width of a refcount in bits"),
            SIZE_HELP,
        ],
    };
    format!("Supported {format} options:\n{}", option_lines(options))
}

/// Lists the options of a qcow2 image that can be changed, in the way of qemu-img.
pub fn amend_help() -> String {
    let lines = option_lines(&[COMPAT_HELP, LAZY_REFCOUNTS_HELP, SIZE_HELP]);
    format!("Amend options for 'qcow2':\n{lines}")
}

/// The name of an option, the type of its values and what it is.
type OptionHelp = (&'static str, &'static str, &'static str);

const SWITCH_TYPE: &str = "bool (on/off)";
const SIZE_HELP: OptionHelp = ("size", "size", "Virtual disk size");
const SUBFORMAT_HELP: OptionHelp = ("subformat", "str", "dynamic or fixed");
const RAW_PREALLOCATION_HELP: OptionHelp = (
    "preallocation",
    "str",
    "What is allocated in advance: off, falloc or full",
);
const COMPAT_HELP: OptionHelp = (
    "compat",
    "str",
    "Version of the format: v2 [0.10] or v3 [1.1]",
);
const LAZY_REFCOUNTS_HELP: OptionHelp = (
    "lazy_refcounts",
    SWITCH_TYPE,
    "Whether QEMU may write refcounts late",
);

fn option_lines(options: &[OptionHelp]) -> String {
    let lines = options.iter().map(|(name, kind, what)| {
        let option = format!("{name}=<{kind}>");
        format!("  {option:<22} - {what}\n")
    });
    lines.collect()
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
    let opened = open(path, Some(format), Purpose::Write)?;
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
    let opened = open(path, format, Purpose::Write)?;
    let before = opened.image.size();
    let resized = || -> io::Result<()> {
        if preallocation != Preallocation::Off && size < before {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "storage is only reserved for what is added to a disk, and this one becomes smaller",
            ));
        }
        if let Some(image) = &opened.qcow2 {
            let size = size.checked_next_multiple_of(SECTOR);
            let size = size.ok_or(io::ErrorKind::FileTooLarge)?;
            image
                .resize_with(size, preallocation)
                .map_err(io::Error::from)?;
            return image.flush();
        }
        // The image that is open has the lock.
        let file = open_host(path, true, 0)?;
        if size > MAX_SIZE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let size = size.next_multiple_of(SECTOR);
        file.set_len(size)?;
        prepare(&file, before.min(size), size, preallocation)
    };
    resized().map_err(|error| OpenImageError {
        action: "resize",
        path: path.to_owned(),
        reason: OpenError::Io(error),
    })
}

/// What can be allocated in advance in a raw image.
const RAW_PREALLOCATIONS: [(&str, Preallocation); 3] = [
    ("off", Preallocation::Off),
    ("falloc", Preallocation::Falloc),
    ("full", Preallocation::Full),
];

/// The names of [`Preallocation`].
pub const PREALLOCATIONS: [(&str, Preallocation); 4] = [
    ("off", Preallocation::Off),
    ("metadata", Preallocation::Metadata),
    ("falloc", Preallocation::Falloc),
    ("full", Preallocation::Full),
];

/// Reserves the storage of a raw image from `start` to `end`.
fn prepare(file: &File, start: u64, end: u64, preallocation: Preallocation) -> io::Result<()> {
    match preallocation {
        Preallocation::Off => Ok(()),
        Preallocation::Metadata => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "a raw image has no metadata to allocate; off, falloc and full are possible",
        )),
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

fn open_file(path: &Path, purpose: Purpose, flags: i32) -> io::Result<Arc<dyn ImageFile>> {
    let file = open_host(path, purpose == Purpose::Write, flags)?;
    match purpose {
        Purpose::Read => lock(&file, true)?,
        Purpose::ReadShared => {}
        Purpose::Write => lock(&file, false)?,
    }
    Ok(Arc::new(HostFile::new(file)))
}

/// Opens a regular file or block device.
fn open_host(path: &Path, writable: bool, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    // A pipe must not be waited for.
    check_type(options.custom_flags(flags | O_NONBLOCK).open(path)?)
}

/// Locks an image against other programs, if its file system has locks.
fn lock(file: &File, read_only: bool) -> io::Result<()> {
    match lock_image(file, read_only) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "another program or machine uses it",
        )),
        _ => Ok(()),
    }
}

/// Creates a file of `size` zeroes, or opens a block device that is large enough. Returns whether it is a file.
fn create_file(path: &Path, size: u64) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true);
    let file = check_type(options.custom_flags(O_NONBLOCK).open(path)?)?;
    lock(&file, false)?;
    let metadata = file.metadata()?;
    if metadata.is_file() {
        // A new file is not truncated: if an empty one is, ext4 writes all of it when it is closed, and its owner
        // waits for that.
        if metadata.len() > 0 {
            file.set_len(0)?;
        }
        if size > 0 {
            file.set_len(size)?;
        }
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
