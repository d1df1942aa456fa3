//! The interrupt of a virtio device and the state its driver reads when it receives one.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::InterruptLine;

/// `InterruptStatus` bit 0: the device used a buffer (section 4.2.2).
const USED_BUFFER: u32 = 1 << 0;
/// `InterruptStatus` bit 1: the configuration changed.
const CONFIGURATION_CHANGE: u32 = 1 << 1;
/// Lines that a device may log: a guest can cause them without end.
const MAX_LOG_LINES: u32 = 20;

/// Shared by the transport, where the driver reads and acknowledges, and the worker, which
/// notifies. All of it is atomic: neither side waits for the other.
pub struct VirtioInterrupt {
    name: String,
    line: Box<dyn InterruptLine>,
    status: AtomicU32,
    needs_reset: AtomicBool,
    log_lines: AtomicU32,
}

impl VirtioInterrupt {
    /// The interrupt of the device called `name` in the log, raised by `line`.
    pub fn new(name: String, line: Box<dyn InterruptLine>) -> VirtioInterrupt {
        VirtioInterrupt {
            name,
            line,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            log_lines: AtomicU32::new(0),
        }
    }

    /// Tells the driver that there are used buffers.
    pub fn notify_used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn notify_configuration_change(&self) {
        self.raise(CONFIGURATION_CHANGE);
    }

    /// Puts the device into `DEVICE_NEEDS_RESET` (section 2.1.2) because of `reason`, which is
    /// logged.
    pub fn need_reset(&self, reason: &dyn fmt::Display) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.warn(format_args!("its driver must reset it: {reason}"));
            self.raise(CONFIGURATION_CHANGE);
        }
    }

    /// Logs a warning about the device, until it has logged as much as one may.
    pub fn warn(&self, message: fmt::Arguments<'_>) {
        let name = &self.name;
        let count = |lines| (lines <= MAX_LOG_LINES).then_some(lines + 1);
        match self
            .log_lines
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count)
        {
            Ok(..MAX_LOG_LINES) => tracing::warn!("{name}: {message}"),
            Ok(_) => tracing::warn!("{name}: what else there is to say of it is not logged"),
            Err(_) => {}
        }
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The device's name in the log.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        if let Err(error) = self.line.trigger() {
            self.warn(format_args!("cannot raise an interrupt: {error}"));
        }
    }
}
