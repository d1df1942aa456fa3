//! Writes a VHD image.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use super::{
    COOKIE, DYNAMIC, FIXED, FOOTER_SIZE, HEADER_COOKIE, HEADER_SIZE, MAX_GEOMETRY, MAX_SIZE,
    SECTOR, UNALLOCATED, bitmap_size, checksum,
};
use crate::ImageFile;
use crate::foreign::allocator::{Allocator, Arrangement, NOWHERE, put, write_table};
use crate::foreign::new_image::NewImage;
use crate::foreign::random_id;

const BLOCK: u64 = 2 << 20;
const TABLE: u64 = FOOTER_SIZE + HEADER_SIZE as u64;
/// Seconds from the epoch of Unix to that of VHD, the start of 2000.
const EPOCH: u64 = 946_684_800;
const VERSION: u32 = 0x0001_0000;
/// By this a reader knows that the disk ends where its geometry says.
const BY_GEOMETRY: &[u8; 4] = b"qemu";
/// By this a reader knows that the disk has exactly the size that the footer says.
const BY_SIZE: &[u8; 4] = b"qem2";

/// A VHD image that is created.
pub struct VhdWriter {
    file: Arc<dyn ImageFile>,
    footer: [u8; FOOTER_SIZE as usize],
    blocks: Disk,
}

enum Disk {
    Fixed { size: u64 },
    Dynamic(Allocator),
}

impl VhdWriter {
    /// Creates an image in an empty file. Unless `exact`, the disk becomes as large as the next possible geometry.
    ///
    /// # Errors
    /// If the disk is too large, or the host cannot write to the file.
    pub fn new(
        file: Arc<dyn ImageFile>,
        size: u64,
        is_fixed: bool,
        exact: bool,
    ) -> io::Result<VhdWriter> {
        let (geometry, geometry_size) = geometry(size / SECTOR);
        let (creator, size) = match exact || geometry_size == MAX_GEOMETRY {
            true => (BY_SIZE, size),
            false => (BY_GEOMETRY, geometry_size * SECTOR),
        };
        if size > MAX_SIZE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut footer = [0; FOOTER_SIZE as usize];
        put(&mut footer, 0, COOKIE);
        put(&mut footer, 28, creator);
        // Program version, then the host system, for which there is a word for Windows and one for a Mac.
        put(&mut footer, 36, b"Wi2k");
        put(&mut footer, 56, &geometry);
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let seconds = now.as_secs().saturating_sub(EPOCH) as u32;
        let (kind, header) = match is_fixed {
            true => (FIXED, u64::MAX),
            false => (DYNAMIC, FOOTER_SIZE),
        };
        // The feature bit that is always set, and the version of the format.
        for (offset, number) in [(8, 2), (12, VERSION), (24, seconds), (60, kind)] {
            put(&mut footer, offset, &number.to_be_bytes());
        }
        for (offset, number) in [(16, header), (40, size), (48, size)] {
            put(&mut footer, offset, &number.to_be_bytes());
        }
        put(&mut footer, 68, &random_id()?);
        let sum = checksum(&footer, 64);
        put(&mut footer, 64, &sum.to_be_bytes());
        let blocks = match is_fixed {
            true => Disk::Fixed { size },
            false => {
                let table = (size.div_ceil(BLOCK) * 4).next_multiple_of(SECTOR);
                let arrangement = Arrangement {
                    block: BLOCK,
                    start: TABLE + table,
                    // Each sector of a block is valid.
                    lead: vec![0xff; bitmap_size(BLOCK) as usize],
                };
                let file = Arc::clone(&file);
                Disk::Dynamic(Allocator::new(file, size, arrangement, false)?)
            }
        };
        Ok(VhdWriter {
            file,
            footer,
            blocks,
        })
    }

    fn finish_dynamic(&self, allocator: &Allocator) -> io::Result<()> {
        let (blocks, end) = allocator.finish()?;
        let mut header = [0; HEADER_SIZE];
        put(&mut header, 0, HEADER_COOKIE);
        for (offset, number) in [(8, u64::MAX), (16, TABLE)] {
            put(&mut header, offset, &number.to_be_bytes());
        }
        for (offset, number) in [
            (24, VERSION),
            (28, blocks.places.len() as u32),
            (32, BLOCK as u32),
        ] {
            put(&mut header, offset, &number.to_be_bytes());
        }
        let sum = checksum(&header, 36);
        put(&mut header, 36, &sum.to_be_bytes());
        let entry = |&place: &u32| match place {
            NOWHERE => UNALLOCATED,
            // The bound of the disk's size makes the sector fit.
            place => (allocator.offset(place) / SECTOR) as u32,
        };
        let count = blocks.places.len().next_multiple_of(SECTOR as usize / 4);
        let padding = std::iter::repeat_n(&NOWHERE, count - blocks.places.len());
        let entries = blocks.places.iter().chain(padding);
        write_table(
            &*self.file,
            TABLE,
            entries.map(|place| entry(place).to_be_bytes()),
        )?;
        self.file.write_at(&header, FOOTER_SIZE)?;
        self.file.write_at(&self.footer, end)?;
        self.file.write_at(&self.footer, 0)
    }
}

impl NewImage for VhdWriter {
    fn file(&self) -> &dyn ImageFile {
        &*self.file
    }

    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match &self.blocks {
            Disk::Fixed { .. } => self.file.write_at(bytes, offset),
            Disk::Dynamic(allocator) => allocator.write(bytes, offset),
        }
    }

    fn write_tables(&self) -> io::Result<()> {
        match &self.blocks {
            Disk::Fixed { size } => self.file.write_at(&self.footer, *size),
            Disk::Dynamic(allocator) => self.finish_dynamic(allocator),
        }
    }
}

/// Returns the smallest geometry that has `sectors`, as the footer has it, and its number of sectors.
fn geometry(sectors: u64) -> ([u8; 4], u64) {
    // The computation of the specification's appendix rounds down.
    let mut larger = sectors;
    loop {
        let (cylinders, heads, per_track) = geometry_within(larger.min(MAX_GEOMETRY));
        let total = cylinders * heads * per_track;
        if total >= sectors || larger >= MAX_GEOMETRY {
            let [high, low] = (cylinders as u16).to_be_bytes();
            return ([high, low, heads as u8, per_track as u8], total);
        }
        larger += 1;
    }
}

/// Appendix "CHS Calculation" of the specification.
fn geometry_within(sectors: u64) -> (u64, u64, u64) {
    let (mut heads, mut per_track) = (16, 255);
    if sectors < 65535 * 16 * 63 {
        per_track = 17;
        let mut tracks = sectors / per_track;
        heads = tracks.div_ceil(1024).max(4);
        if tracks >= heads * 1024 || heads > 16 {
            (per_track, heads) = (31, 16);
            tracks = sectors / per_track;
        }
        if tracks >= heads * 1024 {
            (per_track, heads) = (63, 16);
        }
    }
    (sectors / per_track / heads, heads, per_track)
}
