//! The interrupt of a virtio device and the state its driver reads when it receives one.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::{fmt, io};

use crate::InterruptLine;
use crate::device_log::DeviceLog;
use crate::notice::DeviceNotice;

/// `InterruptStatus` bit 0: the device used a buffer (section 4.2.2).
const USED_BUFFER: u32 = 1 << 0;
/// `InterruptStatus` bit 1: the configuration changed.
const CONFIGURATION_CHANGE: u32 = 1 << 1;

/// Shared by the transport, where the driver reads and acknowledges, and the worker, which
/// notifies. All of it is atomic: neither side waits for the other.
pub struct VirtioInterrupt {
    log: DeviceLog,
    line: Box<dyn InterruptLine>,
    status: AtomicU32,
    needs_reset: AtomicBool,
}

impl VirtioInterrupt {
    /// The interrupt of the device that logs to `log`, raised by `line`.
    pub fn new(log: impl Into<DeviceLog>, line: Box<dyn InterruptLine>) -> VirtioInterrupt {
        VirtioInterrupt {
            log: log.into(),
            line,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
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

    /// Puts the device into `DEVICE_NEEDS_RESET` (section 2.1.2) because of `reason`, something that its
    /// driver did, which is logged.
    pub fn need_reset(&self, reason: &dyn fmt::Display) {
        if self.begin_to_need_reset() {
            self.notify_owner(DeviceNotice::NeedsReset { reason });
            self.warn(format_args!("its driver must reset it: {reason}"));
        }
    }

    /// As [`VirtioInterrupt::need_reset`], if it is the host that fails.
    pub fn need_reset_by_host(&self, reason: &dyn fmt::Display) {
        if self.begin_to_need_reset() {
            self.notify_owner(DeviceNotice::NeedsReset { reason });
            self.warn_of_host(format_args!(
                "the host fails it, and its driver must reset it: {reason}"
            ));
        }
    }

    /// `true` if it does not need a reset already.
    fn begin_to_need_reset(&self) -> bool {
        let begins = !self.needs_reset.swap(true, Ordering::AcqRel);
        if begins {
            self.raise(CONFIGURATION_CHANGE);
        }
        begins
    }

    /// Logs a warning about what the guest does, within the bounds of [`DeviceLog`].
    pub fn warn(&self, message: fmt::Arguments<'_>) {
        self.log.warn_of_guest(message);
    }

    /// Logs a warning about what fails on the host, within the bounds of [`DeviceLog`].
    pub fn warn_of_host(&self, message: fmt::Arguments<'_>) {
        self.log.warn_of_host(message);
    }

    /// Tells the owner of the machine what has happened to the device.
    pub(super) fn notify_owner(&self, notice: DeviceNotice<'_>) {
        self.log.notify(notice);
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The device's name in the log.
    pub fn name(&self) -> &str {
        self.log.name()
    }

    /// An error that says which device `error` is of.
    pub(super) fn with_name(&self, error: &dyn fmt::Display) -> io::Error {
        io::Error::other(format!("{}: {error}", self.name()))
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

    /// Takes over the state that another had.
    pub(super) fn restore(&self, status: u32, needs_reset: bool) {
        self.status.store(status, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::AcqRel);
        if let Err(error) = self.line.trigger() {
            self.warn_of_host(format_args!("cannot raise an interrupt: {error}"));
        }
    }
}
