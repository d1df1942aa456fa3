//! The account of packets that were lost between the driver and the tap.

use std::io;
use std::sync::Arc;

use super::owner::Shared;
use crate::virtio::VirtioInterrupt;

/// Why a packet was dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum DropReason {
    #[error("the driver sent one of {0} bytes, header included, which is no packet")]
    NoPacket(usize),
    #[error("one of {0} bytes, header included, does not fit the driver's receive buffers")]
    NoRoom(usize),
    #[error("{0}")]
    Read(io::Error),
    #[error("{0}")]
    Write(io::Error),
}

/// Counts the packets that were dropped. The log hears of the first, as what drops one often drops
/// many, and at the end of their number.
pub(super) struct DroppedPackets {
    interrupt: Arc<VirtioInterrupt>,
    tap: String,
    shared: Arc<Shared>,
    count: u64,
}

impl DroppedPackets {
    pub(super) fn new(
        interrupt: Arc<VirtioInterrupt>,
        tap: &str,
        shared: Arc<Shared>,
    ) -> DroppedPackets {
        DroppedPackets {
            interrupt,
            tap: tap.to_string(),
            shared,
            count: 0,
        }
    }

    pub(super) fn record(&mut self, reason: &DropReason) {
        let metrics = &self.shared.metrics;
        match reason {
            DropReason::NoPacket(_) => metrics.tx_malformed_frames.add(1),
            DropReason::NoRoom(_) => metrics.rx_fails.add(1),
            DropReason::Read(_) => {
                metrics.tap_read_fails.add(1);
                metrics.rx_fails.add(1);
            }
            DropReason::Write(_) => {
                metrics.tap_write_fails.add(1);
                metrics.tx_fails.add(1);
            }
        }
        if self.count == 0 {
            let DroppedPackets { interrupt, tap, .. } = self;
            match reason {
                // So says a tap that is down.
                DropReason::Read(error) | DropReason::Write(error)
                    if error.raw_os_error() == Some(libc::EIO) =>
                {
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
                ..
            } = self;
            interrupt.warn(format_args!(
                "{count} packets to or from tap '{tap}' were dropped"
            ));
        }
    }
}
