//! Numbers in headers.

/// A header, whose fields are read by their offsets. A field beyond its end reads as zeroes: the headers
/// here have a fixed size, and their readers name fields within it.
#[derive(Debug, Clone, Copy)]
pub struct Header<'a>(pub &'a [u8]);

impl Header<'_> {
    /// Returns the `N` bytes at `offset`.
    pub fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let field = self.0.get(offset..).and_then(<[u8]>::first_chunk);
        field.copied().unwrap_or([0; N])
    }

    /// Returns the little-endian number of 16 bits at `offset`.
    pub fn le16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    /// Returns the little-endian number of 32 bits at `offset`.
    pub fn le32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    /// Returns the little-endian number of 64 bits at `offset`.
    pub fn le64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }

    /// Returns the big-endian number of 16 bits at `offset`.
    pub fn be16(&self, offset: usize) -> u16 {
        u16::from_be_bytes(self.bytes(offset))
    }

    /// Returns the big-endian number of 32 bits at `offset`.
    pub fn be32(&self, offset: usize) -> u32 {
        u32::from_be_bytes(self.bytes(offset))
    }

    /// Returns the big-endian number of 64 bits at `offset`.
    pub fn be64(&self, offset: usize) -> u64 {
        u64::from_be_bytes(self.bytes(offset))
    }
}
