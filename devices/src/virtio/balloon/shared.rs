//! State that the parts of a balloon share.

use std::io;
use std::num::NonZeroU32;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::hinting::Hinting;
use super::metrics::BalloonMetrics;
use super::statistics::GuestStatistics;
use crate::virtio::ConfigSpace;

/// The times at which the driver is asked for statistics.
pub(super) struct Schedule {
    /// Expires when it is time to ask. It is never read: setting it again clears the expiry.
    pub(super) timer: TimerFd,
    pub(super) interval: NonZeroU32,
}

impl Schedule {
    /// Has the timer expire in `time` from now.
    pub(super) fn set_timer(&mut self, time: Duration) -> io::Result<()> {
        Ok(self.timer.reset(time, None)?)
    }

    /// Has the timer expire an interval from now.
    pub(super) fn restart(&mut self) -> io::Result<()> {
        self.set_timer(Duration::from_secs(self.interval.get().into()))
    }
}

/// State that front, worker and handles share.
pub(super) struct Shared {
    pub(super) config: ConfigSpace,
    /// The driver's latest statistics.
    pub(super) statistics: Mutex<GuestStatistics>,
    /// `None` without statistics.
    pub(super) schedule: Option<Mutex<Schedule>>,
    pub(super) hinting: Mutex<Hinting>,
    /// Whether a driver has accepted the device and not reset it since.
    pub(super) has_driver: AtomicBool,
    pub(super) metrics: Arc<BalloonMetrics>,
}
