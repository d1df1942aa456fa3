//! Errors of disk images.

use std::io;
use std::path::PathBuf;

/// Why a disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("cannot open disk '{path}' for {access}: {source}{remedy}", path = .path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// Why not.
        source: io::Error,
        /// What may help, as a continuation of the line.
        remedy: &'static str,
    },
    /// It is neither a regular file nor a block device.
    #[error("cannot use disk '{path}': it is {kind}, not a regular file or a block device", path = .path.display())]
    Kind {
        /// The image.
        path: PathBuf,
        /// The kind of file that it is.
        kind: &'static str,
    },
    /// Its size cannot be that of a disk.
    #[error("cannot use disk '{path}' of {size} bytes: {reason}", path = .path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Why it cannot be used and what to do.
        reason: String,
    },
    /// Another machine uses it.
    #[error(
        "cannot lock disk '{path}': it is in use by another machine, disk or mount; \
         only read-only disks can be shared",
        path = .path.display()
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// Its file system has no locks.
    #[error(
        "cannot lock disk '{path}': {source}; its file system does not lock files, so 'lock=off' is \
         the way to use it, if nothing else does",
        path = .path.display()
    )]
    NoLocks {
        /// The image.
        path: PathBuf,
        /// What the file system says.
        source: io::Error,
    },
    /// Its name says that it has a format in which disks cannot be, so the guest would see garbage.
    #[error(
        "cannot use disk '{path}': its name says that it is a {format} image; 'format=raw' gives the \
         guest the bytes of the file as they are, 'format=qcow2' opens a qcow2 image, and 'qemu-img \
         convert -f {format} -O raw' makes a raw image of it",
        path = .path.display()
    )]
    NamedFormat {
        /// The image.
        path: PathBuf,
        /// The format, as `qemu-img` calls it.
        format: &'static str,
    },
    /// Its path leads to a different file than a moment before.
    #[error(
        "cannot open disk '{path}' with 'cache=none': another file took its place at that moment; \
         try again",
        path = .path.display()
    )]
    Changed {
        /// The image.
        path: PathBuf,
    },
    /// Its path leads to another file than the one that is open.
    #[error(
        "cannot use disk '{path}' for this: its path leads to another file than the one that is open",
        path = .path.display()
    )]
    Replaced {
        /// The image.
        path: PathBuf,
    },
    /// The page cache cannot be bypassed.
    #[error(
        "cannot open disk '{path}' with 'cache=none': {source}; its file system may not have \
         O_DIRECT, so use another cache mode",
        path = .path.display()
    )]
    Direct {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its tables and its data would share blocks of the storage, so the page cache cannot be bypassed for the data
    /// alone.
    #[error(
        "cannot open disk '{path}' with 'cache=none': its {unit} of {size} bytes are smaller than a block of {block}; \
         use another cache mode, or convert it to larger clusters",
        path = .path.display()
    )]
    DirectClusters {
        /// The image.
        path: PathBuf,
        /// "clusters" or "subclusters".
        unit: &'static str,
        /// Their size in bytes.
        size: u64,
        /// Size in bytes that they must have at least.
        block: u64,
    },
    /// It is not a qcow2 image, or not one that can be used.
    #[error("cannot open disk '{path}' as qcow2: {source}", path = .path.display())]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: crate::qcow2::Error,
    },
    /// A new image cannot be made.
    #[error("cannot create disk '{path}' as qcow2: {source}", path = .path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: crate::qcow2::Error,
    },
    /// It is read-only, so its guest cannot write to an overlay either.
    #[error("cannot make an overlay of disk '{path}': it is read-only", path = .path.display())]
    ReadOnlyBase {
        /// The image.
        path: PathBuf,
    },
    /// It has a backing file, and must not have any.
    #[error(
        "cannot open disk '{path}': it has the backing file '{backing}', which is not to be opened; \
         'backing=on' allows it, if you know where the image is from",
        path = .path.display(),
        backing = .backing.display()
    )]
    BackingFile {
        /// The image.
        path: PathBuf,
        /// The backing file.
        backing: PathBuf,
    },
    /// A backing file has a format that is not supported.
    #[error(
        "cannot use '{path}' as a backing file: its format is '{format}', and backing files are raw \
         or qcow2",
        path = .path.display(),
        format = .format.escape_debug()
    )]
    BackingFormat {
        /// The backing file.
        path: PathBuf,
        /// The format.
        format: String,
    },
    /// The file system refused something else.
    #[error("cannot {action} disk '{path}': {source}", path = .path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}
