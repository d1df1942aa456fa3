//! Offsets in the configuration space (section 5.5.4).

pub const NUM_PAGES: usize = 0;
pub const ACTUAL: usize = 4;
pub const SIZE: usize = 8;
/// Present only with free page hinting.
pub const HINTING_COMMAND: usize = 8;
pub const SIZE_WITH_HINTING: usize = 12;
