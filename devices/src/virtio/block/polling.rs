//! Polling for requests for a moment instead of sleeping until the doorbell rings.

use std::time::{Duration, Instant};

/// How long at most an empty queue is polled. This is less than the host takes to put a thread to sleep and
/// wake it again, so that polling costs nothing if it succeeds.
const USUAL_WINDOW: Duration = Duration::from_micros(8);
/// How long at most an empty queue is polled if the user asks for longer polling.
const LONG_WINDOW: Duration = Duration::from_micros(64);
/// How long after the window a doorbell may wake the worker for polling to count as worth trying.
const WAKING_TIME: Duration = Duration::from_micros(50);
/// Largest backoff, as a power of two: how many doorbells that polling might have caught are let pass before
/// the next try.
const MAX_BACKOFF: u32 = 6;

/// Decides whether an empty queue is polled before the event loop goes to sleep.
///
/// Polling goes on for as long as it succeeds. After a failure, only doorbells that come soon lead to another
/// try, and the more tries have failed, the more such doorbells are needed.
pub(super) struct Polling {
    window: Duration,
    /// When the queue was last found empty.
    empty_since: Instant,
    is_on: bool,
    /// How many tries have failed since the last success.
    failures: u32,
    /// How many doorbells are needed until the next try.
    doorbells_to_go: u32,
}

impl Polling {
    /// Makes a decision state with a short window, or a `long` one.
    pub(super) fn new(long: bool) -> Polling {
        Polling {
            window: if long { LONG_WINDOW } else { USUAL_WINDOW },
            empty_since: Instant::now(),
            is_on: false,
            failures: 0,
            doorbells_to_go: 0,
        }
    }

    /// Takes account of a queue that has become empty. Returns until when to poll it, if it is to be polled.
    pub(super) fn queue_is_empty(&mut self) -> Option<Instant> {
        self.empty_since = Instant::now();
        self.is_on.then(|| self.empty_since + self.window)
    }

    /// Takes account of a request that was found by polling.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Takes account of a window that has passed without a request.
    pub(super) fn failed(&mut self) {
        self.is_on = false;
        self.failures = (self.failures + 1).min(MAX_BACKOFF);
        self.doorbells_to_go = (1 << self.failures) - 1;
    }

    /// Takes account of a request for which the doorbell had to be rung.
    pub(super) fn doorbell_rang(&mut self) {
        if self.empty_since.elapsed() > self.window + WAKING_TIME {
            return;
        }
        match self.doorbells_to_go.checked_sub(1) {
            Some(left) => self.doorbells_to_go = left,
            None => self.is_on = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns how many of `count` doorbells that come soon lead to polling.
    fn tries(polling: &mut Polling, count: u32) -> u32 {
        let mut tries = 0;
        for _ in 0..count {
            // Independent of what the host's scheduler does meanwhile.
            polling.empty_since = Instant::now();
            polling.doorbell_rang();
            if polling.queue_is_empty().is_some() {
                polling.failed();
                tries += 1;
            }
        }
        tries
    }

    #[test]
    fn the_first_doorbell_that_comes_soon_leads_to_a_try() {
        let mut polling = Polling::new(false);
        assert_eq!(polling.queue_is_empty(), None);
        polling.doorbell_rang();
        let end = polling.queue_is_empty().unwrap();
        assert!(end <= Instant::now() + USUAL_WINDOW);
        polling.succeeded();
        assert!(polling.queue_is_empty().is_some());
        polling.failed();
        assert_eq!(polling.queue_is_empty(), None);
    }

    #[test]
    fn tries_that_fail_become_rare() {
        let mut polling = Polling::new(true);
        assert_eq!(tries(&mut polling, 1), 1);
        assert!(tries(&mut polling, 10_000) <= 10_000 / 60);
        polling.doorbells_to_go = 0;
        polling.empty_since = Instant::now();
        polling.doorbell_rang();
        polling.succeeded();
        polling.failed();
        assert!(tries(&mut polling, 4) >= 1);
    }

    #[test]
    fn a_queue_at_rest_is_left_alone() {
        let mut polling = Polling::new(false);
        polling.empty_since = Instant::now() - Duration::from_secs(1);
        polling.doorbell_rang();
        assert_eq!(polling.queue_is_empty(), None);
    }
}
