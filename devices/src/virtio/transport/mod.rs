//! How the driver of a virtio device reaches it: the state that all transports have in common, and
//! the registers of each.

mod core;
pub mod mmio;
