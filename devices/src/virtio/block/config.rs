//! The configuration space (section 5.2.4).

use std::fmt;

use bantam_storage::{Disk, SECTOR_SIZE};

use super::limits::{MAX_RANGE_SECTORS, MAX_RANGES, MAX_SEGMENTS};

/// Offsets in the configuration space (section 5.2.4).
pub(super) mod offset {
    pub const CAPACITY: usize = 0;
    pub const SEG_MAX: usize = 12;
    pub const BLK_SIZE: usize = 20;
    pub const PHYSICAL_BLOCK_EXP: usize = 24;
    pub const MIN_IO_SIZE: usize = 26;
    pub const NUM_QUEUES: usize = 34;
    pub const MAX_DISCARD_SECTORS: usize = 36;
    pub const MAX_DISCARD_SEG: usize = 40;
    pub const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    pub const SIZE: usize = 60;
}

/// Makes the configuration space of a device over `disk`.
pub(super) fn config_space(disk: &Disk, queues: u16) -> Vec<u8> {
    let mut space = vec![0; offset::SIZE];
    let capacity = disk.size() / SECTOR_SIZE;
    space[offset::CAPACITY..][..8].copy_from_slice(&capacity.to_le_bytes());
    let (logical, physical) = (disk.logical_block_size(), disk.physical_block_size());
    for (offset, value) in [
        (offset::SEG_MAX, MAX_SEGMENTS),
        (offset::BLK_SIZE, logical),
        (offset::MAX_DISCARD_SECTORS, MAX_RANGE_SECTORS),
        (offset::MAX_DISCARD_SEG, MAX_RANGES),
        (
            offset::DISCARD_SECTOR_ALIGNMENT,
            physical / SECTOR_SIZE as u32,
        ),
        (offset::MAX_WRITE_ZEROES_SECTORS, MAX_RANGE_SECTORS),
        (offset::MAX_WRITE_ZEROES_SEG, MAX_RANGES),
    ] {
        space[offset..][..4].copy_from_slice(&value.to_le_bytes());
    }
    let blocks = physical / logical;
    space[offset::PHYSICAL_BLOCK_EXP] = blocks.ilog2() as u8;
    space[offset::MIN_IO_SIZE..][..2].copy_from_slice(&(blocks as u16).to_le_bytes());
    space[offset::NUM_QUEUES..][..2].copy_from_slice(&queues.to_le_bytes());
    space[offset::WRITE_ZEROES_MAY_UNMAP] = 1;
    space
}

/// Describes how `saved`, the configuration space of another device, differs from that of a device over
/// `disk`. `None` if they are equal.
pub(super) fn difference(saved: &[u8], disk: &Disk, queues: u16) -> Option<String> {
    let own = config_space(disk, queues);
    if saved == own {
        return None;
    }
    if saved.len() != own.len() {
        let (saved, own) = (saved.len(), own.len());
        return Some(differs("bytes of configuration", saved, own));
    }
    let number = |space: &[u8], offset: usize, size: usize| {
        let bytes = space[offset..][..size].iter().rev();
        bytes.fold(0, |number, &byte| number << 8 | u128::from(byte))
    };
    for (what, offset, size, unit) in [
        ("size in bytes", offset::CAPACITY, 8, SECTOR_SIZE),
        ("bytes of a logical block", offset::BLK_SIZE, 4, 1),
        ("number of queues", offset::NUM_QUEUES, 2, 1),
    ] {
        let [saved, own] = [saved, &own].map(|space| number(space, offset, size));
        if saved != own {
            let unit = u128::from(unit);
            return Some(differs(what, saved * unit, own * unit));
        }
    }
    Some("its physical block size or the limits of its requests differ".to_owned())
}

fn differs(what: &str, saved: impl fmt::Display, own: impl fmt::Display) -> String {
    format!("{what}: {saved} in the saved state, {own} here")
}
