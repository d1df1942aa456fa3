//! Options of a balloon.

use std::num::NonZeroU32;

use super::error::BalloonError;

/// The number of balloon pages in a MiB.
pub(super) const PAGES_PER_MIB: u32 = 256;

/// Options of a balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonOptions {
    /// How much memory the guest is to give up, in MiB.
    pub target_mib: u32,
    /// Whether the guest may take memory back when it would otherwise have to end processes.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics on its memory, in seconds; `None` means never.
    pub statistics_interval: Option<NonZeroU32>,
    /// Whether the guest reports by itself which memory it does not use.
    pub free_page_reporting: bool,
    /// Whether the guest can be asked which memory it does not use.
    pub free_page_hinting: bool,
}

/// Converts a size to pages, if it is not more than guest memory.
pub(super) fn target_pages(mib: u32, memory_mib: u64) -> Result<u32, BalloonError> {
    let too_large = BalloonError::TooLarge { mib, memory_mib };
    if u64::from(mib) > memory_mib {
        return Err(too_large);
    }
    mib.checked_mul(PAGES_PER_MIB).ok_or(too_large)
}
