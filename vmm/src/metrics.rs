//! What a machine counts while it runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use bantam_devices::serial::SerialMetrics;
use bantam_devices::virtio::owner::DeviceMetrics;
use bantam_metadata::MetadataMetrics;
use bantam_metrics::Counter;
use serde::Serialize;

use crate::config::DeviceName;

/// The counters of a machine. They are read where they are, at any time, without stopping anything, and
/// serialize as their totals since the machine was started.
#[derive(Debug, Serialize)]
pub struct MachineMetrics {
    /// Of each vCPU.
    pub vcpus: Vec<Arc<VcpuMetrics>>,
    /// Of the serial port.
    pub uart: Arc<SerialMetrics>,
    /// Of each virtio device.
    pub devices: BTreeMap<DeviceName, DeviceMetrics>,
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
