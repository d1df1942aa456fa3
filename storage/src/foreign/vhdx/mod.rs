//! VHDX, the format of Hyper-V.
//!
//! The specification is Microsoft's open specification \[MS-VHDX\], version 1. A file has, at fixed places, an
//! identifier, two headers and two region tables, of each pair one that can be damaged by a crash. The
//! regions are the metadata, which have the size of disk and blocks, and the block allocation table (BAT):
//! for each block of the disk, a number of 64 bits with its state and place. Changes of these structures go
//! through a log. Numbers are little-endian.

mod structures;
mod writer;

use std::io;
use std::sync::Arc;

use super::blocks::{BlockImage, Layout, Place, SizedFile};
use super::error::damaged;
use super::tables::Tables;
use super::{Foreign, OpenError};
use crate::ImageFile;
use structures::{BAT_REGION, METADATA_REGION, MIB, Metadata};
pub use writer::VhdxWriter;

const IDENTIFIER: &[u8; 8] = b"vhdxfile";

/// Whether a file that begins with `start` is a VHDX image.
pub fn probe(start: &[u8]) -> bool {
    start.starts_with(IDENTIFIER)
}

/// Opens a VHDX image.
///
/// # Errors
/// If the file cannot be read, is not a VHDX image, is one that depends on another, or has changes in its
/// log.
pub fn open(file: Arc<dyn ImageFile>) -> Result<Foreign, OpenError> {
    let file = SizedFile::new(file)?;
    let mut identifier = [0; 8];
    file.file.read_at(&mut identifier, 0)?;
    if !probe(&identifier) {
        return Err(OpenError::unsupported("it is not a VHDX image"));
    }
    structures::check_header(&file)?;
    let regions = structures::regions(&file)?;
    let region = |id: &[u8; 16]| regions.iter().find(|region| &region.id == id);
    let (Some(bat), Some(metadata)) = (region(&BAT_REGION), region(&METADATA_REGION)) else {
        return Err(OpenError::damaged(
            "its block allocation table or its metadata are missing",
        ));
    };
    let Metadata {
        block_size,
        disk_size: size,
        sector_size,
    } = structures::metadata(&file, metadata)?;
    // After as many blocks follows an entry for a bitmap, which only differencing images have.
    let chunk = (1 << 23) * u64::from(sector_size) / u64::from(block_size);
    let blocks = size.div_ceil(u64::from(block_size));
    let entries = blocks + blocks.saturating_sub(1) / chunk;
    if entries * 8 > bat.length || bat.offset.saturating_add(entries * 8) > file.size {
        return Err(OpenError::damaged(
            "its block allocation table ends before its disk does",
        ));
    }
    let layout = Vhdx {
        tables: Tables::new(Arc::clone(&file.file), file.size),
        bat: bat.offset,
        block_size: u64::from(block_size),
        chunk,
    };
    Ok(Foreign {
        image: Arc::new(BlockImage::new(size, vec![file], layout)),
        siblings: Vec::new(),
        cluster_size: Some(u64::from(block_size)),
        vmdk: None,
    })
}

#[derive(Debug)]
struct Vhdx {
    tables: Tables,
    /// Where the block allocation table begins.
    bat: u64,
    block_size: u64,
    /// Number of blocks between two entries for bitmaps.
    chunk: u64,
}

impl Layout for Vhdx {
    fn place(&self, offset: u64) -> io::Result<(Place, u64)> {
        let (number, within) = (offset / self.block_size, offset % self.block_size);
        let len = self.block_size - within;
        let index = number + number / self.chunk;
        let entry = u64::from_le_bytes(self.tables.entry(self.bat + index * 8)?);
        // [MS-VHDX] 2.5.1.1.
        let place = match entry & 7 {
            // Not present, undefined, unmapped: any content is allowed, and zeroes reveal nothing.
            0 | 1 | 3 => Place::Unallocated,
            2 => Place::Zeroes,
            6 => Place::File {
                file: 0,
                offset: (entry >> 20)
                    .checked_mul(MIB)
                    .and_then(|block| block.checked_add(within))
                    .ok_or_else(|| damaged("a block has an impossible place"))?,
                sparse: false,
            },
            _ => return Err(damaged("a block has a state that its image cannot have")),
        };
        Ok((place, len))
    }
}
