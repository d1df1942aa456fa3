//! VHD, the format of Virtual PC and of older Hyper-V.
//!
//! The specification is Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0 (2006). A
//! fixed image is the disk, followed by a footer of 512 bytes. A dynamic image begins with a copy of the
//! footer and a header, which says where the block allocation table is: for each block of the disk, a number
//! of 32 bits with the sector where the block begins, with a bitmap in front of its data. Numbers are
//! big-endian.

mod writer;

use std::io;
use std::sync::Arc;

use super::blocks::{BlockImage, Layout, Place, SizedFile};
use super::bytes::Header;
use super::tables::Tables;
use super::{Foreign, OpenError};
use crate::ImageFile;
pub use writer::VhdWriter;

const COOKIE: &[u8; 8] = b"conectix";
const HEADER_COOKIE: &[u8; 8] = b"cxsparse";
const SECTOR: u64 = 512;
const FOOTER_SIZE: u64 = 512;
const HEADER_SIZE: usize = 1024;
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
const UNALLOCATED: u32 = 0xffff_ffff;
/// The most sectors that a geometry can say. A larger disk has this one.
const MAX_GEOMETRY: u64 = 65535 * 16 * 255;
/// The specification bounds a disk to 2040 GiB.
const MAX_SIZE: u64 = 2040 << 30;
/// Programs that write the size of the disk as it is. The disks of others end where their geometry says.
const CREATORS_OF_EXACT_SIZES: [&[u8; 4]; 6] =
    [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];

/// Whether a file that begins with `start` is a dynamic VHD image. A fixed one begins with the first bytes of
/// its disk, and so cannot be told from a raw image.
pub fn probe(start: &[u8]) -> bool {
    start.starts_with(COOKIE)
}

/// Opens a VHD image.
///
/// # Errors
/// If the file cannot be read, is not a VHD image, or is one that depends on another.
pub fn open(file: Arc<dyn ImageFile>) -> Result<Foreign, OpenError> {
    let file = SizedFile::new(file)?;
    let footer = footer(&file)?;
    let footer = Header(&footer);
    let disk_type = footer.be32(60);
    let size = disk_size(footer);
    if size > MAX_SIZE {
        return Err(OpenError::damaged(format!(
            "a disk of {size} bytes is larger than the format allows"
        )));
    }
    let (layout, cluster_size) = match disk_type {
        FIXED => {
            if size > file.size {
                return Err(OpenError::damaged("the file ends before its disk does"));
            }
            (Vhd::Fixed { size }, None)
        }
        DYNAMIC => {
            let dynamic = dynamic(&file, footer.be64(16), size)?;
            let cluster_size = dynamic.block_size;
            (Vhd::Dynamic(dynamic), Some(cluster_size))
        }
        DIFFERENCING => {
            return Err(OpenError::unsupported(
                "it is a differencing VHD image, which holds only what differs from another one; merge them \
                 with Hyper-V's Merge-VHD",
            ));
        }
        _ => return Err(OpenError::damaged(format!("its type is {disk_type}"))),
    };
    Ok(Foreign {
        image: Arc::new(BlockImage::new(size, vec![file], layout)),
        siblings: Vec::new(),
        cluster_size,
        vmdk: None,
    })
}

/// Returns the footer: the copy at the start, which only dynamic images have, or the one at the end.
fn footer(file: &SizedFile) -> Result<[u8; FOOTER_SIZE as usize], OpenError> {
    let mut footer = [0; FOOTER_SIZE as usize];
    file.file.read_at(&mut footer, 0)?;
    if !footer.starts_with(COOKIE) {
        let Some(offset) = file.size.checked_sub(FOOTER_SIZE) else {
            return Err(OpenError::unsupported("it is not a VHD image"));
        };
        file.file.read_at(&mut footer, offset)?;
        // Another copy is at the start of all others.
        if !footer.starts_with(COOKIE) || Header(&footer).be32(60) != FIXED {
            return Err(OpenError::unsupported("it is not a VHD image"));
        }
    }
    if Header(&footer).be32(64) != checksum(&footer, 64) {
        return Err(OpenError::damaged("its footer has another checksum"));
    }
    Ok(footer)
}

fn disk_size(footer: Header<'_>) -> u64 {
    let [_, _, heads, sectors] = footer.bytes(56);
    let geometry = u64::from(footer.be16(56)) * u64::from(heads) * u64::from(sectors);
    let creator = footer.bytes(28);
    if CREATORS_OF_EXACT_SIZES.contains(&&creator) || geometry == MAX_GEOMETRY {
        footer.be64(48) / SECTOR * SECTOR
    } else {
        geometry * SECTOR
    }
}

fn dynamic(file: &SizedFile, header_offset: u64, size: u64) -> Result<Dynamic, OpenError> {
    let end = header_offset.checked_add(HEADER_SIZE as u64);
    if end.is_none_or(|end| end > file.size) {
        return Err(OpenError::damaged(
            "its header is beyond the end of the file",
        ));
    }
    let mut header = [0; HEADER_SIZE];
    file.file.read_at(&mut header, header_offset)?;
    if !header.starts_with(HEADER_COOKIE) {
        return Err(OpenError::damaged("it has no header"));
    }
    if Header(&header).be32(36) != checksum(&header, 36) {
        return Err(OpenError::damaged("its header has another checksum"));
    }
    let header = Header(&header);
    let block_size = u64::from(header.be32(32));
    if !block_size.is_power_of_two() || block_size < SECTOR {
        return Err(OpenError::damaged(format!(
            "blocks of {block_size} bytes are not possible"
        )));
    }
    let blocks = u64::from(header.be32(28));
    if size.div_ceil(block_size) > blocks {
        return Err(OpenError::damaged(format!(
            "{blocks} blocks are too few for a disk of {size} bytes"
        )));
    }
    let table = header.be64(16);
    let end = table.checked_add(blocks * 4);
    if table % 4 != 0 || end.is_none_or(|end| end > file.size) {
        return Err(OpenError::damaged(
            "its block allocation table ends beyond the end of the file",
        ));
    }
    Ok(Dynamic {
        tables: Tables::new(Arc::clone(&file.file), file.size),
        table,
        block_size,
        bitmap_size: bitmap_size(block_size),
    })
}

/// Returns the size of the bitmap in front of a block: a bit for each sector, in whole sectors.
fn bitmap_size(block_size: u64) -> u64 {
    (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
}

/// Returns the checksum of a footer or header, whose own place is `at`: the complement of the sum of the
/// other bytes.
fn checksum(header: &[u8], at: usize) -> u32 {
    let others = header.iter().enumerate();
    let others = others.filter(|(index, _)| !(at..at + 4).contains(index));
    !others.fold(0, |sum: u32, (_, &byte)| sum.wrapping_add(u32::from(byte)))
}

#[derive(Debug)]
enum Vhd {
    Fixed { size: u64 },
    Dynamic(Dynamic),
}

#[derive(Debug)]
struct Dynamic {
    tables: Tables,
    /// Where the block allocation table begins.
    table: u64,
    block_size: u64,
    bitmap_size: u64,
}

impl Layout for Vhd {
    fn place(&self, offset: u64) -> io::Result<(Place, u64)> {
        let dynamic = match self {
            Vhd::Dynamic(dynamic) => dynamic,
            Vhd::Fixed { size } => {
                let place = Place::File {
                    file: 0,
                    offset,
                    sparse: true,
                };
                return Ok((place, size - offset));
            }
        };
        let (number, within) = (offset / dynamic.block_size, offset % dynamic.block_size);
        let len = dynamic.block_size - within;
        let entry = u32::from_be_bytes(dynamic.tables.entry(dynamic.table + number * 4)?);
        if entry == UNALLOCATED {
            return Ok((Place::Zeroes, len));
        }
        // A sector without its bit set in the bitmap was never written, and is zeroes in the block too.
        let place = Place::File {
            file: 0,
            offset: u64::from(entry) * SECTOR + dynamic.bitmap_size + within,
            sparse: false,
        };
        Ok((place, len))
    }
}
