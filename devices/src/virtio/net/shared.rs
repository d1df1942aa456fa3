//! State that the parts of a network device share.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::NetMetrics;
use crate::rate_limiter::Limits;
use crate::virtio::Throttle;

/// Limits on a card's traffic. Operations are packets; bytes are those of Ethernet frames, in the size in
/// which host and guest exchange them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetLimits {
    /// Limits on what the guest receives. The rest waits in the tap, which drops packets that it has no room
    /// for.
    pub receive: Limits,
    /// Limits on what the guest transmits. The rest waits in the guest's queues.
    pub transmit: Limits,
}

/// The direction of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Receive,
    Transmit,
}

/// State that the front of a network device, its worker and the owner of the machine share.
pub(super) struct Shared {
    pub(super) receive: Throttle,
    pub(super) transmit: Throttle,
    pub(super) metrics: Arc<NetMetrics>,
}

impl Shared {
    /// # Errors
    /// If the host cannot create timers for the limits.
    pub(super) fn new(limits: &NetLimits) -> io::Result<Shared> {
        Ok(Shared {
            receive: Throttle::new(&limits.receive)?,
            transmit: Throttle::new(&limits.transmit)?,
            metrics: Arc::default(),
        })
    }

    pub(super) fn throttle(&self, direction: Direction) -> &Throttle {
        match direction {
            Direction::Receive => &self.receive,
            Direction::Transmit => &self.transmit,
        }
    }
}
