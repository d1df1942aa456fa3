//! Writes a VMDK image as a stream of compressed grains (streamOptimized), as OVF packages have it.
//!
//! Each grain and each table is written once, at the end of the file, behind a marker that says what it is. So the
//! directory comes last, and a copy of the header behind it says where it is.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::SECTOR;
use super::sparse::{DEFLATE, DIRECTORY_AT_END, HAS_LINE_ENDS, HAS_MARKERS, IS_COMPRESSED};
use super::writer::{
    Adapter, DESCRIPTOR_SECTORS, GRAIN, GRAINS_OF_TABLE, Header, check_size, descriptor,
};
use crate::foreign::allocator::put;
use crate::{ImageFile, Target};

const VERSION: u32 = 3;
/// What a marker without data stands before.
const END_OF_STREAM: u32 = 0;
const GRAIN_TABLE: u32 = 1;
const GRAIN_DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;

/// A VMDK image that is created as a stream.
pub struct VmdkStreamWriter {
    file: Arc<dyn ImageFile>,
    size: u64,
    stream: Mutex<Stream>,
}

struct Stream {
    /// Where the file ends.
    end: u64,
    /// The sector of each table, of those that have grains.
    directory: Vec<u32>,
    /// The table with this number, which is not written yet.
    table: Option<(usize, Vec<u32>)>,
}

impl VmdkStreamWriter {
    /// Creates an image in an empty file, whose `name` its descriptor says.
    ///
    /// # Errors
    /// If the disk is too large, or the host cannot write to the file.
    pub fn new(
        file: Arc<dyn ImageFile>,
        size: u64,
        adapter: Adapter,
        name: &str,
    ) -> io::Result<VmdkStreamWriter> {
        check_size(size)?;
        let text = descriptor("streamOptimized", size, adapter, name)?;
        file.write_at(text.as_bytes(), SECTOR)?;
        let tables = size.div_ceil(GRAIN).div_ceil(GRAINS_OF_TABLE);
        let writer = VmdkStreamWriter {
            file,
            size,
            stream: Mutex::new(Stream {
                end: first_grain() * SECTOR,
                directory: vec![0; tables as usize],
                table: None,
            }),
        };
        writer.file.write_at(&writer.header(DIRECTORY_AT_END), 0)?;
        Ok(writer)
    }

    fn header(&self, directory: u64) -> [u8; SECTOR as usize] {
        let header = Header {
            version: VERSION,
            flags: HAS_LINE_ENDS | IS_COMPRESSED | HAS_MARKERS,
            size: self.size,
            directories: [0, directory],
            start: first_grain(),
            compression: DEFLATE,
        };
        header.bytes()
    }

    /// Writes one grain, which may end with the disk.
    fn write_grain(&self, stream: &mut Stream, bytes: &[u8], number: u64) -> io::Result<()> {
        let (table, index) = (number / GRAINS_OF_TABLE, number % GRAINS_OF_TABLE);
        if stream
            .table
            .as_ref()
            .is_some_and(|(open, _)| *open as u64 != table)
        {
            self.write_table(stream)?;
        }
        // The sector on the disk, the number of bytes, and they.
        let mut grain = Vec::with_capacity(GRAIN as usize);
        grain.extend((number * (GRAIN / SECTOR)).to_le_bytes());
        grain.extend([0; 4]);
        let mut encoder = ZlibEncoder::new(grain, Compression::default());
        encoder.write_all(bytes)?;
        // A grain is whole even if the disk ends in it.
        encoder.write_all(&vec![0; GRAIN as usize - bytes.len()])?;
        let mut grain = encoder.finish()?;
        let length = grain.len() as u32 - 12;
        put(&mut grain, 8, &length.to_le_bytes());
        let sector = self.append(stream, grain)?;
        let empty = || (table as usize, vec![0; GRAINS_OF_TABLE as usize]);
        let (_, entries) = stream.table.get_or_insert_with(empty);
        entries[index as usize] = sector;
        Ok(())
    }

    /// Writes the table that is open.
    fn write_table(&self, stream: &mut Stream) -> io::Result<()> {
        if let Some((number, entries)) = stream.table.take() {
            let sector = self.append_marked(stream, GRAIN_TABLE, &entries)?;
            stream.directory[number] = sector;
        }
        Ok(())
    }

    /// Appends a table behind its marker and returns its sector.
    fn append_marked(&self, stream: &mut Stream, kind: u32, entries: &[u32]) -> io::Result<u32> {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect();
        let sectors = (bytes.len() as u64).div_ceil(SECTOR);
        self.append(stream, marker(kind, sectors))?;
        self.append(stream, bytes)
    }

    /// Appends whole sectors and returns the first.
    fn append(&self, stream: &mut Stream, mut bytes: Vec<u8>) -> io::Result<u32> {
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        let sector = u32::try_from(stream.end / SECTOR);
        let sector = sector.map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.file.write_at(&bytes, stream.end)?;
        stream.end += bytes.len() as u64;
        Ok(sector)
    }
}

/// Returns the sector where the grains begin.
fn first_grain() -> u64 {
    (1 + DESCRIPTOR_SECTORS).next_multiple_of(GRAIN / SECTOR)
}

fn marker(kind: u32, sectors: u64) -> Vec<u8> {
    let mut marker = vec![0; SECTOR as usize];
    put(&mut marker, 0, &sectors.to_le_bytes());
    put(&mut marker, 12, &kind.to_le_bytes());
    marker
}

impl Target for VmdkStreamWriter {
    fn unit(&self) -> u64 {
        GRAIN
    }

    fn is_sequential(&self) -> bool {
        true
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let first = offset / GRAIN;
        for (number, grain) in (first..).zip(bytes.chunks(GRAIN as usize)) {
            self.write_grain(&mut stream, grain, number)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, _: Range<u64>) -> io::Result<()> {
        // What is not written is zeroes.
        Ok(())
    }

    fn finish(&self, sync: bool) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = &mut *stream;
        self.write_table(stream)?;
        let directory = std::mem::take(&mut stream.directory);
        let directory = self.append_marked(stream, GRAIN_DIRECTORY, &directory)?;
        self.append(stream, marker(FOOTER, 1))?;
        self.append(stream, self.header(directory.into()).into())?;
        self.append(stream, marker(END_OF_STREAM, 0))?;
        if sync { self.file.sync() } else { Ok(()) }
    }
}
