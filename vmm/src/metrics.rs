//! What a machine counts while it runs.

use std::sync::Arc;

use bantam_devices::serial::SerialMetrics;
use bantam_devices::virtio::balloon::BalloonMetrics;
use bantam_devices::virtio::block::BlockMetrics;
use bantam_devices::virtio::console::ConsoleMetrics;
use bantam_devices::virtio::net::NetMetrics;
use bantam_devices::virtio::rng::EntropyMetrics;
use bantam_devices::virtio::vsock::VsockMetrics;
use bantam_metadata::MetadataMetrics;
use bantam_metrics::Counter;
use serde::Serialize;

/// The counters of a machine. They are read where they are, at any time, without stopping anything, and
/// serialize as their totals since the machine was started.
#[derive(Debug, Serialize)]
pub struct MachineMetrics {
    /// Of each vCPU.
    pub vcpus: Vec<Arc<VcpuMetrics>>,
    /// Of the serial port.
    pub uart: Arc<SerialMetrics>,
    /// Of each disk, as in the configuration.
    pub disks: Vec<Arc<BlockMetrics>>,
    /// Of each network device, as in the configuration.
    pub networks: Vec<Arc<NetMetrics>>,
    /// Of the socket device, if there is one.
    pub vsock: Option<Arc<VsockMetrics>>,
    /// Of the virtio console, if there is one.
    pub console: Option<Arc<ConsoleMetrics>>,
    /// Of all channels together, if there are any.
    pub channels: Option<Arc<ConsoleMetrics>>,
    /// Of the entropy device, if there is one.
    pub entropy: Option<Arc<EntropyMetrics>>,
    /// Of the balloon, if there is one.
    pub balloon: Option<Arc<BalloonMetrics>>,
    /// Of the metadata service, if there is one.
    pub mmds: Option<Arc<MetadataMetrics>>,
}

/// What a vCPU has left the guest for, and what could not be done for it.
#[derive(Debug, Default, Serialize)]
pub struct VcpuMetrics {
    /// Reads of I/O ports.
    pub exit_io_in: Counter,
    /// Writes of I/O ports.
    pub exit_io_out: Counter,
    /// Reads of device registers in memory.
    pub exit_mmio_read: Counter,
    /// Writes of device registers in memory.
    pub exit_mmio_write: Counter,
    /// Failures that ended the machine.
    pub failures: Counter,
}
