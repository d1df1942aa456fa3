//! Writes the blocks of an image that is created: each gets its place when it is first written.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::ImageFile;

/// The place of a block that has none.
pub const NOWHERE: u32 = u32::MAX;

/// How blocks lie in a file.
#[derive(Debug, Clone)]
pub struct Arrangement {
    /// The size of a block in bytes.
    pub block: u64,
    /// Where the first one begins in the file.
    pub start: u64,
    /// Bytes in front of the data of each block.
    pub lead: Vec<u8>,
}

/// The blocks of an image that is created.
#[derive(Debug)]
pub struct Allocator {
    file: Arc<dyn ImageFile>,
    arrangement: Arrangement,
    blocks: Mutex<Blocks>,
}

/// Which block of the disk is which one of the file.
#[derive(Debug)]
pub struct Blocks {
    /// For each block of the disk, its number in the file, or [`NOWHERE`].
    pub places: Vec<u32>,
    /// The number of blocks in the file.
    pub count: u32,
}

impl Allocator {
    /// Writes a disk of `size` bytes to `file`. With `all`, every block gets a place at once, in order.
    ///
    /// # Errors
    /// If there are too many blocks, or the host cannot write to the file.
    pub fn new(
        file: Arc<dyn ImageFile>,
        size: u64,
        arrangement: Arrangement,
        all: bool,
    ) -> io::Result<Allocator> {
        let count = size.div_ceil(arrangement.block);
        let count = u32::try_from(count)
            .ok()
            .filter(|&count| count < NOWHERE - 1);
        let count = count.ok_or(io::ErrorKind::FileTooLarge)?;
        let blocks = Blocks {
            places: match all {
                true => (0..count).collect(),
                false => vec![NOWHERE; count as usize],
            },
            count: if all { count } else { 0 },
        };
        let allocator = Allocator {
            file,
            arrangement,
            blocks: Mutex::new(blocks),
        };
        if all && !allocator.arrangement.lead.is_empty() {
            for number in 0..count {
                allocator.write_lead(number)?;
            }
        }
        Ok(allocator)
    }

    /// Writes `bytes` to `offset` of the disk.
    ///
    /// # Errors
    /// If the host cannot write them.
    pub fn write(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        let block = self.arrangement.block;
        while !bytes.is_empty() {
            let (number, within) = (offset / block, offset % block);
            let len = (block - within).min(bytes.len() as u64);
            let (now, later) = bytes.split_at(len as usize);
            let place = self.place(number)?;
            self.file.write_at(now, self.data_offset(place) + within)?;
            bytes = later;
            offset += len;
        }
        Ok(())
    }

    /// Makes the file as long as its blocks need, as the last ones may be written in part, and returns them.
    ///
    /// # Errors
    /// If the host cannot do it.
    pub fn finish(&self) -> io::Result<(Blocks, u64)> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let end = self.offset(blocks.count);
        self.file.set_size(end)?;
        let places = std::mem::take(&mut blocks.places);
        let count = blocks.count;
        Ok((Blocks { places, count }, end))
    }

    /// Returns where the block of the file with this number begins.
    pub fn offset(&self, place: u32) -> u64 {
        let stride = self.arrangement.block + self.arrangement.lead.len() as u64;
        self.arrangement.start + u64::from(place) * stride
    }

    fn data_offset(&self, place: u32) -> u64 {
        self.offset(place) + self.arrangement.lead.len() as u64
    }

    fn place(&self, number: u64) -> io::Result<u32> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let count = blocks.count;
        let place = blocks.places.get_mut(number as usize);
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        if *place == NOWHERE {
            *place = count;
            blocks.count += 1;
            drop(blocks);
            self.write_lead(count)?;
            return Ok(count);
        }
        Ok(*place)
    }

    fn write_lead(&self, place: u32) -> io::Result<()> {
        match self.arrangement.lead.is_empty() {
            true => Ok(()),
            false => self
                .file
                .write_at(&self.arrangement.lead, self.offset(place)),
        }
    }
}

/// Writes numbers of 32 bits as a table at `offset`.
///
/// # Errors
/// If the host cannot write them.
pub fn write_table(
    file: &dyn ImageFile,
    offset: u64,
    entries: impl Iterator<Item = [u8; 4]>,
) -> io::Result<()> {
    const PART: usize = 256 << 10;
    let mut part = Vec::with_capacity(PART);
    let mut position = offset;
    for entry in entries {
        part.extend_from_slice(&entry);
        if part.len() == PART {
            file.write_at(&part, position)?;
            position += PART as u64;
            part.clear();
        }
    }
    file.write_at(&part, position)
}

/// Copies `bytes` into a structure at `offset`, which is in it.
pub fn put(structure: &mut [u8], offset: usize, bytes: &[u8]) {
    structure[offset..offset + bytes.len()].copy_from_slice(bytes);
}
