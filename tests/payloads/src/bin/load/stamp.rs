//! Data that identifies its place on a disk, the load that wrote it, and when.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

const SECTOR_WORDS: usize = 64;
const SECTOR_SIZE: u64 = 512;
const WORD_SIZE: u64 = 8;
/// The odd number nearest to 2^64 divided by the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Most blocks that are tracked.
const MAX_BLOCKS: u64 = 1 << 20;
const BUSY: u32 = 1 << 31;

/// Returns a word of a sector, except the first, which is the generation: how often the load had
/// written the block.
fn word(seed: u64, offset: u64, generation: u64) -> u64 {
    (seed ^ offset.wrapping_add(generation << 48)).wrapping_mul(FACTOR)
}

/// The expected content of each block of a disk.
pub struct Stamps {
    seed: u64,
    /// How often this load has written each block, and whether a request for it is under way.
    blocks: Vec<u32>,
}

impl Stamps {
    /// Makes stamps for a number of blocks, none of them written by this load yet.
    ///
    /// # Errors
    ///
    /// If there are too many.
    pub fn new(seed: u64, blocks: u64) -> Result<Self, String> {
        if blocks > MAX_BLOCKS {
            return Err(format!(
                "verify: {blocks} blocks are too many to keep track of: give a span of at most \
                 {MAX_BLOCKS} blocks"
            ));
        }
        Ok(Self {
            seed,
            blocks: vec![0; blocks as usize],
        })
    }

    /// Returns the first block from `block` on that has no request under way, and marks it as under
    /// way. There are more blocks than requests.
    pub fn take(&mut self, block: u64) -> u64 {
        let mut block = block as usize;
        while self.blocks[block] & BUSY != 0 {
            block = (block + 1) % self.blocks.len();
        }
        self.blocks[block] |= BUSY;
        block as u64
    }

    /// Notes that the request for `block` is done.
    pub fn release(&mut self, block: u64) {
        self.blocks[block as usize] &= !BUSY;
    }

    /// Returns whether this load has written `block`.
    pub fn is_written(&self, block: u64) -> bool {
        self.blocks[block as usize] & !BUSY != 0
    }

    /// Fills data to be written to `block`.
    pub fn fill(&mut self, block: u64, data: &mut [u64]) {
        let state = &mut self.blocks[block as usize];
        *state += 1;
        let generation = u64::from(*state & !BUSY);
        let start = block * data.len() as u64 * WORD_SIZE;
        for (sector, words) in data.chunks_exact_mut(SECTOR_WORDS).enumerate() {
            let offset = start + sector as u64 * SECTOR_SIZE;
            words[0] = generation;
            for (index, place) in words.iter_mut().enumerate().skip(1) {
                *place = word(self.seed, offset + index as u64 * WORD_SIZE, generation);
            }
        }
    }

    /// Checks data that was read from `block`. If this load has not written it, any load with the
    /// same seed may have.
    ///
    /// # Errors
    ///
    /// A description of the first word that is wrong.
    pub fn check(&self, block: u64, data: &[u64]) -> Result<(), String> {
        let written = u64::from(self.blocks[block as usize] & !BUSY);
        let start = block * data.len() as u64 * WORD_SIZE;
        for (sector, words) in data.chunks_exact(SECTOR_WORDS).enumerate() {
            let offset = start + sector as u64 * SECTOR_SIZE;
            let generation = words[0];
            if written != 0 && generation != written {
                return Err(format!(
                    "at {offset:#x} of the disk is generation {generation:#x}, and {written:#x} \
                     was written"
                ));
            }
            for (index, &found) in words.iter().enumerate().skip(1) {
                let offset = offset + index as u64 * WORD_SIZE;
                let expected = word(self.seed, offset, generation);
                if found != expected {
                    return Err(format!(
                        "at {offset:#x} of the disk is {found:#018x}, not {expected:#018x}"
                    ));
                }
            }
        }
        Ok(())
    }
}
