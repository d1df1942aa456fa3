//! Test data that host and guest each generate and check.

#[allow(dead_code, missing_docs)]
#[path = "../agent/src/pattern.rs"]
pub(crate) mod agent;

/// Returns `length` bytes of the Linux agent's pattern of `seed`, from `offset` on.
pub fn pattern(seed: u64, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    agent::fill(seed, offset, &mut bytes);
    bytes
}

/// Returns the position in the pattern of the first wrong byte of `data`, which starts at `offset`
/// of the pattern.
pub fn first_difference(seed: u64, offset: u64, data: &[u8]) -> Option<u64> {
    agent::first_difference(seed, offset, data)
}

/// Returns the CRC-32 as the Linux agent prints it.
pub fn crc32(data: &[u8]) -> u32 {
    let mut crc = agent::Crc32::new();
    crc.update(data);
    crc.value()
}

/// Returns the 64-bit FNV-1a hash as the payload `serial` prints it.
pub fn fnv1a(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
