//! Transports, through which the driver of a virtio device reaches it: the state that all of them share, and
//! the registers of each.

mod core;
pub mod mmio;
