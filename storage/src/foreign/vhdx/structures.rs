//! Headers, region table and metadata.

use crc32c::crc32c;

use super::super::OpenError;
use super::super::blocks::SizedFile;
use super::super::bytes::Header;

pub const MIB: u64 = 1 << 20;
/// \[MS-VHDX\] 2.6.2.4: the largest disk.
pub const MAX_SIZE: u64 = 64 << 40;

pub const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
pub const HEADER_SIZE: usize = 4096;
pub const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
pub const TABLE_SIZE: usize = 64 << 10;
/// The most entries of a region table or of the metadata.
const MAX_ENTRIES: usize = 2047;

/// The region with the block allocation table.
pub const BAT_REGION: [u8; 16] = guid(
    0x2dc2_7766,
    0xf623,
    0x4200,
    [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08],
);
/// The region with the metadata.
pub const METADATA_REGION: [u8; 16] = guid(
    0x8b7c_a206,
    0x4790,
    0x4b9a,
    [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e],
);

pub const FILE_PARAMETERS: [u8; 16] = guid(
    0xcaa1_6737,
    0xfa36,
    0x4d43,
    [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b],
);
pub const DISK_SIZE: [u8; 16] = guid(
    0x2fa5_4224,
    0xcd1b,
    0x4876,
    [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8],
);
pub const DISK_ID: [u8; 16] = guid(
    0xbeca_12ab,
    0xb2e6,
    0x4523,
    [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46],
);
pub const SECTOR_SIZE: [u8; 16] = guid(
    0x8141_bf1d,
    0xa96f,
    0x4709,
    [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f],
);
pub const PHYSICAL_SECTOR_SIZE: [u8; 16] = guid(
    0xcda3_48c7,
    0x445d,
    0x4471,
    [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56],
);

/// Returns the bytes of a GUID in a file.
const fn guid(first: u32, second: u16, third: u16, rest: [u8; 8]) -> [u8; 16] {
    let [a, b, c, d] = first.to_le_bytes();
    let [e, f] = second.to_le_bytes();
    let [g, h] = third.to_le_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// A part of the file.
#[derive(Debug)]
pub struct Region {
    /// What it is.
    pub id: [u8; 16],
    /// Where it begins.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// What the metadata say.
#[derive(Debug)]
pub struct Metadata {
    /// Size of a block in bytes.
    pub block_size: u32,
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Size of a logical sector in bytes.
    pub sector_size: u32,
}

/// Checks the current header, which is the valid one with the higher sequence number.
pub fn check_header(file: &SizedFile) -> Result<(), OpenError> {
    let mut current: Option<(u64, [u8; HEADER_SIZE])> = None;
    for offset in HEADERS {
        let mut header = [0; HEADER_SIZE];
        file.file.read_at(&mut header, offset)?;
        let sequence = Header(&header).le64(8);
        let is_newer = current.is_none_or(|(other, _)| other < sequence);
        if header.starts_with(b"head") && has_checksum(&header) && is_newer {
            current = Some((sequence, header));
        }
    }
    let Some((_, header)) = current else {
        return Err(OpenError::damaged("it has no valid header"));
    };
    let header = Header(&header);
    let version = header.le16(66);
    if version != 1 {
        return Err(OpenError::unsupported(format!(
            "VHDX version {version} is not supported, only 1"
        )));
    }
    if header.bytes::<16>(48) != [0; 16] {
        return Err(OpenError::unsupported(
            "its log has changes that were not brought to their places: bring them there with 'qemu-img check \
             -r all -f vhdx', or by opening the image in Hyper-V",
        ));
    }
    Ok(())
}

/// Returns the regions of the first region table that is valid.
pub fn regions(file: &SizedFile) -> Result<Vec<Region>, OpenError> {
    for table_offset in REGION_TABLES {
        let mut table = vec![0; TABLE_SIZE];
        file.file.read_at(&mut table, table_offset)?;
        if !table.starts_with(b"regi") || !has_checksum(&table) {
            continue;
        }
        let count = Header(&table).le32(8) as usize;
        if count > MAX_ENTRIES {
            return Err(OpenError::damaged("its region table has too many entries"));
        }
        let mut regions = Vec::new();
        for entry in table[16..].chunks_exact(32).take(count) {
            let entry = Header(entry);
            let region = Region {
                id: entry.bytes(0),
                offset: entry.le64(16),
                length: u64::from(entry.le32(24)),
            };
            let known = [BAT_REGION, METADATA_REGION].contains(&region.id);
            if !known && entry.le32(28) & 1 != 0 {
                return Err(OpenError::unsupported(
                    "it has a region that is required and not known",
                ));
            }
            let end = region.offset.checked_add(region.length);
            if !region.offset.is_multiple_of(MIB) || end.is_none_or(|end| end > file.size) {
                return Err(OpenError::damaged("a region is beyond the end of the file"));
            }
            if known {
                regions.push(region);
            }
        }
        return Ok(regions);
    }
    Err(OpenError::damaged("it has no valid region table"))
}

/// Reads the metadata from their region.
pub fn metadata(file: &SizedFile, region: &Region) -> Result<Metadata, OpenError> {
    let mut table = vec![0; TABLE_SIZE];
    file.file.read_at(&mut table, region.offset)?;
    let count = usize::from(Header(&table).le16(10));
    if !table.starts_with(b"metadata") || count > MAX_ENTRIES {
        return Err(OpenError::damaged("its metadata table is not one"));
    }
    let (mut parameters, mut disk_size, mut sector_size) = (None, None, None);
    for entry in table[32..].chunks_exact(32).take(count) {
        let entry = Header(entry);
        let (id, offset) = (entry.bytes::<16>(0), u64::from(entry.le32(16)));
        let (length, flags) = (u64::from(entry.le32(20)), entry.le32(24));
        if offset + length > region.length {
            return Err(OpenError::damaged("metadata end beyond their region"));
        }
        let mut item = [0; 8];
        file.file.read_at(&mut item, region.offset + offset)?;
        let item = Header(&item);
        match id {
            FILE_PARAMETERS => parameters = Some((item.le32(0), item.le32(4))),
            DISK_SIZE => disk_size = Some(item.le64(0)),
            SECTOR_SIZE => sector_size = Some(item.le32(0)),
            DISK_ID | PHYSICAL_SECTOR_SIZE => {}
            // Its parent; the parameters say whether it has one.
            _ if parameters.is_some_and(|(_, flags)| flags & 2 != 0) => {}
            _ if flags & 4 != 0 => {
                return Err(OpenError::unsupported(
                    "it has metadata that are required and not known",
                ));
            }
            _ => {}
        }
    }
    let (Some((block_size, flags)), Some(disk_size), Some(sector_size)) =
        (parameters, disk_size, sector_size)
    else {
        return Err(OpenError::damaged(
            "the size of its disk, blocks or sectors is missing",
        ));
    };
    if flags & 2 != 0 {
        return Err(OpenError::unsupported(
            "it is a differencing VHDX image, which holds only what differs from another one; merge them \
             with Hyper-V's Merge-VHD",
        ));
    }
    if !block_size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block_size) {
        return Err(OpenError::damaged(format!(
            "blocks of {block_size} bytes are not possible"
        )));
    }
    if ![512, 4096].contains(&sector_size) {
        return Err(OpenError::damaged(format!(
            "sectors of {sector_size} bytes are not possible"
        )));
    }
    if disk_size > MAX_SIZE || disk_size % u64::from(sector_size) != 0 {
        return Err(OpenError::damaged(format!(
            "a disk of {disk_size} bytes is not possible"
        )));
    }
    Ok(Metadata {
        block_size,
        disk_size,
        sector_size,
    })
}

/// Whether a structure has the right checksum, which is computed with zeroes in its place.
fn has_checksum(structure: &[u8]) -> bool {
    let mut copy = structure.to_vec();
    copy[4..8].fill(0);
    Header(structure).le32(4) == crc32c(&copy)
}
