//! Compressed clusters.

use std::io::{self, Read};

use super::Qcow2;
use super::entry::{Compressed, L2Entry};
use super::header::Compression;
use super::locks::lock;
use super::tables::NewEntry;
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

/// Maximum number of bytes that are compressed at a time, if a cluster is not larger.
const PIECE: u64 = 4 << 20;
/// Window of deflate as a power of two. It is that of QEMU.
const WINDOW_BITS: u8 = 12;
/// Maximum window of Zstandard as a power of two, which bounds the memory that an image can demand. The largest
/// cluster needs 21.
const MAX_ZSTD_WINDOW: u32 = 24;

/// Decompresses `data`, which other bytes may follow, and fills `cluster` with the result.
///
/// # Errors
/// If they are not a compressed cluster.
pub(super) fn decompress(
    compression: Compression,
    data: &[u8],
    cluster: &mut [u8],
) -> io::Result<()> {
    let is_whole = match compression {
        Compression::Zlib => {
            let mut decoder = Decompress::new_with_window_bits(false, 15);
            let result = decoder.decompress(data, cluster, FlushDecompress::Finish);
            result.is_ok() && decoder.total_out() == cluster.len() as u64
        }
        Compression::Zstd => {
            let decode = |cluster: &mut [u8]| -> io::Result<()> {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(data)?;
                decoder.window_log_max(MAX_ZSTD_WINDOW)?;
                decoder.read_exact(cluster)
            };
            decode(cluster).is_ok()
        }
    };
    if is_whole {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a compressed cluster cannot be decompressed",
        ))
    }
}

/// Compresses a cluster. Returns `None` if that does not make it smaller.
///
/// # Errors
/// If the compressor fails.
pub(super) fn compress(compression: Compression, cluster: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut data = vec![0; cluster.len()];
    let len = match compression {
        Compression::Zlib => {
            let level = flate2::Compression::default();
            let mut encoder = Compress::new_with_window_bits(level, false, WINDOW_BITS);
            match encoder.compress(cluster, &mut data, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => encoder.total_out() as usize,
                Ok(_) => return Ok(None),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Compression::Zstd => {
            let mut encoder = zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL)?;
            match encoder.compress_to_buffer(cluster, &mut data) {
                Ok(len) => len,
                // With a valid level it fails only if the result does not fit.
                Err(_) => return Ok(None),
            }
        }
    };
    data.truncate(len);
    Ok(Some(data).filter(|data| data.len() < cluster.len()))
}

impl Qcow2 {
    /// Writes whole clusters of the disk in compressed form. Those that would not get smaller are written as
    /// they are. The last cluster of the disk may be shorter.
    ///
    /// Each call syncs, so it should have much data. The caller makes sure that no data is transferred by an answer of
    /// [`Image::map`](crate::Image::map) meanwhile.
    ///
    /// # Errors
    /// If the range does not consist of whole clusters ([`io::ErrorKind::InvalidInput`]), and those
    /// of [`Image::write_at`](crate::Image::write_at).
    pub fn write_compressed(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        let end = offset.saturating_add(bytes.len() as u64);
        self.check_range(&(offset..end))?;
        let cluster_size = self.geometry.cluster_size();
        let is_whole = end.is_multiple_of(cluster_size) || end == crate::Image::size(self);
        if !offset.is_multiple_of(cluster_size) || !is_whole {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let slice_bytes = self.tables.slice_clusters() << self.geometry.cluster_bits;
        let most = PIECE.max(cluster_size).min(slice_bytes);
        let (mut bytes, mut offset) = (bytes, offset);
        while !bytes.is_empty() {
            // A piece has its entries in one slice.
            let len = (bytes.len() as u64).min(most - offset % most);
            let (piece, rest) = bytes.split_at(len as usize);
            self.note(self.write_compressed_piece(piece, offset))?;
            bytes = rest;
            offset += len;
        }
        Ok(())
    }

    /// Writes clusters of one slice.
    fn write_compressed_piece(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let geometry = self.geometry;
        let cluster_size = geometry.cluster_size();
        let max_count = lock(&self.allocator).refcounts.max();
        // Offsets in what is written, and how many compressed clusters touch each cluster of the file.
        let mut packed = Vec::new();
        let mut counts: Vec<u64> = Vec::new();
        let mut places = Vec::new();
        for (cluster, bytes) in
            (offset >> geometry.cluster_bits..).zip(bytes.chunks(cluster_size as usize))
        {
            let mut padded = bytes.to_vec();
            padded.resize(cluster_size as usize, 0);
            let Some(data) = compress(self.compression, &padded)? else {
                self.write_range(bytes, cluster << geometry.cluster_bits)?;
                continue;
            };
            let last = packed.len() / cluster_size as usize;
            if counts.get(last).is_some_and(|&count| count >= max_count) {
                packed.resize((last + 1) << geometry.cluster_bits, 0);
            }
            let start = packed.len() as u64;
            packed.extend_from_slice(&data);
            let touched = geometry.clusters(start..packed.len() as u64);
            counts.resize(touched.end as usize, 0);
            for count in &mut counts[touched.start as usize..] {
                *count += 1;
            }
            places.push((cluster, start, data.len() as u64));
        }
        let Some(&(first, ..)) = places.first() else {
            return Ok(());
        };
        let _guard = self
            .ranges
            .exclusive(geometry.clusters(offset..offset + bytes.len() as u64));
        self.ensure_table(first)?;
        let taken = {
            let mut allocator = lock(&self.allocator);
            let taken = allocator.take_contiguous(counts.len() as u64)?;
            for (cluster, &count) in taken.clone().zip(&counts) {
                allocator
                    .refcounts
                    .add(cluster..cluster + 1, count as i64 - 1, |_| ())?;
            }
            allocator.refcounts.write_back()?;
            taken
        };
        let host = taken.start << geometry.cluster_bits;
        if (host + packed.len() as u64) >> (70 - geometry.cluster_bits).min(56) != 0 {
            let error = "the image is too large for more compressed clusters";
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, error));
        }
        self.write_host(&packed, host)?;
        self.gate.sync()?;
        for (cluster, start, len) in places {
            let old = self
                .tables
                .entries(cluster..cluster + 1, |entry| self.inspect(entry))?;
            let entry = L2Entry::compressed(
                geometry,
                Compressed {
                    offset: host + start,
                    len,
                },
            );
            let new = NewEntry::immediate(entry);
            let replaced = self.tables.store(cluster, &old, &[new])?;
            self.free_old(&replaced);
        }
        Ok(())
    }
}
