//! Pages by which the memory file of a differential snapshot is recognized when it has been completed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bantam_memory::{GuestMemory, PAGE_SIZE, PageSet};
use bantam_state::SavedState;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::facts::Facts;

/// Most witnesses of a snapshot that are spread over the memory.
const MAX_SPREAD: usize = 15;
/// How many pages are looked at to find them.
const MAX_CANDIDATES: u64 = 512;
/// Spreads these pages over the memory. It is a prime, so that none comes twice.
const STRIDE: u64 = 2_654_435_761;
/// The first MiB has tables that the guest does not change, in case that it has little else.
const TABLES_END: u64 = 1 << 20;

/// A page that is not in a differential snapshot and is not zero, with the checksum of its content. The memory file has
/// this content only after the pages of the base have been added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    address: u64,
    checksum: u32,
}

impl SavedState for Witness {
    const KIND: &'static str = "snapshot witness";
    const VERSION: u16 = 1;
}

impl Witness {
    /// Finds witnesses among the pages of a paused guest that are not in `pages`. There may be none.
    pub fn find(memory: &GuestMemory, facts: &Facts, pages: &PageSet) -> Vec<Witness> {
        let witness = |offset: u64| {
            let address = facts.address_at(offset)?;
            if pages.contains(address) || memory.is_zero_page(address) {
                return None;
            }
            let mut bytes = [0; PAGE_SIZE];
            memory.read_slice(&mut bytes, address).ok()?;
            Some(Witness {
                address: address.0,
                checksum: crc32fast::hash(&bytes),
            })
        };
        let page_count = facts.memory_size() / PAGE_SIZE as u64;
        let spread = (0..MAX_CANDIDATES.min(page_count))
            .map(|index| index.wrapping_mul(STRIDE) % page_count * PAGE_SIZE as u64);
        let tables = (0..TABLES_END).step_by(PAGE_SIZE);
        let spread = spread.filter_map(witness).take(MAX_SPREAD);
        spread.chain(tables.filter_map(witness).take(1)).collect()
    }

    /// Returns whether the memory file `file` has the content of this page.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn is_in(&self, file: &File, facts: &Facts) -> io::Result<bool> {
        let Some(offset) = facts.offset_of(GuestAddress(self.address), PAGE_SIZE) else {
            return Ok(false);
        };
        let mut bytes = [0; PAGE_SIZE];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(crc32fast::hash(&bytes) == self.checksum)
    }
}
