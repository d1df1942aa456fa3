//! Tells how large a qcow2 image will be, by the formulas of QEMU.

use super::{Job, ToolError};
use crate::qcow2::{CreateOptions, Preallocation};
use crate::{Content, Image};

/// Bytes of an entry of an L1 table or of a refcount table.
const ENTRY: u64 = 8;
/// The largest L1 table that QEMU accepts, in bytes.
const MAX_L1: u64 = 32 << 20;

/// How large a file will be, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// What it needs for what the disk has now.
    pub required: u64,
    /// Its size when all of the disk has been written.
    pub fully_allocated: u64,
}

/// Measures the qcow2 image that is made with `options`: empty, or with what `source` has. `None` if qcow2 has no such
/// large disks with clusters of this size.
///
/// The sizes are at least those that the image will have: all tables are counted.
///
/// # Errors
/// If the source cannot be read, or the job is cancelled.
pub fn measure_qcow2(
    options: &CreateOptions,
    source: Option<&dyn Image>,
    job: Job<'_>,
) -> Result<Option<Measured>, ToolError> {
    let cluster = options.cluster_size;
    let l2_entry = if options.extended_l2 { 16 } else { 8 };
    let size = source.map_or(options.size, Image::size);
    // No file is larger, so nothing overflows below.
    let Some(size) = size
        .checked_next_multiple_of(cluster)
        .filter(|&size| size <= 1 << 62)
    else {
        return Ok(None);
    };
    let l2_tables = (size / cluster).div_ceil(cluster / l2_entry);
    if l2_tables * ENTRY > MAX_L1 {
        return Ok(None);
    }
    let is_whole = matches!(
        options.preallocation,
        Preallocation::Falloc | Preallocation::Full
    );
    let data = match source {
        _ if is_whole => size,
        // It is not known what the source shares with the backing file.
        Some(_) if options.backing.is_some() => size,
        Some(source) => data_clusters(source, cluster, job)? * cluster,
        None => 0,
    };
    let l1 = (l2_tables * ENTRY).next_multiple_of(cluster);
    let tables = cluster + l2_tables * cluster + l1;
    let refcounts = refcount_bytes((tables + size) / cluster, cluster, options.refcount_bits);
    let fully_allocated = size + tables + refcounts;
    Ok(Some(Measured {
        required: fully_allocated - size + data,
        fully_allocated,
    }))
}

/// Counts the clusters that have data.
fn data_clusters(source: &dyn Image, cluster: u64, job: Job<'_>) -> Result<u64, ToolError> {
    let size = source.size();
    let mut clusters = 0;
    let mut position = 0;
    while position < size {
        job.check()?;
        let status = source.status(position..size);
        let status = status.map_err(|error| ToolError::Read {
            image: "the image",
            offset: position,
            error,
        })?;
        let mut end = position + status.len.max(1);
        if let Content::Data { .. } | Content::Compressed = status.content {
            end = end.next_multiple_of(cluster);
            clusters += (end - position / cluster * cluster) / cluster;
        }
        position = end;
    }
    Ok(clusters)
}

/// Returns the size of the refcount table and blocks that count `clusters` clusters and themselves.
fn refcount_bytes(clusters: u64, cluster: u64, refcount_bits: u32) -> u64 {
    let per_block = cluster * 8 / u64::from(refcount_bits);
    let (mut blocks, mut table) = (0, 0);
    let mut all = 0;
    loop {
        let before = all;
        blocks = (clusters + table + blocks).div_ceil(per_block);
        table = blocks.div_ceil(cluster / ENTRY);
        all = clusters + blocks + table;
        if all == before {
            return (blocks + table) * cluster;
        }
    }
}
