//! VDI, the format of VirtualBox.
//!
//! VirtualBox's own header is the specification: `src/VBox/Storage/VDICore.h`, versions 1.1. A header of 512
//! bytes, a map with a number of 32 bits for each block of the disk, and the blocks. The number says which
//! of the blocks in the file it is. Numbers are little-endian.

mod writer;

use std::io;
use std::sync::Arc;

use super::blocks::{BlockImage, Layout, Place, SizedFile};
use super::bytes::Header;
use super::tables::Tables;
use super::{Foreign, MAX_DISK_SIZE, OpenError};
use crate::ImageFile;
pub use writer::VdiWriter;

/// The bytes at offset 64 of a file by which it is a VDI image.
const SIGNATURE: u32 = 0xbeda_107f;
const SIGNATURE_OFFSET: usize = 64;
const VERSION: u32 = 0x0001_0001;
const DYNAMIC: u32 = 1;
const STATIC: u32 = 2;
const UNDO: u32 = 3;
const DIFFERENCING: u32 = 4;
const SECTOR: u64 = 512;
/// A block that has never been written.
const FREE: u32 = 0xffff_ffff;
/// A block that was written with zeroes, or discarded.
const ZEROES: u32 = 0xffff_fffe;

/// Whether a file that begins with `start` is a VDI image.
pub fn probe(start: &[u8]) -> bool {
    Header(start).le32(SIGNATURE_OFFSET) == SIGNATURE
}

/// Opens a VDI image.
///
/// # Errors
/// If the file cannot be read, is not a VDI image, or is one that depends on another.
pub fn open(file: Arc<dyn ImageFile>) -> Result<Foreign, OpenError> {
    let file = SizedFile::new(file)?;
    let mut header = [0; SECTOR as usize];
    file.file.read_at(&mut header, 0)?;
    if !probe(&header) {
        return Err(OpenError::unsupported("it is not a VDI image"));
    }
    let header = Header(&header);
    let version = header.le32(0x44);
    if version != VERSION {
        let (major, minor) = (version >> 16, version & 0xffff);
        return Err(OpenError::unsupported(format!(
            "VDI version {major}.{minor} is not supported, only 1.1"
        )));
    }
    let image_type = header.le32(0x4c);
    let has_link = header.bytes::<16>(0x1a8) != [0; 16] || header.bytes::<16>(0x1b8) != [0; 16];
    match image_type {
        DYNAMIC | STATIC if !has_link => {}
        DYNAMIC | STATIC | UNDO | DIFFERENCING => {
            return Err(OpenError::unsupported(
                "it is a differencing VDI image, which holds only what differs from another one; merge them \
                 with VBoxManage clonemedium",
            ));
        }
        _ => return Err(OpenError::damaged(format!("its type is {image_type}"))),
    }
    let sector_size = header.le32(0x168);
    if u64::from(sector_size) != SECTOR {
        return Err(OpenError::unsupported(format!(
            "sectors of {sector_size} bytes are not supported, only those of 512"
        )));
    }
    let disk_size = header.le64(0x170);
    if disk_size > MAX_DISK_SIZE {
        return Err(OpenError::damaged(format!(
            "a disk of {disk_size} bytes is too large"
        )));
    }
    let size = disk_size.next_multiple_of(SECTOR);
    let block_size = u64::from(header.le32(0x178));
    if !block_size.is_power_of_two() || block_size < SECTOR {
        return Err(OpenError::damaged(format!(
            "blocks of {block_size} bytes are not possible"
        )));
    }
    if header.le32(0x17c) != 0 {
        return Err(OpenError::unsupported(
            "blocks with additional data are not supported",
        ));
    }
    let blocks = header.le32(0x180);
    if u64::from(blocks) < size.div_ceil(block_size) {
        return Err(OpenError::damaged(format!(
            "{blocks} blocks are too few for a disk of {size} bytes"
        )));
    }
    let map = u64::from(header.le32(0x154));
    if map % 4 != 0 || map + u64::from(blocks) * 4 > file.size {
        return Err(OpenError::damaged(
            "the map of its blocks ends beyond the end of the file",
        ));
    }
    let layout = Vdi {
        tables: Tables::new(Arc::clone(&file.file), file.size),
        map,
        data: u64::from(header.le32(0x158)),
        block_size,
        blocks,
        is_static: image_type == STATIC,
    };
    Ok(Foreign {
        image: Arc::new(BlockImage::new(size, vec![file], layout)),
        siblings: Vec::new(),
        cluster_size: Some(block_size),
        vmdk: None,
    })
}

#[derive(Debug)]
struct Vdi {
    tables: Tables,
    /// Where the map begins.
    map: u64,
    /// Where the blocks begin.
    data: u64,
    block_size: u64,
    blocks: u32,
    is_static: bool,
}

impl Layout for Vdi {
    fn place(&self, offset: u64) -> io::Result<(Place, u64)> {
        let (number, within) = (offset / self.block_size, offset % self.block_size);
        let len = self.block_size - within;
        let entry = u32::from_le_bytes(self.tables.entry(self.map + number * 4)?);
        if matches!(entry, FREE | ZEROES) {
            return Ok((Place::Zeroes, len));
        }
        if entry >= self.blocks {
            return Err(super::error::damaged(
                "a block has a number beyond the last",
            ));
        }
        let place = Place::File {
            file: 0,
            offset: self.data + u64::from(entry) * self.block_size + within,
            sparse: self.is_static,
        };
        Ok((place, len))
    }
}
