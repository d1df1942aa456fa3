//! What a machine counts while it runs.

use std::sync::Arc;

use serde::Serialize;

pub use bantam_devices::serial::SerialMetrics;

pub use crate::vcpu::VcpuMetrics;

/// The counters of a machine. They are read where they are, at any time, without stopping anything, and
/// serialize as their totals since the machine was started.
#[derive(Debug, Serialize)]
pub struct MachineMetrics {
    /// Of each vCPU.
    pub vcpus: Vec<Arc<VcpuMetrics>>,
    /// Of the serial port.
    pub uart: Arc<SerialMetrics>,
}
