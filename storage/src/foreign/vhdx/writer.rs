//! Writes a VHDX image.

use std::io;
use std::sync::Arc;

use crc32c::crc32c;

use super::IDENTIFIER;
use super::structures::{
    BAT_REGION, DISK_ID, DISK_SIZE, FILE_PARAMETERS, HEADER_SIZE, HEADERS, MAX_SIZE,
    METADATA_REGION, MIB, PHYSICAL_SECTOR_SIZE, REGION_TABLES, SECTOR_SIZE, TABLE_SIZE,
};
use crate::ImageFile;
use crate::foreign::allocator::{Allocator, Arrangement, NOWHERE, put};
use crate::foreign::new_image::NewImage;
use crate::foreign::random_id;

const SECTOR: u64 = 512;
const LOG: u64 = MIB;
const LOG_SIZE: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;
/// The items of the metadata come after their table.
const ITEMS: u32 = 64 << 10;
const FULLY_PRESENT: u64 = 6;
/// Metadata that a reader has to know.
const REQUIRED: u32 = 4;
/// Metadata about the disk rather than the file.
const OF_DISK: u32 = 2;

/// A VHDX image that is created.
pub struct VhdxWriter {
    file: Arc<dyn ImageFile>,
    size: u64,
    block: u64,
    is_fixed: bool,
    bat_size: u64,
    allocator: Allocator,
}

impl VhdxWriter {
    /// Creates an image in an empty file, with blocks of `block` bytes, or of a size that fits the disk.
    ///
    /// # Errors
    /// If the disk or a block has a size that is not possible, or the host cannot write to the file.
    pub fn new(
        file: Arc<dyn ImageFile>,
        size: u64,
        block: Option<u64>,
        is_fixed: bool,
    ) -> io::Result<VhdxWriter> {
        if size > MAX_SIZE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let block = block.unwrap_or(match size {
            _ if size > 32 << 40 => 64 * MIB,
            _ if size > 100 << 30 => 32 * MIB,
            _ if size > 1 << 30 => 16 * MIB,
            _ => 8 * MIB,
        });
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a block has a power of two of bytes, from 1M to 256M",
            ));
        }
        let chunk = (SECTOR << 23) / block;
        let blocks = size.div_ceil(block);
        let entries = blocks + blocks.saturating_sub(1) / chunk;
        let bat_size = (entries * 8).max(1).next_multiple_of(MIB);
        let arrangement = Arrangement {
            block,
            start: BAT + bat_size,
            lead: Vec::new(),
        };
        Ok(VhdxWriter {
            allocator: Allocator::new(Arc::clone(&file), size, arrangement, is_fixed)?,
            file,
            size,
            block,
            is_fixed,
            bat_size,
        })
    }

    fn write_headers(&self) -> io::Result<()> {
        for (sequence, offset) in HEADERS.into_iter().enumerate() {
            let mut header = vec![0; HEADER_SIZE];
            put(&mut header, 0, b"head");
            put(&mut header, 8, &(sequence as u64 + 1).to_le_bytes());
            put(&mut header, 16, &random_id()?);
            put(&mut header, 32, &random_id()?);
            // Versions of the log and the format.
            put(&mut header, 64, &0_u16.to_le_bytes());
            put(&mut header, 66, &1_u16.to_le_bytes());
            put(&mut header, 68, &(LOG_SIZE as u32).to_le_bytes());
            put(&mut header, 72, &LOG.to_le_bytes());
            self.write_checked(header, offset)?;
        }
        for offset in REGION_TABLES {
            let mut table = vec![0; TABLE_SIZE];
            put(&mut table, 0, b"regi");
            put(&mut table, 8, &2_u32.to_le_bytes());
            let regions = [
                (BAT_REGION, BAT, self.bat_size),
                (METADATA_REGION, METADATA, MIB),
            ];
            for (index, (id, place, length)) in regions.into_iter().enumerate() {
                let entry = 16 + index * 32;
                put(&mut table, entry, &id);
                put(&mut table, entry + 16, &place.to_le_bytes());
                put(&mut table, entry + 24, &(length as u32).to_le_bytes());
                put(&mut table, entry + 28, &1_u32.to_le_bytes());
            }
            self.write_checked(table, offset)?;
        }
        Ok(())
    }

    fn write_metadata(&self) -> io::Result<()> {
        let mut parameters = Vec::from((self.block as u32).to_le_bytes());
        // The blocks of a fixed image stay allocated.
        parameters.extend(u32::from(self.is_fixed).to_le_bytes());
        let items: [([u8; 16], u32, Vec<u8>); 5] = [
            (FILE_PARAMETERS, REQUIRED, parameters),
            (
                DISK_SIZE,
                REQUIRED | OF_DISK,
                self.size.to_le_bytes().into(),
            ),
            (DISK_ID, REQUIRED | OF_DISK, random_id()?.into()),
            (
                SECTOR_SIZE,
                REQUIRED | OF_DISK,
                512_u32.to_le_bytes().into(),
            ),
            (
                PHYSICAL_SECTOR_SIZE,
                REQUIRED | OF_DISK,
                4096_u32.to_le_bytes().into(),
            ),
        ];
        let mut table = vec![0; TABLE_SIZE];
        put(&mut table, 0, b"metadata");
        put(&mut table, 10, &(items.len() as u16).to_le_bytes());
        let mut data = Vec::new();
        for (index, (id, flags, item)) in items.iter().enumerate() {
            let entry = 32 + index * 32;
            put(&mut table, entry, id);
            for (field, number) in [
                (16, ITEMS + data.len() as u32),
                (20, item.len() as u32),
                (24, *flags),
            ] {
                put(&mut table, entry + field, &number.to_le_bytes());
            }
            data.extend_from_slice(item);
        }
        self.file.write_at(&table, METADATA)?;
        self.file.write_at(&data, METADATA + u64::from(ITEMS))
    }

    fn write_bat(&self, places: &[u32]) -> io::Result<()> {
        let chunk = ((SECTOR << 23) / self.block) as usize;
        let mut offset = BAT;
        for blocks in places.chunks(chunk) {
            // The entry for a bitmap after the blocks stays empty.
            let mut entries = vec![0; blocks.len() * 8 + 8];
            for (index, &place) in blocks.iter().enumerate() {
                if place != NOWHERE {
                    let mebibytes = self.allocator.offset(place) / MIB;
                    let entry = (mebibytes << 20) | FULLY_PRESENT;
                    put(&mut entries, index * 8, &entry.to_le_bytes());
                }
            }
            let is_last = blocks.len() < chunk;
            let length = entries.len() - if is_last { 8 } else { 0 };
            self.file.write_at(&entries[..length], offset)?;
            offset += entries.len() as u64;
        }
        Ok(())
    }

    fn write_checked(&self, mut structure: Vec<u8>, offset: u64) -> io::Result<()> {
        let sum = crc32c(&structure);
        put(&mut structure, 4, &sum.to_le_bytes());
        self.file.write_at(&structure, offset)
    }
}

impl NewImage for VhdxWriter {
    fn file(&self) -> &dyn ImageFile {
        &*self.file
    }

    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.allocator.write(bytes, offset)
    }

    fn write_tables(&self) -> io::Result<()> {
        let (blocks, _) = self.allocator.finish()?;
        self.write_bat(&blocks.places)?;
        self.write_metadata()?;
        self.write_headers()?;
        let mut identifier = Vec::from(IDENTIFIER);
        let creator = concat!("Bantam ", env!("CARGO_PKG_VERSION"));
        identifier.extend(creator.encode_utf16().flat_map(u16::to_le_bytes));
        self.file.write_at(&identifier, 0)
    }
}
