//! Accounting of packets that are lost between the driver and the backend.

use std::io;
use std::sync::Arc;

use super::backend::NetBackend;
use super::shared::Shared;
use crate::device_log::Repeat;
use crate::virtio::DriverLink;

/// Why a packet was dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum DropReason {
    #[error("the driver sent one of {0} bytes, header included, which is not a packet")]
    NoPacket(usize),
    #[error("one of {0} bytes, header included, does not fit the driver's receive buffers")]
    NoRoom(usize),
    #[error("{0}")]
    Read(io::Error),
    #[error("{0}")]
    Write(io::Error),
}

/// Counts dropped packets. The first one is logged, and then one from time to time, as a cause that drops one
/// packet often drops many. Their number is logged at the end.
pub(super) struct DroppedPackets {
    link: Arc<DriverLink>,
    backend: Arc<dyn NetBackend>,
    shared: Arc<Shared>,
    count: u64,
    /// When a drop because of the driver's packets or buffers was last logged.
    driver_warning: Repeat,
    /// When a drop because of the backend was last logged.
    backend_warning: Repeat,
}

impl DroppedPackets {
    pub(super) fn new(
        link: Arc<DriverLink>,
        backend: Arc<dyn NetBackend>,
        shared: Arc<Shared>,
    ) -> DroppedPackets {
        DroppedPackets {
            link,
            backend,
            shared,
            count: 0,
            driver_warning: Repeat::default(),
            backend_warning: Repeat::default(),
        }
    }

    pub(super) fn record(&mut self, reason: &DropReason) {
        self.count += 1;
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
        let DroppedPackets { link, backend, .. } = self;
        match reason {
            DropReason::NoPacket(_) | DropReason::NoRoom(_) => {
                if self.driver_warning.is_due() {
                    link.warn(format_args!(
                        "a packet to or from {} was dropped: {reason}",
                        backend.label()
                    ));
                }
            }
            DropReason::Read(error) | DropReason::Write(error) => {
                if !self.backend_warning.is_due() {
                    return;
                }
                match backend.remedy(error) {
                    Some(remedy) => {
                        link.warn_of_host(format_args!("a packet was dropped, {remedy}"));
                    }
                    None => link.warn_of_host(format_args!(
                        "a packet to or from {} was dropped: {error}",
                        backend.label()
                    )),
                }
            }
        }
    }
}

impl Drop for DroppedPackets {
    fn drop(&mut self) {
        if self.count > 1 {
            let DroppedPackets {
                link,
                backend,
                count,
                ..
            } = self;
            link.warn(format_args!(
                "{count} packets to or from {} were dropped",
                backend.label()
            ));
        }
    }
}
