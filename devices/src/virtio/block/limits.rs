//! Limits of what a block device does in a time.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use vmm_sys_util::timerfd::TimerFd;

use super::BlockOptions;
use crate::rate_limiter::{RateLimit, RateLimiter};

/// The limits of a device.
pub(super) struct Limits {
    bytes: Option<RateLimiter>,
    operations: Option<RateLimiter>,
    /// Ends when more may be done.
    timer: TimerFd,
}

impl AsRawFd for Limits {
    /// Readable once more may be done, if it was not allowed before.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

impl Limits {
    /// The limits that `options` give, if any.
    pub(super) fn new(options: &BlockOptions) -> io::Result<Option<Limits>> {
        if options.bytes.is_none() && options.operations.is_none() {
            return Ok(None);
        }
        let now = Instant::now();
        let limiter = |limit: Option<RateLimit>| limit.map(|limit| RateLimiter::new(limit, now));
        Ok(Some(Limits {
            bytes: limiter(options.bytes),
            operations: limiter(options.operations),
            timer: TimerFd::new()?,
        }))
    }

    fn limiters(&self) -> impl Iterator<Item = &RateLimiter> {
        self.bytes.iter().chain(&self.operations)
    }

    /// Whether another request may be begun. If not, the timer ends when it may.
    pub(super) fn allow(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        let wait = self.limiters().map(|limiter| limiter.wait_time(now)).max();
        match wait {
            Some(wait) if !wait.is_zero() => {
                self.timer.reset(wait, None)?;
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Counts a request for `bytes` of data.
    pub(super) fn count(&mut self, bytes: u64) {
        let now = Instant::now();
        if let Some(limiter) = &mut self.operations {
            limiter.take(1, now);
        }
        if let Some(limiter) = &mut self.bytes {
            limiter.take(bytes, now);
        }
    }

    /// Consumes the end of the time that more was not allowed. It may have been set anew since, so it is
    /// not read, which would wait.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        Ok(self.timer.clear()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_timer_that_was_set_anew_is_not_waited_for() {
        let options = BlockOptions {
            operations: Some(RateLimit::per_second(1, Some(1))),
            ..BlockOptions::default()
        };
        let mut limits = Limits::new(&options).unwrap().unwrap();
        for _ in 0..100 {
            limits.count(0);
        }
        assert!(!limits.allow().unwrap());
        let start = Instant::now();
        limits.clear().unwrap();
        assert!(start.elapsed() < Duration::from_secs(50));
    }
}
