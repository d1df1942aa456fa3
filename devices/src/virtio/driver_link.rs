//! The link from a device to its driver: it notifies the driver, asks it for a reset, and logs complaints
//! about it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fmt, io};

use super::QueueSet;
use crate::activity::Activity;
use crate::device_log::DeviceLog;
use crate::notice::DeviceNotice;

/// Notifies the driver of a device in the way that the device's transport does (section 2.3).
///
/// Workers call it for each batch of buffers, on the thread of their event loop, so it does not wait.
pub trait Notify: Send + Sync {
    /// Tells the driver that there are used buffers in `queues`, which is not empty.
    ///
    /// # Errors
    /// If the host refuses to deliver an interrupt.
    fn used_buffers(&self, queues: QueueSet) -> io::Result<()>;

    /// Tells the driver that the configuration space or the device status has changed.
    ///
    /// # Errors
    /// If the host refuses to deliver an interrupt.
    fn configuration_change(&self) -> io::Result<()>;
}

/// Connects a device to its driver. The transport, the worker and the handles of the machine's owner share
/// it. None of its methods waits.
pub struct DriverLink {
    log: DeviceLog,
    notify: Arc<dyn Notify>,
    needs_reset: AtomicBool,
    activity: Activity,
}

impl DriverLink {
    /// Makes the link of a device that logs to `log`, to the driver that `notify` notifies.
    pub fn new(log: impl Into<DeviceLog>, notify: Arc<dyn Notify>) -> DriverLink {
        DriverLink {
            log: log.into(),
            notify,
            needs_reset: AtomicBool::new(false),
            activity: Activity::default(),
        }
    }

    /// Tells the driver that there are used buffers in `queue`.
    pub fn notify_used_buffer(&self, queue: u16) {
        self.notify_used_buffers(QueueSet::of(queue));
    }

    /// Tells the driver that there are used buffers in each of `queues`. If the set is empty, does nothing.
    pub fn notify_used_buffers(&self, queues: QueueSet) {
        if !queues.is_empty() {
            self.check(self.notify.used_buffers(queues));
        }
    }

    /// Tells the driver that the configuration space has changed.
    pub fn notify_configuration_change(&self) {
        self.check(self.notify.configuration_change());
    }

    fn check(&self, notified: io::Result<()>) {
        if let Err(error) = notified {
            self.warn_of_host(format_args!("cannot raise an interrupt: {error}"));
        }
    }

    /// Puts the device into `DEVICE_NEEDS_RESET` (section 2.1.2) because of `reason`, a fault of its driver,
    /// and logs it.
    pub fn need_reset(&self, reason: &dyn fmt::Display) {
        if self.begin_to_need_reset() {
            self.notify_owner(DeviceNotice::NeedsReset { reason });
            self.warn(format_args!("its driver must reset it: {reason}"));
        }
    }

    /// Puts the device into `DEVICE_NEEDS_RESET` because of `reason`, a failure of the host, and logs it.
    pub fn need_reset_by_host(&self, reason: &dyn fmt::Display) {
        if self.begin_to_need_reset() {
            self.notify_owner(DeviceNotice::NeedsReset { reason });
            self.warn_of_host(format_args!(
                "the host fails it, and its driver must reset it: {reason}"
            ));
        }
    }

    /// Marks the device as needing a reset; `true` if it was not marked already.
    fn begin_to_need_reset(&self) -> bool {
        let begins = !self.needs_reset.swap(true, Ordering::AcqRel);
        if begins {
            self.notify_configuration_change();
        }
        begins
    }

    /// Logs a warning about a fault of the guest, within the bounds of [`DeviceLog`].
    pub fn warn(&self, message: fmt::Arguments<'_>) {
        self.log.warn_of_guest(message);
    }

    /// Logs a warning about a failure of the host, within the bounds of [`DeviceLog`].
    pub fn warn_of_host(&self, message: fmt::Arguments<'_>) {
        self.log.warn_of_host(message);
    }

    /// Passes a notice about the device to the owner of the machine.
    pub(super) fn notify_owner(&self, notice: DeviceNotice<'_>) {
        self.log.notify(notice);
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Returns what shows whether a thread works for the device.
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Returns the device's name in the log.
    pub fn name(&self) -> &str {
        self.log.name()
    }

    /// Returns `error` with the device's name.
    pub(super) fn with_name(&self, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("{}: {error}", self.name()))
    }

    /// Sets whether the device waits for a reset, without telling the driver.
    pub(super) fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }
}
