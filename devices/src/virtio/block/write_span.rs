//! What a write changes, and which other writes may be under way meanwhile.

use std::ops::Range;

/// The blocks that a write changes.
#[derive(Debug, Clone)]
pub(super) struct WriteSpan {
    pub(super) blocks: Range<u64>,
    /// Whether it covers only a part of some of them, so that no other write may be under way there.
    pub(super) is_partial: bool,
}

impl WriteSpan {
    /// Whether the two writes must not be under way at the same time.
    pub(super) fn excludes(&self, other: &WriteSpan) -> bool {
        (self.is_partial || other.is_partial)
            && self.blocks.start < other.blocks.end
            && other.blocks.start < self.blocks.end
    }
}
