// SPDX-License-Identifier: Apache-2.0

//! Test data that host and guest can each generate and check, without sending it to each other.
//!
//! The pattern of a seed is the output of SplitMix64 started at that seed, each word in
//! little-endian order. Any part of it can be generated without the parts before.

/// Fills `buffer` with the part of the pattern of `seed` that starts at byte `offset`.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    let mut index = offset / 8;
    let mut skip = (offset % 8) as usize;
    let mut rest = buffer;
    while !rest.is_empty() {
        let bytes = word(seed, index).to_le_bytes();
        let part = &bytes[skip..];
        let length = part.len().min(rest.len());
        let (now, later) = rest.split_at_mut(length);
        now.copy_from_slice(&part[..length]);
        rest = later;
        index += 1;
        skip = 0;
    }
}

/// Returns the position in the pattern of the first wrong byte of `data`, which starts at byte
/// `offset` of the pattern.
pub fn first_difference(seed: u64, offset: u64, data: &[u8]) -> Option<u64> {
    let mut expected = vec![0; data.len()];
    fill(seed, offset, &mut expected);
    if expected == data {
        return None;
    }
    let index = expected.iter().zip(data).position(|(a, b)| a != b)?;
    Some(offset + index as u64)
}

/// Returns the word at `index` of the SplitMix64 sequence of `seed`.
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// CRC-32 as in gzip, zip and PNG (reflected, polynomial 0x04c11db7).
pub struct Crc32(u32);

impl Crc32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut value = byte as u32;
            let mut bit = 0;
            while bit < 8 {
                value = (value >> 1) ^ (0xedb8_8320 & (value & 1).wrapping_neg());
                bit += 1;
            }
            table[byte] = value;
            byte += 1;
        }
        table
    };

    pub fn new() -> Self {
        Self(!0)
    }

    pub fn update(&mut self, data: &[u8]) {
        for &byte in data {
            self.0 = (self.0 >> 8) ^ Self::TABLE[usize::from(self.0 as u8 ^ byte)];
        }
    }

    pub fn value(&self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_is_splitmix64() {
        let mut data = [0; 16];
        fill(1234567, 0, &mut data);
        let expected = [6457827717110365317_u64, 3203168211198807973].map(u64::to_le_bytes);
        assert_eq!(data, expected.concat()[..]);
    }

    #[test]
    fn pattern_can_start_anywhere() {
        let mut whole = [0; 64];
        fill(7, 0, &mut whole);
        for start in 0..whole.len() {
            let mut part = vec![0; whole.len() - start];
            fill(7, start as u64, &mut part);
            assert_eq!(part, whole[start..]);
        }
    }

    #[test]
    fn first_difference_is_found() {
        let mut data = [0; 100];
        fill(9, 1000, &mut data);
        assert_eq!(first_difference(9, 1000, &data), None);
        data[42] ^= 1;
        assert_eq!(first_difference(9, 1000, &data), Some(1042));
    }

    #[test]
    fn crc32_has_its_check_value() {
        let mut crc = Crc32::new();
        crc.update(b"1234");
        crc.update(b"56789");
        assert_eq!(crc.value(), 0xcbf4_3926);
    }
}
