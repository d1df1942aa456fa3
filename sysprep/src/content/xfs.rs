//! XFS: all its blocks have its UUID. So the superblocks of all allocation groups get another one (`sb_uuid`), and keep the one of
//! the blocks beside it (`sb_meta_uuid`), as `xfs_admin -U` does. The log has the former in the header of each record, which is
//! changed in place, with its checksum. Layout: XFS Algorithms & Data Structures, 3rd edition, chapters 13 and 15. Numbers are
//! big-endian, apart from checksums.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Identity, field, read_at, u32_at};
use crate::identifiers::uuid_text;

const MAGIC: &[u8; 4] = b"XFSB";
/// The largest sector, which a superblock fills.
const MAX_SECTOR: usize = 32 << 10;
const MAX_GROUPS: u32 = 1 << 16;
const CHECKSUM: usize = 224;
const INCOMPAT_META_UUID: u32 = 1 << 2;

/// A block of the log.
const BLOCK: usize = 512;
const MAX_LOG: u64 = 2 << 30;
const RECORD_MAGIC: [u8; 4] = 0xfeed_babe_u32.to_be_bytes();
const RECORD_CHECKSUM: usize = 32;
const RECORD_UUID: usize = 304;
/// The length of a record's header that its checksum covers: C compilers have padded it or not.
const RECORD_HEADERS: [usize; 2] = [328, 324];
/// The length of each further header that its checksum covers.
const EXTENDED_HEADER: usize = 4 + 256;
/// The length of the part of a record that one header describes.
const CYCLE_SIZE: usize = 32 << 10;
/// The largest record.
const MAX_RECORD: usize = 256 << 10;
/// How much of the log is read at once.
const CHUNK: usize = 1 << 20;

fn be16(bytes: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(field(bytes, offset))
}

fn be32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(field(bytes, offset))
}

fn be64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(field(bytes, offset))
}

struct Superblock {
    sector: Vec<u8>,
}

impl Superblock {
    /// Reads the superblock at an offset; `None` if it is damaged.
    fn read(device: &File, offset: u64) -> io::Result<Option<Superblock>> {
        let head: [u8; BLOCK] = read_at(device, offset)?;
        let size = usize::from(be16(&head, 102));
        if head[..4] != *MAGIC || !size.is_power_of_two() || !(BLOCK..=MAX_SECTOR).contains(&size) {
            return Ok(None);
        }
        let mut sector = vec![0; size];
        device.read_exact_at(&mut sector, offset)?;
        let superblock = Superblock { sector };
        let is_intact = superblock.version() != 5
            || superblock.checksum() == u32_at(&superblock.sector, CHECKSUM);
        Ok(is_intact.then_some(superblock))
    }

    fn version(&self) -> u16 {
        be16(&self.sector, 100) & 0xf
    }

    fn uuid(&self) -> [u8; 16] {
        field(&self.sector, 32)
    }

    fn block_size(&self) -> u64 {
        be32(&self.sector, 4).into()
    }

    fn group_blocks(&self) -> u64 {
        be32(&self.sector, 84).into()
    }

    fn checksum(&self) -> u32 {
        let before = crc32c::crc32c(&self.sector[..CHECKSUM]);
        let without = crc32c::crc32c_append(before, &[0; 4]);
        crc32c::crc32c_append(without, &self.sector[CHECKSUM + 4..])
    }

    /// Returns the places of all superblocks.
    fn places(&self) -> Option<Vec<u64>> {
        let groups = be32(&self.sector, 88);
        let size = self.group_blocks().checked_mul(self.block_size())?;
        let is_sound = (1..=MAX_GROUPS).contains(&groups) && size >= 1 << 20;
        let places = (0..u64::from(groups)).map(|group| group.checked_mul(size));
        is_sound.then(|| places.collect()).flatten()
    }

    /// Returns the place and the length of the log; `None` if it is on another device, or cannot be right.
    fn log(&self) -> Option<(u64, u64)> {
        let start = be64(&self.sector, 48);
        let shift = u32::from(self.sector[124]);
        let group = start.checked_shr(shift)?;
        let block = start & 1_u64.checked_shl(shift)?.checked_sub(1)?;
        let block = group.checked_mul(self.group_blocks())?.checked_add(block)?;
        let place = block.checked_mul(self.block_size())?;
        let length = u64::from(be32(&self.sector, 96)).checked_mul(self.block_size())?;
        (start != 0 && (1..=MAX_LOG).contains(&length)).then_some((place, length))
    }

    fn set_uuid(&mut self, new: &[u8; 16]) {
        let incompat = be32(&self.sector, 216);
        if incompat & INCOMPAT_META_UUID == 0 {
            let old = self.uuid();
            self.sector[248..264].copy_from_slice(&old);
            let incompat = incompat | INCOMPAT_META_UUID;
            self.sector[216..220].copy_from_slice(&incompat.to_be_bytes());
        }
        self.sector[32..48].copy_from_slice(new);
        let checksum = self.checksum();
        self.sector[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
    }
}

pub(super) fn identity(device: &File) -> io::Result<Identity> {
    let id = uuid_text(&read_at(device, 32)?);
    let superblock = Superblock::read(device, 0)?;
    let reason = match superblock
        .as_ref()
        .map(|it| (it.version(), it.places(), it.log()))
    {
        Some((5, Some(_), Some(_))) => {
            return Ok(Identity::Changeable { id });
        }
        Some((5, Some(_), None)) => "its log is on another device",
        Some((0..=4, ..)) => "it has the format from before version 5",
        _ => "its superblock is damaged; examine it first (xfs_repair -n)",
    };
    let reason = reason.to_owned();
    Ok(Identity::Fixed {
        id: Some(id),
        reason,
    })
}

pub(super) fn change(device: &File, new: &[u8; 16]) -> io::Result<()> {
    let damaged = || io::Error::other("its superblock is damaged");
    let first = Superblock::read(device, 0)?.ok_or_else(damaged)?;
    if first.version() != 5 {
        return Err(damaged());
    }
    let (places, log) = (first.places().zip(first.log())).ok_or_else(damaged)?;
    let old = first.uuid();
    Log::new(device, log).change(&old, new)?;
    // The first one, which the kernel reads, is the last to change.
    for place in places.into_iter().rev() {
        let superblock = Superblock::read(device, place)?;
        let mut superblock = superblock
            .filter(|it| it.uuid() == old)
            .ok_or_else(damaged)?;
        superblock.set_uuid(new);
        device.write_all_at(&superblock.sector, place)?;
    }
    Ok(())
}

struct Log<'a> {
    device: &'a File,
    place: u64,
    length: u64,
}

impl Log<'_> {
    fn new(device: &File, (place, length): (u64, u64)) -> Log<'_> {
        Log {
            device,
            place,
            length,
        }
    }

    /// Changes the UUID in the headers of all records. In a block that is not a header, the first word is the number of a cycle.
    fn change(&self, old: &[u8; 16], new: &[u8; 16]) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        let mut offset = 0;
        while offset < self.length {
            let rest = usize::try_from(self.length - offset).unwrap_or(CHUNK);
            let part = &mut chunk[..rest.min(CHUNK)];
            self.device.read_exact_at(part, self.place + offset)?;
            for (number, block) in (0..).zip(part.chunks_exact_mut(BLOCK)) {
                let is_header = block[..4] == RECORD_MAGIC;
                if is_header && block[RECORD_UUID..RECORD_UUID + 16] == *old {
                    let place = offset + number * BLOCK as u64;
                    self.change_record(block, place, new)?;
                }
            }
            offset += rest.min(CHUNK) as u64;
        }
        Ok(())
    }

    /// Changes the record whose header is `block`, at `place` in the log. One with a wrong checksum, of which only a part
    /// was written, keeps a wrong one.
    fn change_record(&self, block: &mut [u8], place: u64, new: &[u8; 16]) -> io::Result<()> {
        let length = be32(block, 12) as usize;
        let more = length.div_ceil(CYCLE_SIZE).saturating_sub(1);
        let is_sound = length <= MAX_RECORD;
        let mut rest = vec![0; if is_sound { more * BLOCK + length } else { 0 }];
        self.read(&mut rest, place + BLOCK as u64)?;
        let stored = u32_at(block, RECORD_CHECKSUM);
        let checksum = |block: &[u8], size: usize| {
            let mut header = block[..size].to_vec();
            header[RECORD_CHECKSUM..RECORD_CHECKSUM + 4].fill(0);
            let (headers, data) = rest.split_at(more * BLOCK);
            let headers = headers.chunks_exact(BLOCK).map(|it| &it[..EXTENDED_HEADER]);
            let parts = headers.chain([data]);
            parts.fold(crc32c::crc32c(&header), crc32c::crc32c_append)
        };
        let size = RECORD_HEADERS.into_iter().filter(|_| is_sound);
        let size = size.filter(|&size| checksum(block, size) == stored).min();
        block[RECORD_UUID..RECORD_UUID + 16].copy_from_slice(new);
        if let Some(size) = size {
            let checksum = checksum(block, size);
            block[RECORD_CHECKSUM..RECORD_CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
        }
        self.device.write_all_at(block, self.place + place)
    }

    /// Reads from the log, whose end is followed by its begin.
    fn read(&self, bytes: &mut [u8], place: u64) -> io::Result<()> {
        let mut place = place % self.length;
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let rest = usize::try_from(self.length - place).unwrap_or(usize::MAX);
            let (part, after) = bytes.split_at_mut(rest.min(bytes.len()));
            self.device.read_exact_at(part, self.place + place)?;
            bytes = after;
            place = 0;
        }
        Ok(())
    }
}
