//! Data that host and guest make and check each for itself.

#[allow(dead_code, missing_docs)]
#[path = "../agent/src/pattern.rs"]
pub(crate) mod agent;

/// The part of the Linux agent's pattern of `seed` from `offset` on, `length` bytes long.
pub fn pattern(seed: u64, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    agent::fill(seed, offset, &mut bytes);
    bytes
}

/// The position within the pattern of the first byte of `data`, which starts at `offset` of it,
/// that is wrong.
pub fn first_difference(seed: u64, offset: u64, data: &[u8]) -> Option<u64> {
    agent::first_difference(seed, offset, data)
}

/// CRC-32 as the Linux agent prints it.
pub fn crc32(data: &[u8]) -> u32 {
    let mut crc = agent::Crc32::new();
    crc.update(data);
    crc.value()
}

/// FNV-1a, 64 bits, as the payload `serial` prints it.
pub fn fnv1a(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
