//! LZO1X data in the container of the `lzop` tool, as the kernel build writes it.
//!
//! Linux Documentation/staging/lzo.rst describes the format of the data; only its implementations
//! describe the container.

/// First bytes of an lzop file.
pub(super) const LZOP_MAGIC: &[u8] = b"\x89LZO\0\r\n\x1a\n";

/// First version whose header has all fields.
const LZOP_VERSION_WITH_LEVEL: u16 = 0x0940;

// Flags of the lzop header.
const ADLER32_OF_OUTPUT: u32 = 0x1;
const ADLER32_OF_INPUT: u32 = 0x2;
const EXTRA_FIELD: u32 = 0x40;
const CRC32_OF_OUTPUT: u32 = 0x100;
const CRC32_OF_INPUT: u32 = 0x200;
const FILTER: u32 = 0x800;

/// Distance of a match that marks the end of the data.
const END_OF_STREAM_DISTANCE: usize = 0x4000;

/// Why LZO data cannot be decompressed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LzoError {
    #[error("it ends too early")]
    InputTooShort,
    #[error("it is not an lzop file")]
    NotLzop,
    #[error("it was compressed with a filter")]
    Filtered,
    #[error("it refers to data before its start")]
    DistanceTooLong,
    #[error("it yields more bytes than it announces")]
    OutputTooLong,
    #[error("it yields fewer bytes than it announces")]
    OutputTooShort,
}

/// Decompresses an lzop file that yields exactly `output.len()` bytes.
///
/// It skips checksums, like the kernel's own decompressor.
pub(super) fn decompress_lzop(file: &[u8], output: &mut [u8]) -> Result<(), LzoError> {
    let mut input = Input(file);
    let flags = read_lzop_header(&mut input)?;
    let checksums = |mask: u32| (flags & mask).count_ones() as usize * 4;
    let mut rest = output;
    loop {
        let output_size = input.u32_be()? as usize;
        if output_size == 0 {
            break;
        }
        let input_size = input.u32_be()? as usize;
        input.bytes(checksums(ADLER32_OF_OUTPUT | CRC32_OF_OUTPUT))?;
        // A block that would not shrink is stored as it is, with one kind of checksum.
        let is_compressed = input_size < output_size;
        if is_compressed {
            input.bytes(checksums(ADLER32_OF_INPUT | CRC32_OF_INPUT))?;
        }
        let block = input.bytes(input_size)?;
        let (block_output, after) = std::mem::take(&mut rest)
            .split_at_mut_checked(output_size)
            .ok_or(LzoError::OutputTooLong)?;
        if is_compressed {
            decompress_lzo1x(block, block_output)?;
        } else if input_size == output_size {
            block_output.copy_from_slice(block);
        } else {
            return Err(LzoError::OutputTooLong);
        }
        rest = after;
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(LzoError::OutputTooShort)
    }
}

/// Reads past the header and returns its flags.
fn read_lzop_header(input: &mut Input<'_>) -> Result<u32, LzoError> {
    if input.bytes(LZOP_MAGIC.len())? != LZOP_MAGIC {
        return Err(LzoError::NotLzop);
    }
    let version = input.u16_be()?;
    let is_recent = version >= LZOP_VERSION_WITH_LEVEL;
    let _library_version = input.u16_be()?;
    if is_recent {
        let _version_needed = input.u16_be()?;
    }
    let _method = input.u8()?;
    if is_recent {
        let _level = input.u8()?;
    }
    let flags = input.u32_be()?;
    if flags & FILTER != 0 {
        return Err(LzoError::Filtered);
    }
    let _mode = input.u32_be()?;
    let _modification_time_low = input.u32_be()?;
    if is_recent {
        let _modification_time_high = input.u32_be()?;
    }
    let name_length = input.u8()?;
    let _name = input.bytes(name_length.into())?;
    let _header_checksum = input.u32_be()?;
    if flags & EXTRA_FIELD != 0 {
        let length = input.u32_be()? as usize;
        let _extra_field = input.bytes(length)?;
        let _extra_field_checksum = input.u32_be()?;
    }
    Ok(flags)
}

/// Decompresses one LZO1X stream that yields exactly `output.len()` bytes.
fn decompress_lzo1x(stream: &[u8], output: &mut [u8]) -> Result<(), LzoError> {
    let mut input = Input(stream);
    let mut output = Output {
        bytes: output,
        length: 0,
    };
    // How many literals the last instruction copied; 4 stands for 4 or more. The meaning of the
    // instructions 0 to 15 depends on it.
    let mut literals = 0;
    if let Some(first @ 18..) = stream.first().copied() {
        input.u8()?;
        let count = usize::from(first) - 17;
        output.push(input.bytes(count)?)?;
        literals = count.min(4);
    }
    loop {
        let instruction = usize::from(input.u8()?);
        // The low two bits of the last operand are the number of literals that follow a match.
        let (distance, length, trailing) = match (instruction, literals) {
            (64.., _) => {
                let high = usize::from(input.u8()?);
                let length = (instruction >> 5) + 1;
                (
                    (high << 3) + (instruction >> 2 & 7) + 1,
                    length,
                    instruction,
                )
            }
            (32..64, _) => {
                let length = input.long_length(instruction & 0x1f, 31)? + 2;
                let operand = usize::from(input.u16_le()?);
                ((operand >> 2) + 1, length, operand)
            }
            (16..32, _) => {
                let length = input.long_length(instruction & 7, 7)? + 2;
                let operand = usize::from(input.u16_le()?);
                let distance = END_OF_STREAM_DISTANCE + ((instruction & 8) << 11) + (operand >> 2);
                if distance == END_OF_STREAM_DISTANCE {
                    break;
                }
                (distance, length, operand)
            }
            (_, 0) => {
                let count = input.long_length(instruction, 15)? + 3;
                output.push(input.bytes(count)?)?;
                literals = 4;
                continue;
            }
            (_, 1..4) => {
                let high = usize::from(input.u8()?);
                ((high << 2) + (instruction >> 2) + 1, 2, instruction)
            }
            (_, _) => {
                let high = usize::from(input.u8()?);
                ((high << 2) + (instruction >> 2) + 2049, 3, instruction)
            }
        };
        output.repeat(distance, length)?;
        literals = trailing & 3;
        output.push(input.bytes(literals)?)?;
    }
    if output.length == output.bytes.len() {
        Ok(())
    } else {
        Err(LzoError::OutputTooShort)
    }
}

/// The input that is left to read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], LzoError> {
        let (bytes, rest) = self
            .0
            .split_at_checked(count)
            .ok_or(LzoError::InputTooShort)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LzoError> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(LzoError::InputTooShort)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn u8(&mut self) -> Result<u8, LzoError> {
        self.array().map(|[byte]| byte)
    }

    fn u16_le(&mut self) -> Result<u16, LzoError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u16_be(&mut self) -> Result<u16, LzoError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32_be(&mut self) -> Result<u32, LzoError> {
        self.array().map(u32::from_be_bytes)
    }

    /// Returns a length whose field in the instruction is `short`: zero means `base`, plus 255 for
    /// each zero byte that follows, plus the first other byte.
    fn long_length(&mut self, short: usize, base: usize) -> Result<usize, LzoError> {
        if short != 0 {
            return Ok(short);
        }
        let mut length = base;
        loop {
            match self.u8()? {
                0 => length += 255,
                last => return Ok(length + usize::from(last)),
            }
        }
    }
}

/// The output and how much of it has been written.
struct Output<'a> {
    bytes: &'a mut [u8],
    length: usize,
}

impl Output<'_> {
    /// Appends `literals`.
    fn push(&mut self, literals: &[u8]) -> Result<(), LzoError> {
        let end = self.length + literals.len();
        self.bytes
            .get_mut(self.length..end)
            .ok_or(LzoError::OutputTooLong)?
            .copy_from_slice(literals);
        self.length = end;
        Ok(())
    }

    /// Appends `length` bytes that start `distance` bytes back, which may overlap the appended
    /// ones.
    fn repeat(&mut self, distance: usize, length: usize) -> Result<(), LzoError> {
        let start = self
            .length
            .checked_sub(distance)
            .ok_or(LzoError::DistanceTooLong)?;
        let end = self.length + length;
        if end > self.bytes.len() {
            return Err(LzoError::OutputTooLong);
        }
        while self.length < end {
            let available = (self.length - start).min(end - self.length);
            self.bytes
                .copy_within(start..start + available, self.length);
            self.length += available;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_instruction_is_understood() {
        // Literals "abcd", M3-style match at distance 1, then end of stream.
        let stream = [
            21, b'a', b'b', b'c', b'd', // four literals
            0x20, 0x00, 0x02, 0x00, 0x00, // distance 1, length 2 + 31 + 255 + 2
        ];
        let mut output = [0; 294];
        assert_eq!(
            decompress_lzo1x(&stream, &mut output),
            Err(LzoError::InputTooShort)
        );
        let mut stream = stream.to_vec();
        stream.extend([0x11, 0, 0]);
        decompress_lzo1x(&stream, &mut output).unwrap();
        assert_eq!(&output[..4], b"abcd");
        assert!(output[4..].iter().all(|byte| *byte == b'd'));

        assert_eq!(
            decompress_lzo1x(&stream, &mut [0; 293]),
            Err(LzoError::OutputTooLong)
        );
        assert_eq!(
            decompress_lzo1x(&stream, &mut [0; 295]),
            Err(LzoError::OutputTooShort)
        );
    }

    #[test]
    fn matches_before_the_start_are_refused() {
        assert_eq!(
            decompress_lzo1x(&[18, b'a', 0x40, 1, 0x11, 0, 0], &mut [0; 64]),
            Err(LzoError::DistanceTooLong)
        );
    }

    /// Data with matches near and far, long and short.
    fn compressible() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 1..40), 1..200_usize),
            1..60,
        )
        .prop_map(|runs| {
            let mut data: Vec<u8> = Vec::new();
            for (index, (bytes, count)) in runs.iter().enumerate() {
                match index % 3 {
                    0 => data.extend(bytes.iter().cycle().take(*count)),
                    1 => data.extend(bytes),
                    _ => {
                        let start = data.len() * (count % 7) / 7;
                        let end = data.len().min(start + 3 * count);
                        data.extend_from_within(start..end);
                    }
                }
            }
            data
        })
    }

    proptest! {
        #[test]
        fn the_output_of_a_compressor_is_restored(data in compressible()) {
            let stream = lzokay_native::compress(&data).unwrap();
            let mut output = vec![0; data.len()];
            decompress_lzo1x(&stream, &mut output).unwrap();
            prop_assert_eq!(output, data);
        }

        #[test]
        fn hostile_streams_only_fail(
            data in compressible(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        ) {
            let mut stream = lzokay_native::compress(&data).unwrap();
            for (index, byte) in damage {
                *index.get_mut(&mut stream) = byte;
            }
            let _ = decompress_lzo1x(&stream, &mut vec![0; data.len()]);
        }

        #[test]
        fn arbitrary_files_only_fail(file in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decompress_lzop(&file, &mut [0; 100]);
            let _ = decompress_lzo1x(&file, &mut [0; 100]);
        }
    }
}
