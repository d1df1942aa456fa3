//! The blocks that a write changes, and which other writes may be in progress meanwhile.

use std::ops::Range;

/// The blocks that a write changes.
#[derive(Debug, Clone)]
pub(super) struct WriteSpan {
    pub(super) blocks: Range<u64>,
    /// Whether it covers some of them only in part, so that no other write may be in progress there.
    pub(super) is_partial: bool,
}

impl WriteSpan {
    /// Whether the two writes must not be in progress at the same time.
    pub(super) fn excludes(&self, other: &WriteSpan) -> bool {
        (self.is_partial || other.is_partial)
            && self.blocks.start < other.blocks.end
            && other.blocks.start < self.blocks.end
    }
}
