//! ext2, ext3 and ext4: the UUID is in the superblock and its copies in other block groups.
//!
//! With the feature `metadata_csum`, the checksums of all metadata depend on the UUID, unless the superblock names the seed
//! (feature `metadata_csum_seed`). So that only superblocks change, that feature is set, with the seed of the former UUID, as
//! `tune2fs -O metadata_csum_seed` does. Layout: kernel documentation, filesystems/ext4/super.rst.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Identity, field, read_at, u16_at, u32_at};
use crate::identifiers::uuid_text;

/// Place and size of the first superblock.
const OFFSET: u64 = 1024;
const SIZE: usize = 1024;
const MAGIC: u16 = 0xef53;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const COMPAT_STABLE_INODES: u32 = 0x800;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEVICE: u32 = 0x8;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_GROUP_CSUM: u32 = 0x10;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;

/// More block groups than this, each with a copy of the superblock, are not looked at. A file system with a copy in each group
/// is older than such sizes.
const MAX_GROUPS: u64 = 1 << 16;

struct Superblock([u8; SIZE]);

impl Superblock {
    fn read(device: &File, offset: u64) -> io::Result<Superblock> {
        read_at(device, offset).map(Superblock)
    }

    fn u32(&self, offset: usize) -> u32 {
        u32_at(&self.0, offset)
    }

    fn compat(&self) -> u32 {
        self.u32(0x5c)
    }

    fn incompat(&self) -> u32 {
        self.u32(0x60)
    }

    fn ro_compat(&self) -> u32 {
        self.u32(0x64)
    }

    fn uuid(&self) -> [u8; 16] {
        field(&self.0, 0x68)
    }

    fn has_checksums(&self) -> bool {
        self.ro_compat() & RO_COMPAT_METADATA_CSUM != 0
    }

    fn checksum(&self) -> u32 {
        raw_crc32c(&self.0[..0x3fc])
    }

    fn is_intact(&self) -> bool {
        u16_at(&self.0, 0x38) == MAGIC
            && (!self.has_checksums() || self.checksum() == self.u32(0x3fc))
    }

    fn block_size(&self) -> Option<u64> {
        let log = self.u32(0x18);
        (log <= 6).then(|| 1024 << log)
    }

    /// Returns the numbers of the groups other than the first that have a copy.
    fn groups_with_copies(&self) -> Option<Vec<u64>> {
        let high = match self.incompat() & INCOMPAT_64BIT {
            0 => 0,
            _ => self.u32(0x150),
        };
        let blocks = u64::from(high) << 32 | u64::from(self.u32(0x4));
        let blocks = blocks.checked_sub(u64::from(self.u32(0x14)))?;
        let per_group = u64::from(self.u32(0x20));
        let groups = (per_group != 0).then(|| blocks.div_ceil(per_group))?;
        if self.compat() & COMPAT_SPARSE_SUPER2 != 0 {
            let named = [0x24c, 0x250].map(|offset| u64::from(self.u32(offset)));
            return Some(
                named
                    .into_iter()
                    .filter(|it| (1..groups).contains(it))
                    .collect(),
            );
        }
        if self.ro_compat() & RO_COMPAT_SPARSE_SUPER == 0 {
            return (groups <= MAX_GROUPS).then(|| (1..groups).collect());
        }
        let powers = |base: u64| {
            std::iter::successors(Some(base), move |power| power.checked_mul(base))
                .take_while(move |&power| power < groups)
        };
        let first = (groups > 1).then_some(1);
        let all = first.into_iter();
        Some(
            all.chain(powers(3))
                .chain(powers(5))
                .chain(powers(7))
                .collect(),
        )
    }

    /// Returns the places of the copies.
    fn copies(&self) -> Option<Vec<u64>> {
        let block_size = self.block_size()?;
        let first_block = u64::from(self.u32(0x14));
        let per_group = u64::from(self.u32(0x20));
        let place = |group: u64| {
            let block = group.checked_mul(per_group)?.checked_add(first_block)?;
            block.checked_mul(block_size)
        };
        self.groups_with_copies()?.into_iter().map(place).collect()
    }

    fn set_uuid(&mut self, new: &[u8; 16]) {
        if self.has_checksums() && self.incompat() & INCOMPAT_CSUM_SEED == 0 {
            let seed = raw_crc32c(&self.uuid());
            let incompat = self.incompat() | INCOMPAT_CSUM_SEED;
            self.0[0x270..0x274].copy_from_slice(&seed.to_le_bytes());
            self.0[0x60..0x64].copy_from_slice(&incompat.to_le_bytes());
        }
        self.0[0x68..0x78].copy_from_slice(new);
        if self.has_checksums() {
            let checksum = self.checksum();
            self.0[0x3fc..].copy_from_slice(&checksum.to_le_bytes());
        }
    }
}

/// The checksum of ext4: CRC-32C without the inversion at its end.
fn raw_crc32c(bytes: &[u8]) -> u32 {
    !crc32c::crc32c(bytes)
}

pub(super) fn identity(device: &File) -> io::Result<Identity> {
    let superblock = Superblock::read(device, OFFSET)?;
    let id = uuid_text(&superblock.uuid());
    let has_inner_journal = superblock.u32(0xe0) != 0;
    let reason = if !superblock.is_intact() || superblock.copies().is_none() {
        "its superblock is damaged; repair it first (e2fsck)"
    } else if superblock.compat() & COMPAT_STABLE_INODES != 0 {
        "its encryption needs the UUID that it has (feature stable_inodes)"
    } else if superblock.incompat() & INCOMPAT_JOURNAL_DEVICE != 0
        || (superblock.compat() & COMPAT_HAS_JOURNAL != 0 && !has_inner_journal)
    {
        "its journal is on another device, which knows it by its UUID"
    } else if superblock.ro_compat() & RO_COMPAT_GROUP_CSUM != 0 && !superblock.has_checksums() {
        "its block groups have checksums of the UUID (feature uninit_bg); \
         tune2fs -O ^uninit_bg, or metadata_csum, in the guest changes that"
    } else {
        return Ok(Identity::Changeable { id });
    };
    Ok(Identity::Fixed {
        id: Some(id),
        reason: reason.to_owned(),
    })
}

pub(super) fn change(device: &File, new: &[u8; 16]) -> io::Result<()> {
    let damaged = || io::Error::other("its superblock is damaged");
    let mut superblock = Superblock::read(device, OFFSET)?;
    if !superblock.is_intact() {
        return Err(damaged());
    }
    if superblock.incompat() & INCOMPAT_RECOVER != 0 {
        return Err(io::Error::other(
            "its journal still has changes that are not in place",
        ));
    }
    for offset in superblock.copies().ok_or_else(damaged)? {
        let mut copy = Superblock::read(device, offset)?;
        // One that is damaged, or of an earlier file system, is left as it is, as the kernel does.
        if copy.is_intact() && copy.uuid() == superblock.uuid() {
            copy.set_uuid(new);
            device.write_all_at(&copy.0, offset)?;
        }
    }
    superblock.set_uuid(new);
    device.write_all_at(&superblock.0, OFFSET)
}
