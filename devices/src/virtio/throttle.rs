//! Enforcement of a device's limits.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::lock::lock;
use crate::rate_limiter::{Limits, RateLimit, RateLimiter};

/// Enforces the limits of a device, or of one direction of its traffic.
///
/// The worker asks before each operation, and the owner of the machine may change the limits at any time. A
/// driver does not get back what it has used by resetting the device. If the worker must wait, its timer
/// expires when it may go on, or when the limits are changed.
pub(super) struct Throttle {
    /// Whether there are limits: if there are none, nothing else is read.
    is_limited: AtomicBool,
    state: Mutex<State>,
}

struct State {
    bytes: Option<RateLimiter>,
    operations: Option<RateLimiter>,
    /// Expires when more may be done.
    timer: TimerFd,
}

impl AsRawFd for Throttle {
    /// Returns the timer, which is readable once more may be done after it was not allowed.
    fn as_raw_fd(&self) -> RawFd {
        self.state().timer.as_raw_fd()
    }
}

impl Throttle {
    /// # Errors
    /// If the host cannot create a timer.
    pub(super) fn new(limits: &Limits) -> io::Result<Throttle> {
        let mut state = State {
            bytes: None,
            operations: None,
            timer: TimerFd::new()?,
        };
        Ok(Throttle {
            is_limited: AtomicBool::new(state.set(limits)),
            state: Mutex::new(state),
        })
    }

    /// Sets new limits. An unchanged limit keeps its fill level.
    ///
    /// # Errors
    /// If the host refuses to set the timer. The limits are set all the same, and a waiting worker learns of
    /// them at the end of its wait.
    pub(super) fn set(&self, limits: &Limits) -> io::Result<()> {
        let mut state = self.state();
        let is_limited = state.set(limits);
        self.is_limited.store(is_limited, Ordering::Release);
        // As soon as possible: zero would stop the timer.
        Ok(state.timer.reset(Duration::from_nanos(1), None)?)
    }

    /// Returns the limits.
    pub(super) fn limits(&self) -> Limits {
        let state = self.state();
        let limit = |limiter: &Option<RateLimiter>| limiter.as_ref().map(RateLimiter::limit);
        Limits {
            bytes: limit(&state.bytes),
            operations: limit(&state.operations),
        }
    }

    /// Whether there is any limit.
    pub(super) fn is_limited(&self) -> bool {
        self.is_limited.load(Ordering::Acquire)
    }

    /// Whether another operation may be begun. If not, the timer expires when it may.
    ///
    /// # Errors
    /// If the host refuses to set the timer.
    pub(super) fn allows_more(&self) -> io::Result<bool> {
        if !self.is_limited() {
            return Ok(true);
        }
        let mut state = self.state();
        let now = Instant::now();
        let limiters = state.bytes.iter().chain(&state.operations);
        let wait = limiters.map(|limiter| limiter.wait_time(now)).max();
        match wait {
            Some(wait) if !wait.is_zero() => {
                state.timer.reset(wait, None)?;
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Takes account of operations that were begun.
    pub(super) fn count(&self, operations: u64, bytes: u64) {
        if !self.is_limited() {
            return;
        }
        let mut state = self.state();
        let now = Instant::now();
        if let Some(limiter) = &mut state.operations {
            limiter.take(operations, now);
        }
        if let Some(limiter) = &mut state.bytes {
            limiter.take(bytes, now);
        }
    }

    /// Clears the expiry of the timer. It is not read, as it may have been set again since, and reading would
    /// then wait.
    ///
    /// # Errors
    /// If the host refuses to set the timer.
    pub(super) fn clear(&self) -> io::Result<()> {
        Ok(self.state().timer.clear()?)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Sets new limits, and returns whether there are any.
    fn set(&mut self, limits: &Limits) -> bool {
        let now = Instant::now();
        let renew = |place: &mut Option<RateLimiter>, limit: Option<RateLimit>| {
            if place.as_ref().map(RateLimiter::limit) != limit {
                *place = limit.map(|limit| RateLimiter::new(limit, now));
            }
        };
        renew(&mut self.bytes, limits.bytes);
        renew(&mut self.operations, limits.operations);
        let limits = |limiter: &RateLimiter| limiter.limit().limits();
        self.bytes.iter().chain(&self.operations).any(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::BorrowedFd;

    const ONE_A_SECOND: RateLimit = RateLimit {
        size: 1,
        refill_time: Duration::from_secs(1),
        one_time_burst: 0,
    };

    fn limited() -> Throttle {
        let limits = Limits {
            operations: Some(ONE_A_SECOND),
            ..Limits::default()
        };
        let throttle = Throttle::new(&limits).unwrap();
        throttle.count(100, 0);
        throttle
    }

    fn is_ready(throttle: &Throttle) -> bool {
        // SAFETY: the throttle has it open.
        let timer = unsafe { BorrowedFd::borrow_raw(throttle.as_raw_fd()) };
        let mut events = [PollFd::new(timer, PollFlags::POLLIN)];
        poll(&mut events, PollTimeout::from(10_u8)).unwrap() == 1
    }

    #[test]
    fn a_timer_that_was_set_anew_is_not_waited_for() {
        let throttle = limited();
        assert!(!throttle.allows_more().unwrap());
        let start = Instant::now();
        throttle.clear().unwrap();
        assert!(start.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn limits_that_are_changed_end_the_wait() {
        let throttle = limited();
        assert!(!throttle.allows_more().unwrap());
        assert!(!is_ready(&throttle));
        throttle.set(&Limits::default()).unwrap();
        assert!(is_ready(&throttle));
        throttle.clear().unwrap();
        assert!(!is_ready(&throttle));
        assert!(throttle.allows_more().unwrap());
        assert_eq!(throttle.limits(), Limits::default());
    }

    #[test]
    fn a_limit_that_stays_goes_on_where_it_is() {
        let throttle = limited();
        let limits = Limits {
            bytes: Some(ONE_A_SECOND),
            ..throttle.limits()
        };
        throttle.set(&limits).unwrap();
        assert!(!throttle.allows_more().unwrap());
    }
}
