//! Facts about a snapshot.

use std::fmt;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

/// The end of the physical addresses of an x86-64 processor (AMD64 APM volume 2, section 5.3).
const MAX_ADDRESS: u64 = 1 << 52;

/// Names a snapshot. No two have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// Makes a new id of random bytes.
    ///
    /// # Errors
    /// If the host has none.
    pub fn random() -> io::Result<SnapshotId> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(SnapshotId(bytes))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// What is known of a snapshot without the state of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its id.
    pub id: SnapshotId,
    /// The snapshot since which the pages of this one have been written; `None` if it has all pages.
    pub base: Option<SnapshotId>,
    /// When it was taken, in seconds since 1970.
    pub taken_at: u64,
    /// The version of the program that has taken it.
    pub program_version: String,
    /// The first address and the size in bytes of each region of memory, ascending.
    pub regions: Vec<(u64, u64)>,
}

impl SavedState for Facts {
    const KIND: &'static str = "snapshot";
    const VERSION: u16 = 1;
}

impl Facts {
    /// Describes a snapshot that is taken now, of memory with these regions.
    ///
    /// # Errors
    /// If the host has no random bytes for the id.
    pub fn now(
        base: Option<SnapshotId>,
        regions: impl IntoIterator<Item = (u64, u64)>,
    ) -> io::Result<Facts> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Facts {
            id: SnapshotId::random()?,
            base,
            taken_at: since_1970.map_or(0, |time| time.as_secs()),
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            regions: regions.into_iter().collect(),
        })
    }

    /// Returns the size of the memory in bytes.
    pub fn memory_size(&self) -> u64 {
        self.regions.iter().map(|(_, len)| len).sum()
    }

    /// Returns where each region of memory begins in the memory file, with its first address and its size.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place> {
        let mut next = 0;
        self.regions.iter().map(move |&(start, len)| {
            let offset = next;
            next += len;
            Place { start, len, offset }
        })
    }

    /// Returns the offset in the memory file of the `len` bytes at `address`, if they are in one region.
    pub(crate) fn offset_of(&self, address: GuestAddress, len: usize) -> Option<u64> {
        self.places().find_map(|place| {
            let offset = address.0.checked_sub(place.start)?;
            let end = offset.checked_add(len as u64)?;
            (end <= place.len).then_some(place.offset + offset)
        })
    }

    /// Returns the address of the byte at `offset` in the memory file.
    pub(crate) fn address_at(&self, offset: u64) -> Option<GuestAddress> {
        self.places().find_map(|place| {
            let within = offset.checked_sub(place.offset)?;
            (within < place.len).then_some(GuestAddress(place.start + within))
        })
    }

    /// Checks that regions are in ascending order, of whole pages, where an x86-64 processor can have memory, and do not
    /// overlap.
    pub(crate) fn check(&self) -> Result<(), String> {
        let page = bantam_memory::PAGE_SIZE as u64;
        let mut end = 0;
        for &(start, len) in &self.regions {
            let next = start.checked_add(len).filter(|&end| end <= MAX_ADDRESS);
            let is_whole = start.is_multiple_of(page) && len.is_multiple_of(page) && len > 0;
            match next {
                Some(next) if is_whole && start >= end => end = next,
                _ => return Err(format!("no memory has {len} bytes at {start:#x}")),
            }
        }
        match self.regions.is_empty() {
            true => Err("it has no memory".to_owned()),
            false => Ok(()),
        }
    }
}

/// Where a region of memory is in the memory file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) offset: u64,
}
