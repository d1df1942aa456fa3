//! When to try to reach a backend's other side again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// The first wait before an attempt, and the longest. Each is twice as long as the one before.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LAST_WAIT: Duration = Duration::from_secs(2);

/// The times of attempts to reach a backend's other side again.
pub(super) struct Reconnection {
    timer: TimerFd,
    wait: Duration,
    /// When an attempt last succeeded.
    succeeded: Option<Instant>,
}

impl Reconnection {
    /// # Errors
    /// If the host cannot create a timer.
    pub(super) fn new() -> io::Result<Reconnection> {
        Ok(Reconnection {
            timer: TimerFd::new()?,
            wait: FIRST_WAIT,
            succeeded: None,
        })
    }

    /// Returns the timer, which becomes readable when the next attempt is due.
    pub(super) fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes note that the other side is gone. If it had just come back, it has to wait longer than the last time.
    pub(super) fn lose(&mut self) {
        let lasted = |since: Instant| since.elapsed() >= LAST_WAIT;
        match self.succeeded.take().is_none_or(lasted) {
            true => self.wait_for(FIRST_WAIT),
            false => self.fail(),
        }
    }

    /// Takes note that an attempt has failed.
    pub(super) fn fail(&mut self) {
        self.wait_for((2 * self.wait).min(LAST_WAIT));
    }

    /// Takes note that an attempt has succeeded.
    pub(super) fn succeed(&mut self) {
        self.succeeded = Some(Instant::now());
    }

    fn wait_for(&mut self, wait: Duration) {
        self.wait = wait;
        // It does not fail for valid times.
        let _ = self.timer.reset(wait, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_become_longer_until_the_other_side_stays() {
        let mut reconnection = Reconnection::new().unwrap();
        reconnection.lose();
        assert_eq!(reconnection.wait, FIRST_WAIT);
        reconnection.fail();
        assert_eq!(reconnection.wait, 2 * FIRST_WAIT);
        reconnection.succeed();
        reconnection.lose();
        assert_eq!(reconnection.wait, 4 * FIRST_WAIT);
        for _ in 0..10 {
            reconnection.fail();
        }
        assert_eq!(reconnection.wait, LAST_WAIT);
        reconnection.succeeded = Instant::now().checked_sub(LAST_WAIT);
        reconnection.lose();
        assert_eq!(reconnection.wait, FIRST_WAIT);
    }
}
