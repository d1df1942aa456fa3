//! Compressed clusters: how their bytes are made and read.

use std::io::{self, Read};

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::header::Compression;

/// Window of deflate as a power of two, which QEMU uses too.
const WINDOW_BITS: u8 = 12;
/// Largest window of Zstandard that is read, as a power of two. A cluster needs 21.
const MAX_ZSTD_WINDOW: u32 = 24;

/// Fills `cluster` from `data`, behind whose end there may be other bytes.
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

/// Returns the compressed bytes of a cluster, or `None` if they are not fewer.
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
                // The only reason that is left is that the bytes do not fit.
                Err(_) => return Ok(None),
            }
        }
    };
    data.truncate(len);
    Ok(Some(data).filter(|data| data.len() < cluster.len()))
}
