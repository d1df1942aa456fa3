//! Turns of work in one direction: how long they are, and why they end.

use crate::tap::PACKET_HEADER_SIZE;

/// Most packets handled before other devices get their turn.
pub(super) const MAX_PACKETS_PER_TURN: usize = 256;
/// The driver is notified after this many packets, so that it has work while the turn goes on.
pub(super) const PACKETS_PER_INTERRUPT: usize = 64;

/// Most bytes before the payload of a frame: an Ethernet header with a VLAN tag.
pub(super) const MAX_FRAME_HEADER_SIZE: usize = 14 + 4;
/// Largest packet in bytes: one that is still to be segmented, with its headers.
pub(super) const MAX_PACKET_SIZE: usize = PACKET_HEADER_SIZE + MAX_FRAME_HEADER_SIZE + (64 << 10);

/// Why one direction of the traffic has halted, and so when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halt {
    /// The driver has nothing more in its queue; it goes on when the driver rings the doorbell.
    Driver,
    /// The backend has no more packets, or takes no more; it goes on when the backend becomes ready.
    Backend,
    /// A limit is reached; it goes on when the timer expires.
    Limit,
    /// The backend is gone.
    BackendGone,
}
