//! Btrfs: all its blocks have its UUID. So the superblocks get another one (`fsid`), and keep the one of the blocks beside it
//! (`metadata_uuid`), as `btrfstune -m` does. Layout: `struct btrfs_super_block` in the kernel's
//! include/uapi/linux/btrfs_tree.h.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Identity, field, read_at, text_of, u16_at, u32_at, u64_at};
use crate::identifiers::uuid_text;

/// The places of the superblocks.
const OFFSETS: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
const SIZE: usize = 4096;
const MAGIC: &[u8; 8] = b"_BHRfS_M";

const FLAG_SEEDING: u64 = 1 << 32;
const FLAG_CHANGING_FSID: u64 = 1 << 35;
const FLAG_CHANGING_FSID_V2: u64 = 1 << 36;
const INCOMPAT_METADATA_UUID: u64 = 1 << 10;

struct Superblock([u8; SIZE]);

impl Superblock {
    fn read(device: &File, offset: u64) -> io::Result<Superblock> {
        read_at(device, offset).map(Superblock)
    }

    fn uuid(&self) -> [u8; 16] {
        field(&self.0, 0x20)
    }

    fn incompat(&self) -> u64 {
        u64_at(&self.0, 0xbc)
    }

    fn checksum(&self) -> u32 {
        crc32c::crc32c(&self.0[0x20..])
    }

    /// Whether it is a superblock for this place, with a right checksum of the type CRC-32C.
    fn is_intact(&self, offset: u64) -> bool {
        self.0[0x40..0x48] == *MAGIC
            && u64_at(&self.0, 0x30) == offset
            && u16_at(&self.0, 0xc4) == 0
            && u32_at(&self.0, 0) == self.checksum()
    }

    fn set_uuid(&mut self, new: &[u8; 16]) {
        let old = self.uuid();
        if self.incompat() & INCOMPAT_METADATA_UUID == 0 {
            let incompat = self.incompat() | INCOMPAT_METADATA_UUID;
            self.0[0x23b..0x24b].copy_from_slice(&old);
            self.0[0xbc..0xc4].copy_from_slice(&incompat.to_le_bytes());
        }
        self.0[0x20..0x30].copy_from_slice(new);
        let checksum = self.checksum();
        self.0[..4].copy_from_slice(&checksum.to_le_bytes());
    }
}

pub(super) fn is_btrfs(device: &File) -> io::Result<bool> {
    Ok(read_at::<8>(device, OFFSETS[0] + 0x40)? == *MAGIC)
}

pub(super) fn label(device: &File) -> io::Result<String> {
    Ok(text_of(&read_at::<256>(device, OFFSETS[0] + 0x12b)?))
}

pub(super) fn identity(device: &File) -> io::Result<Identity> {
    let superblock = Superblock::read(device, OFFSETS[0])?;
    let id = uuid_text(&superblock.uuid());
    let flags = u64_at(&superblock.0, 0x38);
    let reason = if u16_at(&superblock.0, 0xc4) != 0 {
        "its checksums are of another type than CRC-32C"
    } else if !superblock.is_intact(OFFSETS[0]) {
        "its superblock is damaged; examine it first (btrfs check)"
    } else if u64_at(&superblock.0, 0x88) != 1 {
        "it is on several devices"
    } else if flags & (FLAG_SEEDING | FLAG_CHANGING_FSID | FLAG_CHANGING_FSID_V2) != 0 {
        "it is a seed, or its UUID was being changed"
    } else {
        return Ok(Identity::Changeable { id });
    };
    Ok(Identity::Fixed {
        id: Some(id),
        reason: reason.to_owned(),
    })
}

pub(super) fn change(device: &File, new: &[u8; 16]) -> io::Result<()> {
    let first = Superblock::read(device, OFFSETS[0])?;
    if !first.is_intact(OFFSETS[0]) {
        return Err(io::Error::other("its superblock is damaged"));
    }
    // The first one, which the kernel reads, is the last to change.
    for offset in OFFSETS.into_iter().rev() {
        let mut superblock = Superblock::read(device, offset)?;
        if superblock.is_intact(offset) && superblock.uuid() == first.uuid() {
            superblock.set_uuid(new);
            device.write_all_at(&superblock.0, offset)?;
        }
    }
    Ok(())
}
