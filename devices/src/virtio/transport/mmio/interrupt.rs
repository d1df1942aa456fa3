//! The interrupt of a device behind this transport: a line, and the register that gives its cause.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::InterruptLine;
use crate::device_log::DeviceLog;
use crate::virtio::{DriverLink, Notify, QueueSet};

/// `InterruptStatus` bit 0: the device used a buffer (section 4.2.2).
const USED_BUFFER: u32 = 1 << 0;
/// `InterruptStatus` bit 1: the configuration changed.
const CONFIGURATION_CHANGE: u32 = 1 << 1;

/// The link of a device to its driver, with the interrupt of [`MmioTransport`](super::MmioTransport). It is
/// made before the device, whose handles share it.
pub struct MmioLink {
    pub(super) driver: Arc<DriverLink>,
    pub(super) interrupt: Arc<MmioInterrupt>,
}

impl MmioLink {
    /// Makes the link of a device that logs to `log`. Its transport raises interrupts through `line`.
    pub fn new(log: impl Into<DeviceLog>, line: Box<dyn InterruptLine>) -> MmioLink {
        let interrupt = Arc::new(MmioInterrupt {
            line,
            status: AtomicU32::new(0),
        });
        MmioLink {
            driver: Arc::new(DriverLink::new(log, interrupt.clone())),
            interrupt,
        }
    }

    /// Returns the part of the link that the device and its handles use.
    pub fn driver(&self) -> Arc<DriverLink> {
        self.driver.clone()
    }
}

/// The line and the `InterruptStatus` register. The driver reads and acknowledges it on a vCPU's thread
/// while workers raise interrupts, and neither waits for the other.
pub(super) struct MmioInterrupt {
    line: Box<dyn InterruptLine>,
    status: AtomicU32,
}

impl MmioInterrupt {
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
    }

    /// Takes over saved bits of the register; `false` if the register has no such bits.
    pub(super) fn restore(&self, status: u32) -> bool {
        let is_valid = status & !(USED_BUFFER | CONFIGURATION_CHANGE) == 0;
        if is_valid {
            self.status.store(status, Ordering::Release);
        }
        is_valid
    }

    fn raise(&self, bit: u32) -> io::Result<()> {
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.line.trigger()
    }
}

impl Notify for MmioInterrupt {
    /// All queues share the line, so one edge is for all of them.
    fn used_buffers(&self, _queues: QueueSet) -> io::Result<()> {
        self.raise(USED_BUFFER)
    }

    fn configuration_change(&self) -> io::Result<()> {
        self.raise(CONFIGURATION_CHANGE)
    }
}
