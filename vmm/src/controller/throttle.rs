//! Slows down a machine that writes to its memory faster than that can be copied, as QEMU's auto-converge does.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::Error;
use crate::lock::lock;
use crate::run_control::RunControl;

/// For how long the vCPUs run between two stops.
const RUN_TIME: Duration = Duration::from_millis(10);
/// The share of its time in percent that the machine loses at first, and how much more with each step.
const FIRST_STEP: u8 = 20;
const STEP: u8 = 10;
/// The largest share: the vCPUs run for 10 ms in a second.
const LIMIT: u8 = 99;

/// Slows a machine down until it is dropped.
pub(super) struct Throttle {
    shared: Arc<Shared>,
    limit: u8,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    control: Arc<RunControl>,
    /// The share of its time that the machine does not run, in percent.
    share: Mutex<u8>,
    /// Notified when the share is 0 for good.
    ended: Condvar,
}

impl Throttle {
    /// Prepares to slow the machine of `control` down, so that it loses at most `limit` percent of its time.
    pub(super) fn new(control: &Arc<RunControl>, limit: u8) -> Throttle {
        Throttle {
            shared: Arc::new(Shared {
                control: control.clone(),
                share: Mutex::new(0),
                ended: Condvar::new(),
            }),
            limit: limit.min(LIMIT),
            thread: None,
        }
    }

    /// Slows the machine down by another step, unless it is as slow as it may be. Returns the share of its time that it does
    /// not run now, in percent.
    ///
    /// # Errors
    /// If the host is out of threads.
    pub(super) fn slow_down(&mut self) -> Result<u8, Error> {
        let share = {
            let mut share = lock(&self.shared.share);
            let step = if *share == 0 { FIRST_STEP } else { STEP };
            *share = share.saturating_add(step).min(self.limit);
            *share
        };
        if share > 0 && self.thread.is_none() {
            const NAME: &str = "bantam-throttle";
            let shared = self.shared.clone();
            let thread = thread::Builder::new().name(NAME.to_owned());
            let started = thread.spawn(move || shared.stop_again_and_again());
            self.thread = Some(started.map_err(|source| Error::Thread {
                name: NAME.to_owned(),
                source,
            })?);
        }
        Ok(share)
    }
}

impl Shared {
    fn stop_again_and_again(&self) {
        let mut share = lock(&self.share);
        while *share > 0 {
            let runs = f64::from(100 - *share);
            for (is_stopped, time) in [
                (false, RUN_TIME),
                (true, RUN_TIME.mul_f64(f64::from(*share) / runs)),
            ] {
                self.control.throttle(is_stopped);
                let waited = self
                    .ended
                    .wait_timeout_while(share, time, |share| *share > 0);
                share = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        self.control.throttle(false);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        *lock(&self.shared.share) = 0;
        self.shared.ended.notify_all();
        if let Some(thread) = self.thread.take() {
            // If it has panicked, it has not let the vCPUs go.
            if thread.join().is_err() {
                self.shared.control.throttle(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::events::EventSender;

    #[test]
    fn a_machine_is_slowed_down_in_steps_and_has_all_its_time_afterwards() {
        let control = Arc::new(RunControl::new(EventSender::default()).unwrap());
        let mut throttle = Throttle::new(&control, 100);
        let shares: Vec<_> = (0..10).map(|_| throttle.slow_down().unwrap()).collect();
        assert_eq!(shares, [20, 30, 40, 50, 60, 70, 80, 90, 99, 99]);
        let begin = Instant::now();
        while !control.is_throttled() {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "it is not stopped"
            );
            thread::sleep(Duration::from_millis(1));
        }
        // In the middle of a stop of a second.
        let begin = Instant::now();
        drop(throttle);
        assert!(!control.is_throttled());
        assert!(begin.elapsed() < Duration::from_millis(900));

        let mut never = Throttle::new(&control, 0);
        assert_eq!(never.slow_down().unwrap(), 0);
        assert!(never.thread.is_none() && !control.is_throttled());
    }
}
