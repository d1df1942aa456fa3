//! The counters of a machine.

use std::collections::BTreeMap;
use std::sync::Arc;

use bantam_devices::serial::SerialMetrics;
use bantam_devices::virtio::owner::DeviceMetrics;
use bantam_metadata::MetadataMetrics;
use bantam_metrics::Counter;
use serde::Serialize;

use crate::config::DeviceName;

/// The counters of a machine. They can be read in place at any time, without stopping anything, and
/// serialize as totals since the machine was started.
#[derive(Debug, Serialize)]
pub struct MachineMetrics {
    /// Counters of each vCPU.
    pub vcpus: Vec<Arc<VcpuMetrics>>,
    /// Counters of the serial port.
    pub uart: Arc<SerialMetrics>,
    /// Counters of each virtio device.
    pub devices: BTreeMap<DeviceName, DeviceMetrics>,
    /// Counters of the metadata service, if there is one.
    pub mmds: Option<Arc<MetadataMetrics>>,
}

/// Counts why a vCPU has left the guest, and what could not be done for it.
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
