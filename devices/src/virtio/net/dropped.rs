//! The account of packets that were lost between the driver and the tap.

use std::io;
use std::sync::Arc;

use crate::virtio::VirtioInterrupt;

/// Why a packet was dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum DropReason {
    #[error("the driver sent one of {0} bytes, header included, which is no packet")]
    NoPacket(usize),
    #[error("one of {0} bytes, header included, does not fit the driver's receive buffers")]
    NoRoom(usize),
    #[error("{0}")]
    Tap(io::Error),
}

/// Counts the packets that were dropped. The log hears of the first, as what drops one often drops
/// many, and at the end of their number.
pub(super) struct DroppedPackets {
    interrupt: Arc<VirtioInterrupt>,
    tap: String,
    count: u64,
}

impl DroppedPackets {
    pub(super) fn new(interrupt: Arc<VirtioInterrupt>, tap: &str) -> DroppedPackets {
        DroppedPackets {
            interrupt,
            tap: tap.to_string(),
            count: 0,
        }
    }

    pub(super) fn record(&mut self, reason: &DropReason) {
        if self.count == 0 {
            let DroppedPackets { interrupt, tap, .. } = self;
            match reason {
                // So says a tap that is down.
                DropReason::Tap(error) if error.raw_os_error() == Some(libc::EIO) => {
                    interrupt.warn(format_args!(
                        "a packet was dropped, as tap '{tap}' is down; as root \
                         'ip link set {tap} up' brings it up"
                    ));
                }
                reason => interrupt.warn(format_args!(
                    "a packet to or from tap '{tap}' was dropped: {reason}"
                )),
            }
        }
        self.count += 1;
    }
}

impl Drop for DroppedPackets {
    fn drop(&mut self) {
        if self.count > 1 {
            let DroppedPackets {
                interrupt,
                tap,
                count,
            } = self;
            interrupt.warn(format_args!(
                "{count} packets to or from tap '{tap}' were dropped"
            ));
        }
    }
}
