//! The memory of a guest: how the host maps it, how the monitor accesses it, and a log of the pages
//! that the monitor writes.
//!
//! The guest may change its memory at any time, so this crate hands out no reference to its bytes:
//! [`GuestBuffers`], [`GuestRange`], the traits of `vm-memory` and the host's kernel copy them.
//! Every writer marks the pages in the dirty log ([`GuestMemory::start_dirty_log`]) after the
//! write.

mod backing;
mod buffers;
mod content;
mod copy;
mod dirty_log;
mod guest_memory;
mod layers;
mod page_set;
mod range;
mod sharing;
mod userfault;

pub use backing::{Backing, MapError};
pub use buffers::{BufferError, FilePosition, GuestBuffers, MAX_VECTORS_PER_CALL};
pub use content::open_page_map;
pub use guest_memory::{GuestMemory, Region};
pub use layers::Layer;
pub use page_set::PageSet;
pub use range::{GuestRange, Word};
pub use sharing::{Sharing, seal};
pub use userfault::{Filled, MemoryEvent, MissingPages, UserfaultError};

/// Size in bytes of a page of the guest, the unit of the dirty log.
pub const PAGE_SIZE: usize = 4096;
