//! Limits on what a driver may ask for at once.

pub(super) const QUEUE_SIZE: u16 = 256;
/// Most data segments of a request: the descriptors of a queue without those for the header and the status.
pub(super) const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Length of the serial number that a driver can ask for, in bytes.
pub const ID_SIZE: usize = 20;
/// Most sectors of one discard or write-zeroes request: 64 MiB. The host may have to write zeroes, or free
/// each block of a fragmented file, and the event loop waits for that.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 17;
/// Most ranges of one such request.
pub(super) const MAX_RANGES: u32 = 1;
/// Most bytes that one request reads or writes: many times what drivers ask for, and as much as the event
/// loop may be held up by. Otherwise overlapping descriptors could ask for a copy of the whole disk.
pub(super) const MAX_DATA_SIZE: u64 = 64 << 20;
