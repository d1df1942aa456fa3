//! A sparse extent: grains, found by a directory of tables.

use std::io::{self, Read};
use std::sync::Arc;

use flate2::read::ZlibDecoder;

use super::super::OpenError;
use super::super::blocks::{Place, SizedFile};
use super::super::bytes::Header;
use super::super::error::damaged;
use super::super::tables::Tables;
use super::{SECTOR, sectors};

/// The first bytes of a sparse extent.
pub const MAGIC: &[u8; 4] = b"KDMV";
/// The header takes a sector.
const HEADER_SIZE: usize = 512;
/// The bytes that a transfer as text would change, in a header that has them.
pub const LINE_ENDS: [u8; 4] = *b"\n \r\n";
/// In place of the grain directory in the header of a file that was written as a stream: the directory is
/// said by a copy of the header near the end.
pub const DIRECTORY_AT_END: u64 = u64::MAX;
const FOOTER_FROM_END: u64 = 1024;

pub const HAS_LINE_ENDS: u32 = 1 << 0;
pub const USE_REDUNDANT_DIRECTORY: u32 = 1 << 1;
const HAS_ZERO_GRAINS: u32 = 1 << 2;
pub const IS_COMPRESSED: u32 = 1 << 16;
pub const HAS_MARKERS: u32 = 1 << 17;
/// An entry of a grain table for a grain of zeroes, with [`HAS_ZERO_GRAINS`].
const ZERO_GRAIN: u32 = 1;
pub const DEFLATE: u16 = 1;

/// The largest grain that is decompressed in memory. Those in use have 64 KiB.
const MAX_COMPRESSED_GRAIN: u64 = 2 << 20;
const MAX_GRAIN: u64 = 1 << 30;
const MAX_ENTRIES_OF_TABLE: u64 = 64 << 10;

/// A sparse extent.
#[derive(Debug)]
pub struct Sparse {
    tables: Tables,
    /// Number of the file that the extent is in.
    pub file: usize,
    /// Its size in bytes.
    pub size: u64,
    /// Size of a grain in bytes.
    pub grain: u64,
    /// Number of grains of a table.
    grains_of_table: u64,
    directory: u64,
    has_zero_grains: bool,
    /// Whether grains are compressed.
    pub is_compressed: bool,
    /// Where the descriptor is, and its length. Empty if it is in another file.
    pub descriptor: (u64, u64),
}

impl Sparse {
    /// Reads the header of the extent in `file`, which has this number among those of the image.
    pub fn open(file: &SizedFile, number: usize) -> Result<Sparse, OpenError> {
        let mut header = read_header(file, 0)?;
        if Header(&header).le64(56) == DIRECTORY_AT_END {
            let offset = file.size.checked_sub(FOOTER_FROM_END);
            header = read_header(file, offset.unwrap_or_default())
                .ok()
                .filter(|header| Header(header).le64(56) != DIRECTORY_AT_END)
                .ok_or_else(|| {
                    OpenError::damaged("its end is missing, with the grain directory")
                })?;
        }
        let header = Header(&header);
        let (version, flags) = (header.le32(4), header.le32(8));
        if !(1..=3).contains(&version) {
            return Err(OpenError::unsupported(format!(
                "version {version} of sparse VMDK extents is not supported, only 1 to 3"
            )));
        }
        if flags & HAS_LINE_ENDS != 0 && header.bytes(73) != LINE_ENDS {
            return Err(OpenError::damaged(
                "it was transferred as text; transfer the original again as binary",
            ));
        }
        let is_compressed = flags & IS_COMPRESSED != 0;
        if is_compressed && (header.le16(77) != DEFLATE || flags & HAS_MARKERS == 0) {
            return Err(OpenError::unsupported(
                "its compression is not supported, only deflate with markers",
            ));
        }
        let size = sectors(header.le64(12))?;
        let grain = sectors(header.le64(20))?;
        let max_grain = match is_compressed {
            true => MAX_COMPRESSED_GRAIN,
            false => MAX_GRAIN,
        };
        if !grain.is_power_of_two() || !(SECTOR..=max_grain).contains(&grain) {
            return Err(OpenError::damaged(format!(
                "grains of {grain} bytes are not possible"
            )));
        }
        let grains_of_table = u64::from(header.le32(44));
        if !(1..=MAX_ENTRIES_OF_TABLE).contains(&grains_of_table) {
            return Err(OpenError::damaged(format!(
                "tables of {grains_of_table} grains are not possible"
            )));
        }
        let directory = match flags & USE_REDUNDANT_DIRECTORY {
            0 => header.le64(56),
            _ => header.le64(48),
        };
        let directory = sectors(directory)?;
        let tables = size.div_ceil(grain).div_ceil(grains_of_table);
        let end = directory.checked_add(tables * 4);
        if end.is_none_or(|end| end > file.size) {
            return Err(OpenError::damaged(
                "its grain directory ends beyond the end of the file",
            ));
        }
        Ok(Sparse {
            tables: Tables::new(Arc::clone(&file.file), file.size),
            file: number,
            size,
            grain,
            grains_of_table,
            directory,
            has_zero_grains: flags & HAS_ZERO_GRAINS != 0,
            is_compressed,
            descriptor: (sectors(header.le64(28))?, sectors(header.le64(36))?),
        })
    }

    /// Returns where the byte at `offset` of the extent is, and how many bytes follow one another from there.
    pub fn place(&self, offset: u64) -> io::Result<(Place, u64)> {
        let (number, within) = (offset / self.grain, offset % self.grain);
        let (table, index) = (number / self.grains_of_table, number % self.grains_of_table);
        let table = u32::from_le_bytes(self.tables.entry(self.directory + table * 4)?);
        if table == 0 {
            let len = (self.grains_of_table - index) * self.grain - within;
            return Ok((Place::Unallocated, len));
        }
        let entry = u64::from(table) * SECTOR + index * 4;
        let entry = u32::from_le_bytes(self.tables.entry(entry)?);
        let grain = u64::from(entry) * SECTOR;
        let place = match entry {
            0 => Place::Unallocated,
            ZERO_GRAIN if self.has_zero_grains => Place::Zeroes,
            _ if self.is_compressed => Place::Compressed {
                file: self.file,
                offset: grain,
                within: within as usize,
            },
            _ => Place::File {
                file: self.file,
                offset: grain + within,
                sparse: false,
            },
        };
        Ok((place, self.grain - within))
    }

    /// Reads the compressed grain at `offset` of the extent's file.
    pub fn decompress(&self, file: &SizedFile, offset: u64) -> io::Result<Vec<u8>> {
        // A marker: sector of the disk, number of bytes that follow.
        const MARKER: u64 = 12;
        let mut marker = [0; MARKER as usize];
        file.file.read_at(&mut marker, offset)?;
        let length = u64::from(Header(&marker).le32(8));
        // Deflate makes incompressible data a little longer.
        if length > self.grain * 2 || offset + MARKER + length > file.size {
            return Err(damaged("a grain is longer than possible"));
        }
        let mut compressed = vec![0; length as usize];
        file.file.read_at(&mut compressed, offset + MARKER)?;
        let mut grain = Vec::with_capacity(self.grain as usize);
        ZlibDecoder::new(compressed.as_slice())
            .take(self.grain)
            .read_to_end(&mut grain)
            .map_err(|_| damaged("a grain cannot be decompressed"))?;
        Ok(grain)
    }
}

fn read_header(file: &SizedFile, offset: u64) -> Result<[u8; HEADER_SIZE], OpenError> {
    let mut header = [0; HEADER_SIZE];
    file.file.read_at(&mut header, offset)?;
    match header.starts_with(MAGIC) {
        true => Ok(header),
        false => Err(OpenError::unsupported("it is not a sparse VMDK extent")),
    }
}
