//! The counters of a virtio device of any type.

use std::sync::Arc;

use serde::Serialize;

use super::balloon::BalloonMetrics;
use super::block::BlockMetrics;
use super::console::ConsoleMetrics;
use super::net::NetMetrics;
use super::rng::EntropyMetrics;
use super::vsock::VsockMetrics;

/// The counters of one device. They serialize as their totals, beside the `kind` of the device.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum DeviceMetrics {
    /// Of a disk.
    Block(Arc<BlockMetrics>),
    /// Of a network device.
    Net(Arc<NetMetrics>),
    /// Of the socket device.
    Vsock(Arc<VsockMetrics>),
    /// Of a console, or of all channels of a device together.
    Console(Arc<ConsoleMetrics>),
    /// Of the entropy device.
    Entropy(Arc<EntropyMetrics>),
    /// Of a balloon.
    Balloon(Arc<BalloonMetrics>),
}
