// SPDX-License-Identifier: Apache-2.0

//! Random work on a disk, whose result the host can compute beforehand.
//!
//! The disk is divided into areas, each with its own thread in the guest, so that the order of
//! requests does not matter.

use super::pattern;

/// Number of areas of a disk.
pub const AREAS: u64 = 4;

/// Most bytes of a transfer.
pub const MAX_TRANSFER: usize = 1 << 20;

/// The next operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Write the data of [`Area::fill`].
    Write(Transfer),
    /// Read, and expect the data of [`Area::fill`].
    Read(Transfer),
    /// Make zeroes of these bytes, perhaps by a discard first.
    Clear {
        /// The place, a multiple of [`Area::PAGE`] like the length.
        transfer: Transfer,
        /// Whether they are discarded first.
        discards: bool,
    },
    /// Flush, perhaps without the file's metadata.
    Flush { data_only: bool },
}

/// The place of a transfer, and how it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Whether the guest's page cache is bypassed.
    pub direct: bool,
    /// Bytes from the start of the disk, a multiple of the block size.
    pub offset: u64,
    /// Bytes, a multiple of the block size.
    pub length: usize,
    /// Multiple of the block size, less than [`Area::PAGE`], at which the bytes are in a page of memory.
    pub misalignment: usize,
}

/// Stands for the step that wrote a block that has zeroes.
const CLEARED: u32 = u32::MAX;

/// A part of a disk, and the expected content of its blocks.
pub struct Area {
    start: u64,
    block_size: usize,
    /// The step that last wrote each block, counted from one; zero if none did, [`CLEARED`] if it was made
    /// zeroes after that.
    blocks: Vec<u32>,
    steps: u32,
    /// The seed of the pattern that the disk held before.
    disk_seed: u64,
    /// The seed of the area's random numbers.
    seed: u64,
    /// How many of them were used.
    taken: u64,
}

impl Area {
    /// Areas begin and end at multiples of this, so that no page of the guest's cache belongs to
    /// two.
    pub const PAGE: usize = 4096;

    /// Returns the area of this number on a disk of `disk_size` bytes that holds the pattern of
    /// `seed`.
    pub fn new(number: u64, disk_size: u64, block_size: usize, seed: u64) -> Self {
        let size = disk_size / AREAS / Self::PAGE as u64 * Self::PAGE as u64;
        Self {
            start: number * size,
            block_size,
            blocks: vec![0; size as usize / block_size],
            steps: 0,
            disk_seed: seed,
            seed: pattern::word(seed, number),
            taken: 0,
        }
    }

    /// Returns where it begins on the disk.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Returns its size in bytes.
    pub fn size(&self) -> usize {
        self.blocks.len() * self.block_size
    }

    /// Returns the next operation, and keeps track of writes.
    pub fn next_step(&mut self) -> Step {
        self.steps += 1;
        let kind = self.random(16);
        if kind == 0 {
            let data_only = self.random(2) == 0;
            return Step::Flush { data_only };
        }
        // Of every magnitude, with few large ones, which take long.
        let most = self.blocks.len().min(MAX_TRANSFER / self.block_size);
        let magnitudes = u64::from(most.ilog2()) + 1;
        let magnitude = self.random(magnitudes).min(self.random(magnitudes));
        let count = 1 + self.random(1 << magnitude) as usize;
        let first = self.random((self.blocks.len() - count + 1) as u64) as usize;
        let misalignment = self.random((Self::PAGE / self.block_size) as u64) as usize;
        let transfer = |direct| Transfer {
            direct,
            offset: self.start + (first * self.block_size) as u64,
            length: count * self.block_size,
            misalignment: misalignment * self.block_size,
        };
        match kind {
            1..=5 => Step::Read(transfer(true)),
            6 => Step::Read(transfer(false)),
            7 => {
                let page = Self::PAGE / self.block_size;
                let (first, count) = (first / page * page, count.next_multiple_of(page));
                let count = count.min(self.blocks.len() - first);
                self.blocks[first..first + count].fill(CLEARED);
                Step::Clear {
                    transfer: Transfer {
                        direct: false,
                        offset: self.start + (first * self.block_size) as u64,
                        length: count * self.block_size,
                        misalignment: 0,
                    },
                    discards: self.random(2) == 0,
                }
            }
            _ => {
                let step = Step::Write(transfer(kind < 13));
                self.blocks[first..first + count].fill(self.steps);
                step
            }
        }
    }

    /// Fills `buffer` with the expected data from `offset` on, all of it in this area.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let first = (offset - self.start) as usize / self.block_size;
        let chunks = buffer.chunks_mut(self.block_size);
        for (index, (&step, chunk)) in self.blocks[first..].iter().zip(chunks).enumerate() {
            let seed = match step {
                0 => self.disk_seed,
                CLEARED => {
                    chunk.fill(0);
                    continue;
                }
                // Each step has its own pattern.
                step => !pattern::word(self.seed, step.into()),
            };
            pattern::fill(seed, offset + (index * self.block_size) as u64, chunk);
        }
    }

    /// Returns a random number below `limit`.
    fn random(&mut self, limit: u64) -> u64 {
        self.taken += 1;
        let number = pattern::word(self.seed, self.taken);
        ((u128::from(number) * u128::from(limit)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREA_SIZE: usize = 1 << 20;
    const DISK_SIZE: u64 = AREAS * AREA_SIZE as u64;

    #[test]
    fn transfers_stay_in_their_area() {
        for number in 0..AREAS {
            let mut area = Area::new(number, DISK_SIZE, 512, 1);
            assert_eq!(area.start(), number << 20);
            assert_eq!(area.size(), AREA_SIZE);
            for _ in 0..1000 {
                if let Step::Read(transfer) | Step::Write(transfer) | Step::Clear { transfer, .. } =
                    area.next_step()
                {
                    let start = (transfer.offset - area.start()) as usize;
                    assert!(transfer.length > 0 && start + transfer.length <= AREA_SIZE);
                    assert!(transfer.misalignment < Area::PAGE);
                    for value in [start, transfer.length, transfer.misalignment] {
                        assert_eq!(value % 512, 0);
                    }
                }
            }
        }
    }

    #[test]
    fn writes_are_remembered() {
        let mut area = Area::new(2, DISK_SIZE, 4096, 1);
        let mut expected = vec![0; AREA_SIZE];
        pattern::fill(1, area.start(), &mut expected);
        let mut now = vec![0; AREA_SIZE];
        for _ in 0..50 {
            let step = area.next_step();
            area.fill(area.start(), &mut now);
            if let Step::Clear { transfer, .. } = step {
                let start = (transfer.offset - area.start()) as usize;
                expected[start..start + transfer.length].fill(0);
            }
            if let Step::Write(Transfer { offset, length, .. }) = step {
                let start = (offset - area.start()) as usize;
                let range = start..start + length;
                assert!(now[range.clone()] != expected[range.clone()]);
                let mut written = vec![0; length];
                area.fill(offset, &mut written);
                expected[range].copy_from_slice(&written);
            }
            assert!(now == expected);
        }
    }
}
