//! The compressed kernel inside a bzImage.
//!
//! Its size when decompressed is known beforehand: the kernel build appends it in four bytes to
//! every format except gzip, whose own trailer ends with the same number, and the boot code in the
//! image relies on it. So one buffer of exactly that size takes the output, and output of any other
//! size is an error.

use std::fmt;
use std::io::Read;

use liblzma::stream::Stream;

use super::KernelError;
use super::lzo;
use crate::image_file::mib;

/// Most bytes that a payload may decompress to in any machine: 1 GiB.
pub(super) const MAX_SIZE: u64 = 1 << 30;

/// Size in bytes of the decompressed size at the end of the payload.
const SIZE_TRAILER: usize = 4;

/// Most memory in bytes that an LZMA decoder may take beside the output: the kernel build uses
/// dictionaries of up to 128 MiB.
const LZMA_MEMORY_LIMIT: u64 = 256 << 20;

/// Start of a stream of the legacy LZ4 frame format, and of each stream concatenated to it.
const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Decompressed size of each block of that format; the last may be smaller.
const LZ4_LEGACY_BLOCK_SIZE: usize = 8 << 20;

/// How the kernel inside a bzImage is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// CONFIG_KERNEL_GZIP.
    Gzip,
    /// CONFIG_KERNEL_BZIP2.
    Bzip2,
    /// CONFIG_KERNEL_LZMA.
    Lzma,
    /// CONFIG_KERNEL_XZ.
    Xz,
    /// CONFIG_KERNEL_LZO.
    Lzo,
    /// CONFIG_KERNEL_LZ4.
    Lz4,
    /// CONFIG_KERNEL_ZSTD.
    Zstd,
}

impl Compression {
    /// Magic of each format, as in the kernel's lib/decompress.c.
    const MAGICS: [(&'static [u8], Self); 7] = [
        (b"\x1f\x8b", Self::Gzip),
        (b"BZh", Self::Bzip2),
        (b"\x5d\x00\x00", Self::Lzma),
        (b"\xfd7zXZ\0", Self::Xz),
        (lzo::LZOP_MAGIC, Self::Lzo),
        (&LZ4_LEGACY_MAGIC, Self::Lz4),
        (b"\x28\xb5\x2f\xfd", Self::Zstd),
    ];

    fn of(payload: &[u8]) -> Option<Self> {
        Self::MAGICS
            .iter()
            .find(|(magic, _)| payload.starts_with(magic))
            .map(|(_, compression)| *compression)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// Why the monitor cannot take the kernel out of a bzImage.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The setup header describes no payload, or an empty one.
    #[error("the bzImage has no payload")]
    Missing,
    /// The payload starts with no known magic.
    #[error("the compression format of the kernel in the bzImage is unknown")]
    UnknownCompression,
    /// The decompressed kernel would not fit into guest memory.
    #[error(
        "the kernel in the bzImage is {} MiB when decompressed, more than the {} MiB that this \
         machine can hold", mib(u64::from(*size)), limit >> 20
    )]
    TooLarge {
        /// Decompressed size in bytes.
        size: u32,
        /// Greatest size in bytes.
        limit: u64,
    },
    /// The decoder refused the payload.
    #[error("the {compression} kernel in the bzImage cannot be decompressed: {reason}")]
    Corrupt {
        /// Its compression.
        compression: Compression,
        /// The decoder's error.
        reason: String,
    },
    /// The payload decompressed to something that is not an x86-64 kernel.
    #[error("the bzImage does not contain a kernel for this machine: {0}")]
    NotAKernel(Box<KernelError>),
}

/// Decompresses `payload`, the bytes that `payload_offset` and `payload_length` of the setup header
/// delimit, if that yields at most `limit` bytes.
pub(super) fn decompress(
    payload: &[u8],
    limit: u64,
) -> Result<(Compression, Vec<u8>), PayloadError> {
    let (data, trailer) = payload
        .split_last_chunk::<SIZE_TRAILER>()
        .ok_or(PayloadError::Missing)?;
    let compression = Compression::of(payload).ok_or(PayloadError::UnknownCompression)?;
    let size = u32::from_le_bytes(*trailer);
    if u64::from(size) > limit {
        return Err(PayloadError::TooLarge { size, limit });
    }

    let mut output = vec![0; size as usize];
    let decompressed = match compression {
        Compression::Gzip => read_all(flate2::bufread::GzDecoder::new(payload), &mut output),
        Compression::Bzip2 => read_all(bzip2::bufread::BzDecoder::new(data), &mut output),
        Compression::Lzma => Stream::new_lzma_decoder(LZMA_MEMORY_LIMIT)
            .map_err(|error| error.to_string())
            .and_then(|stream| decode_lzma(data, stream, &mut output)),
        Compression::Xz => Stream::new_stream_decoder(LZMA_MEMORY_LIMIT, 0)
            .map_err(|error| error.to_string())
            .and_then(|stream| decode_lzma(data, stream, &mut output)),
        Compression::Lzo => {
            lzo::decompress_lzop(data, &mut output).map_err(|error| error.to_string())
        }
        Compression::Lz4 => decompress_lz4_legacy(data, &mut output),
        Compression::Zstd => decompress_zstd(data, &mut output),
    };
    match decompressed {
        Ok(()) => Ok((compression, output)),
        Err(reason) => Err(PayloadError::Corrupt {
            compression,
            reason,
        }),
    }
}

fn decode_lzma(data: &[u8], stream: Stream, output: &mut [u8]) -> Result<(), String> {
    read_all(
        liblzma::bufread::XzDecoder::new_stream(data, stream),
        output,
    )
}

/// Fills `output` from `decoder`, which must end there; that also verifies its checksums.
fn read_all(mut decoder: impl Read, output: &mut [u8]) -> Result<(), String> {
    decoder
        .read_exact(output)
        .map_err(|error| error.to_string())?;
    match decoder.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(wrong_size(output.len())),
        Err(error) => Err(error.to_string()),
    }
}

fn decompress_zstd(data: &[u8], output: &mut [u8]) -> Result<(), String> {
    let size = zstd::bulk::Decompressor::new()
        .and_then(|mut decompressor| decompressor.decompress_to_buffer(data, output))
        .map_err(|error| error.to_string())?;
    if size == output.len() {
        Ok(())
    } else {
        Err(wrong_size(output.len()))
    }
}

/// Decompresses the legacy LZ4 frame format (lz4 doc/lz4_Frame_format.md, "Legacy frame"): after
/// the magic, blocks that each start with their compressed size in four bytes.
fn decompress_lz4_legacy(data: &[u8], output: &mut [u8]) -> Result<(), String> {
    const CUT_SHORT: &str = "it ends within a block";
    let mut input = data;
    let mut written = 0;
    while let Some((word, after)) = input.split_first_chunk::<4>() {
        input = after;
        if *word == LZ4_LEGACY_MAGIC {
            continue;
        }
        let (block, after) = input
            .split_at_checked(u32::from_le_bytes(*word) as usize)
            .ok_or(CUT_SHORT)?;
        input = after;
        let rest = output.get_mut(written..).unwrap_or_default();
        let room = rest.len().min(LZ4_LEGACY_BLOCK_SIZE);
        written +=
            lz4_flex::block::decompress_into(block, rest.get_mut(..room).unwrap_or_default())
                .map_err(|error| error.to_string())?;
    }
    if !input.is_empty() {
        return Err(CUT_SHORT.to_owned());
    }
    if written == output.len() {
        Ok(())
    } else {
        Err(wrong_size(output.len()))
    }
}

fn wrong_size(expected: usize) -> String {
    format!("it does not yield the {expected} bytes it announces")
}
