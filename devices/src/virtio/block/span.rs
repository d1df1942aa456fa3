//! The part of a disk that a request uses, and which other requests may be in progress there meanwhile.

use std::ops::Range;

/// The part of a disk that a request uses.
#[derive(Debug, Clone)]
pub(super) struct Span {
    pub(super) bytes: Range<u64>,
    /// Whether no other request that has a span may be in progress there.
    pub(super) is_exclusive: bool,
}

impl Span {
    /// Whether the two requests must not be in progress at the same time.
    pub(super) fn excludes(&self, other: &Span) -> bool {
        (self.is_exclusive || other.is_exclusive)
            && self.bytes.start < other.bytes.end
            && other.bytes.start < self.bytes.end
    }
}
