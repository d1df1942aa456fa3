//! Images of other virtual machine monitors: they are read, and written once when they are created.
//!
//! VMDK, VHD, VHDX and VDI keep a disk in blocks, and tables that say where each block is. A format has a
//! folder, with what its files look like; [`BlockImage`] makes an [`Image`] of that.
//!
//! An image can come from anyone: each number in it is checked before it is used, no memory is taken by a
//! size that it claims, and it names no files except those in its own folder.

mod allocator;
mod blocks;
mod bytes;
mod create;
mod error;
mod new_image;
mod tables;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use crate::{Image, ImageFile};
pub use create::ForeignOptions;
pub use error::OpenError;
pub use vmdk::{Adapter, VmdkDetails, VmdkExtent};

/// No format here has larger disks, and offsets below it can be added without an overflow.
const MAX_DISK_SIZE: u64 = 1 << 60;

/// Returns a random identifier, as RFC 9562 makes it (version 4).
fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    // Numbers are little-endian here: the version is in the eighth byte.
    id[7] = id[7] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

/// Opens a file in the folder of an image by its name.
pub type OpenSibling<'a> = dyn FnMut(&str) -> io::Result<Arc<dyn ImageFile>> + 'a;

/// A format of another monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignFormat {
    /// Of VMware.
    Vmdk,
    /// Of Virtual PC.
    Vhd,
    /// Of Hyper-V.
    Vhdx,
    /// Of VirtualBox.
    Vdi,
}

/// An image of another monitor.
#[derive(Debug)]
pub struct Foreign {
    /// The disk.
    pub image: Arc<dyn Image>,
    /// The names of the files that the image consists of, except the first: in [`crate::Content`], the first
    /// of these has the number 1.
    pub siblings: Vec<String>,
    /// The size of a block in bytes, if there are blocks.
    pub cluster_size: Option<u64>,
    /// More about a VMDK image.
    pub vmdk: Option<VmdkDetails>,
}

impl ForeignFormat {
    /// Returns the format of a file that begins with `start`, which should be 4 KiB.
    ///
    /// Use this only for an image that is read: a guest can write what it likes to a raw image, and so make
    /// it look like one of another format.
    pub fn probe(start: &[u8]) -> Option<ForeignFormat> {
        if vmdk::probe(start) {
            Some(ForeignFormat::Vmdk)
        } else if vhd::probe(start) {
            Some(ForeignFormat::Vhd)
        } else if vhdx::probe(start) {
            Some(ForeignFormat::Vhdx)
        } else if vdi::probe(start) {
            Some(ForeignFormat::Vdi)
        } else {
            None
        }
    }

    /// Opens an image of this format. Only a VMDK image can have more files, which `open_sibling` opens; it
    /// gets names without a slash.
    ///
    /// # Errors
    /// If a file cannot be opened or read, or the image is not of this format, is damaged or not supported.
    pub fn open(
        self,
        file: Arc<dyn ImageFile>,
        open_sibling: &mut OpenSibling<'_>,
    ) -> Result<Foreign, OpenError> {
        match self {
            ForeignFormat::Vmdk => vmdk::open(file, open_sibling),
            ForeignFormat::Vhd => vhd::open(file),
            ForeignFormat::Vhdx => vhdx::open(file),
            ForeignFormat::Vdi => vdi::open(file),
        }
    }
}
