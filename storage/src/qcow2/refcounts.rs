//! Refcounts of clusters of the file: the table in memory, and its blocks in the file, with a cache.
//!
//! "Host cluster management" of the specification. Changes stay in memory until [`Refcounts::write_back`],
//! so that an operation writes a block once; none ends without it.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::error::Error;
use super::tables::{read_words, to_bytes};
use crate::ImageFile;

/// Bits of an entry of the table that hold an offset.
const OFFSET: u64 = !0x1ff;
/// Size of the cache of blocks in bytes. It has room for some blocks in any case.
const CACHE_BYTES: u64 = 1 << 20;
/// Minimum number of cached blocks.
const MIN_BLOCKS: u64 = 4;

/// The refcounts of a file.
#[derive(Debug)]
pub(super) struct Refcounts {
    file: Arc<dyn ImageFile>,
    cluster_bits: u32,
    order: u32,
    table_offset: u64,
    table: Vec<u64>,
    /// The block that was used last is the last one.
    blocks: Vec<Block>,
}

/// Writes bytes to an offset of a file.
pub(super) type WriteTo = fn(&dyn ImageFile, &[u8], u64) -> io::Result<()>;
/// A write that the next sync brings to stable storage.
pub(super) const WRITE: WriteTo = |file, bytes, offset| file.write_at(bytes, offset);
/// A write that is on stable storage when it has ended.
pub(super) const WRITE_DURABLY: WriteTo = |file, bytes, offset| file.write_durably(bytes, offset);

#[derive(Debug)]
struct Block {
    index: u64,
    bytes: Vec<u8>,
    /// Bytes that are to be written.
    changed: Range<usize>,
}

impl Refcounts {
    /// Reads the table. Its place and size have been checked.
    pub fn read(
        file: Arc<dyn ImageFile>,
        cluster_bits: u32,
        order: u32,
        table_offset: u64,
        table_clusters: u32,
    ) -> io::Result<Refcounts> {
        let entries = u64::from(table_clusters) << cluster_bits >> 3;
        let table = read_words(&*file, table_offset, entries)?;
        Ok(Refcounts {
            file,
            cluster_bits,
            order,
            table_offset,
            table,
            blocks: Vec::new(),
        })
    }

    /// Number of refcounts of a block.
    pub fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    /// Number of blocks that have the refcounts of `clusters`.
    pub fn blocks_of(&self, clusters: &Range<u64>) -> u64 {
        clusters.end.div_ceil(self.per_block()) - clusters.start / self.per_block()
    }

    /// The largest refcount.
    pub fn max(&self) -> u64 {
        if self.order == 6 {
            u64::MAX
        } else {
            (1 << (1 << self.order)) - 1
        }
    }

    /// Number of entries of the table.
    pub fn table_len(&self) -> u64 {
        self.table.len() as u64
    }

    /// Returns the clusters that hold the table.
    pub fn table_clusters(&self) -> Range<u64> {
        let start = self.table_offset >> self.cluster_bits;
        start..start + (self.table_len() * 8).div_ceil(1 << self.cluster_bits)
    }

    /// Returns index and cluster of all blocks in the table. A damaged table has wrong ones.
    pub fn block_clusters(&self) -> impl Iterator<Item = (u64, u64)> {
        let entries = self
            .table
            .iter()
            .enumerate()
            .filter(|&(_, &entry)| entry & OFFSET != 0);
        entries.map(|(index, entry)| (index as u64, (entry & OFFSET) >> self.cluster_bits))
    }

    /// Returns where a block is.
    ///
    /// # Errors
    /// If the table is damaged.
    pub fn block_offset(&self, index: u64) -> io::Result<Option<u64>> {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| self.table.get(index));
        let offset = entry.copied().unwrap_or(0);
        if offset & ((1 << self.cluster_bits) - 1) != 0 {
            let error = Error::Damaged(format!("refcount table entry {index} is {offset:#x}"));
            return Err(error.into());
        }
        Ok(Some(offset).filter(|&offset| offset != 0))
    }

    /// Returns the refcount of a cluster.
    pub fn get(&mut self, cluster: u64) -> io::Result<u64> {
        let order = self.order;
        let within = cluster % self.per_block();
        let block = self.block(cluster / self.per_block())?;
        Ok(block.map_or(0, |block| get(&block.bytes, order, within)))
    }

    /// Returns the first cluster behind all that have a refcount.
    ///
    /// # Errors
    /// If the table is damaged, or the host cannot read a block.
    pub fn end_of_used(&mut self) -> io::Result<u64> {
        let (order, per_block) = (self.order, self.per_block());
        for index in (0..self.table_len()).rev() {
            let Some(block) = self.block(index)? else {
                continue;
            };
            let last = (0..per_block).rfind(|&within| get(&block.bytes, order, within) != 0);
            if let Some(last) = last {
                return Ok(index * per_block + last + 1);
            }
        }
        Ok(0)
    }

    /// Sets the refcounts of `clusters`, whose blocks exist.
    pub fn set(&mut self, clusters: Range<u64>, value: u64) -> io::Result<()> {
        self.change(clusters, |_, _| Ok(value))
    }

    /// Adds `delta` to the refcounts of `clusters`. Calls `freed` with each that becomes 0.
    ///
    /// # Errors
    /// If a refcount would be less than 0 or too large.
    pub fn add(
        &mut self,
        clusters: Range<u64>,
        delta: i64,
        mut freed: impl FnMut(u64),
    ) -> io::Result<()> {
        let max = self.max();
        self.change(clusters, |cluster, old| {
            let new = old.checked_add_signed(delta).ok_or_else(|| {
                Error::Damaged(format!(
                    "cluster {cluster:#x} of the file has refcount 0 and is used"
                ))
            })?;
            if new > max {
                return Err(Error::NotPossible(format!(
                    "a cluster has {max} references, the most that the image's refcounts can have"
                )));
            }
            if new == 0 {
                freed(cluster);
            }
            Ok(new)
        })
    }

    fn change(
        &mut self,
        clusters: Range<u64>,
        mut new: impl FnMut(u64, u64) -> Result<u64, Error>,
    ) -> io::Result<()> {
        let (order, per_block) = (self.order, self.per_block());
        let mut next = clusters.start;
        while next < clusters.end {
            let index = next / per_block;
            let end = clusters.end.min((index + 1) * per_block);
            let block = self.block(index)?.ok_or_else(|| {
                Error::Damaged(format!(
                    "cluster {next:#x} of the file is used and has no refcount"
                ))
            })?;
            for cluster in next..end {
                let within = cluster % per_block;
                let old = get(&block.bytes, order, within);
                let value = new(cluster, old)?;
                if value != old {
                    let changed = put(&mut block.bytes, order, within, value);
                    if block.changed.is_empty() {
                        block.changed = changed;
                    } else {
                        block.changed.start = block.changed.start.min(changed.start);
                        block.changed.end = block.changed.end.max(changed.end);
                    }
                }
            }
            next = end;
        }
        Ok(())
    }

    /// Adds runs of clusters of `range`, which is in one block, that are free. Stops after `count` of them,
    /// and returns where.
    pub fn free_runs(
        &mut self,
        range: Range<u64>,
        count: u64,
        runs: &mut Vec<Range<u64>>,
    ) -> io::Result<u64> {
        let (order, per_block) = (self.order, self.per_block());
        let Some(block) = self.block(range.start / per_block)? else {
            return Ok(range.end);
        };
        let mut found = 0;
        let mut cluster = range.start;
        while cluster < range.end && found < count {
            if get(&block.bytes, order, cluster % per_block) == 0 {
                found += 1;
                match runs.last_mut() {
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => runs.push(cluster..cluster + 1),
                }
            }
            cluster += 1;
        }
        Ok(cluster)
    }

    /// Writes a new block to `offset`, with refcount 1 for those of `used` that it counts. It does not
    /// count anything before [`Self::add_block`].
    pub fn write_block(
        &self,
        index: u64,
        offset: u64,
        used: &Range<u64>,
        write_to: WriteTo,
    ) -> io::Result<()> {
        let mut bytes = vec![0; 1 << self.cluster_bits];
        let first = index * self.per_block();
        for cluster in used.start.max(first)..used.end.min(first + self.per_block()) {
            put(&mut bytes, self.order, cluster - first, 1);
        }
        write_to(&*self.file, &bytes, offset)
    }

    /// Enters a block into the table. It is on stable storage already.
    pub fn add_block(&mut self, index: u64, offset: u64, write_to: WriteTo) -> io::Result<()> {
        let place = self.table_offset + index * 8;
        write_to(&*self.file, &offset.to_be_bytes(), place)?;
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = offset;
        }
        Ok(())
    }

    /// Returns the bytes of a table of `clusters` clusters that has all blocks of this one and `new` ones.
    pub fn grown_table(&self, clusters: u64, new: &[(u64, u64)]) -> Vec<u64> {
        let mut table = self.table.clone();
        table.resize((clusters << self.cluster_bits >> 3) as usize, 0);
        for &(index, offset) in new {
            if let Some(entry) = table.get_mut(index as usize) {
                *entry = offset;
            }
        }
        table
    }

    /// Writes a table. It is not used before [`Self::use_table`].
    pub fn write_table(&self, table: &[u64], offset: u64) -> io::Result<()> {
        self.file.write_at(&to_bytes(table), offset)
    }

    /// Goes on with another table, which the header names already.
    pub fn use_table(&mut self, table: Vec<u64>, offset: u64) {
        self.table = table;
        self.table_offset = offset;
    }

    /// Writes all changes to the file.
    ///
    /// # Errors
    /// If the host cannot write them. The cache is empty then, as it is not known what the file holds.
    pub fn write_back(&mut self) -> io::Result<()> {
        self.write_back_by(WRITE)
    }

    /// Writes changed refcounts to stable storage, except those of blocks that have left the cache since they
    /// were changed.
    ///
    /// # Errors
    /// Those of [`Self::write_back`].
    pub fn write_back_durably(&mut self) -> io::Result<()> {
        self.write_back_by(WRITE_DURABLY)
    }

    fn write_back_by(&mut self, write_to: WriteTo) -> io::Result<()> {
        for position in 0..self.blocks.len() {
            if let Err(error) = self.write_back_block(position, write_to) {
                self.blocks.clear();
                return Err(error);
            }
        }
        Ok(())
    }

    /// Forgets changes that are not written yet.
    pub fn forget(&mut self) {
        self.blocks.clear();
    }

    /// Returns indices of blocks that are missing for `clusters` in a table of any length.
    pub fn missing_blocks(&self, clusters: Range<u64>) -> BTreeSet<u64> {
        let blocks = clusters.start / self.per_block()..clusters.end.div_ceil(self.per_block());
        blocks
            .filter(|&index| {
                self.table
                    .get(index as usize)
                    .is_none_or(|entry| entry & OFFSET == 0)
            })
            .collect()
    }

    fn write_back_block(&mut self, position: usize, write_to: WriteTo) -> io::Result<()> {
        let block = &self.blocks[position];
        if block.changed.is_empty() {
            return Ok(());
        }
        let (index, changed) = (block.index, block.changed.clone());
        let offset = self.block_offset(index)?;
        let offset = offset.ok_or_else(|| io::Error::other("a refcount block has gone"))?;
        let block = &mut self.blocks[position];
        let bytes = &block.bytes[changed.clone()];
        write_to(&*self.file, bytes, offset + changed.start as u64)?;
        block.changed = 0..0;
        Ok(())
    }

    /// Returns a block, from the file if it is not cached. `None` if there is none.
    fn block(&mut self, index: u64) -> io::Result<Option<&mut Block>> {
        match self.blocks.iter().position(|block| block.index == index) {
            Some(position) if position + 1 == self.blocks.len() => {}
            Some(position) => {
                let block = self.blocks.remove(position);
                self.blocks.push(block);
            }
            None => {
                let Some(offset) = self.block_offset(index)? else {
                    return Ok(None);
                };
                if self.blocks.len() as u64 >= (CACHE_BYTES >> self.cluster_bits).max(MIN_BLOCKS) {
                    self.write_back_block(0, WRITE)?;
                    self.blocks.remove(0);
                }
                let mut bytes = vec![0; 1 << self.cluster_bits];
                self.file.read_at(&mut bytes, offset)?;
                self.blocks.push(Block {
                    index,
                    bytes,
                    changed: 0..0,
                });
            }
        }
        Ok(self.blocks.last_mut())
    }
}

/// Writes the blocks of a new image, which are its last clusters: all clusters up to their end are used.
pub(super) fn write_first_blocks(
    file: &dyn ImageFile,
    order: u32,
    cluster_bits: u32,
    blocks: Range<u64>,
) -> io::Result<()> {
    let per_block = 1u64 << (cluster_bits + 3 - order);
    for (index, block) in blocks.clone().enumerate() {
        let mut bytes = vec![0; 1 << cluster_bits];
        let rest = blocks.end.saturating_sub(index as u64 * per_block);
        for place in 0..rest.min(per_block) {
            put(&mut bytes, order, place, 1);
        }
        file.write_at(&bytes, block << cluster_bits)?;
    }
    Ok(())
}

/// Returns the refcount number `index` of a block.
fn get(block: &[u8], order: u32, index: u64) -> u64 {
    let index = index as usize;
    if order < 3 {
        let bit = index << order;
        let mask = (1u64 << (1 << order)) - 1;
        return u64::from(block[bit / 8]) >> (bit % 8) & mask;
    }
    let bytes = 1 << (order - 3);
    block[index * bytes..][..bytes]
        .iter()
        .fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Sets the refcount number `index` of a block, and returns which bytes have changed.
fn put(block: &mut [u8], order: u32, index: u64, value: u64) -> Range<usize> {
    let index = index as usize;
    if order < 3 {
        let bit = index << order;
        let mask = ((1u32 << (1 << order)) - 1) as u8;
        let byte = &mut block[bit / 8];
        *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        return bit / 8..bit / 8 + 1;
    }
    let bytes = 1 << (order - 3);
    let range = index * bytes..(index + 1) * bytes;
    block[range.clone()].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    range
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_all_widths_are_kept_apart() {
        for order in 0..=6 {
            let max = if order == 6 {
                u64::MAX
            } else {
                (1 << (1 << order)) - 1
            };
            let mut block = vec![0; 64];
            let count = (64 * 8) >> order;
            for index in 0..count {
                put(
                    &mut block,
                    order,
                    index,
                    index.wrapping_mul(0x9e37_79b9_7f4a_7c15) & max,
                );
            }
            for index in 0..count {
                let value = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) & max;
                assert_eq!(get(&block, order, index), value, "{order} {index}");
            }
        }
        let mut block = vec![0; 8];
        put(&mut block, 2, 1, 0xa);
        put(&mut block, 2, 2, 0x5);
        assert_eq!(block[..2], [0xa0, 0x05]);
    }
}
