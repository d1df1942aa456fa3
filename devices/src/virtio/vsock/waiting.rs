//! Connections of the guest that wait for programs of the host.
//!
//! A program lets only so many connections wait until it accepts them. The kernel refuses a non-blocking stream
//! beyond that (`EAGAIN`), and does not tell when there is room: so it is tried again after a time, which
//! becomes longer while nothing comes of it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most connections that wait. More are refused.
pub(super) const MAX_WAITING: usize = 128;
/// Least and most time between two attempts.
const MIN_INTERVAL: Duration = Duration::from_millis(1);
const MAX_INTERVAL: Duration = Duration::from_millis(50);

/// Those that wait, in the order in which they have come.
pub(super) struct Waiting {
    /// The port of the host that each wants, and its place in the table. It may have ended meanwhile.
    queue: VecDeque<(u32, usize)>,
    retry: Option<Instant>,
    interval: Duration,
}

impl Default for Waiting {
    fn default() -> Waiting {
        Waiting {
            queue: VecDeque::new(),
            retry: None,
            interval: MIN_INTERVAL,
        }
    }
}

impl Waiting {
    /// Whether no more can wait.
    pub(super) fn is_full(&self) -> bool {
        self.queue.len() >= MAX_WAITING
    }

    /// Whether one waits for this port.
    pub(super) fn has(&self, port: u32) -> bool {
        self.queue.iter().any(|&(waiting, _)| waiting == port)
    }

    /// Adds one. The first is tried again soon; others wait until it is, so that a guest cannot make attempts
    /// more frequent.
    pub(super) fn add(&mut self, port: u32, place: usize, now: Instant) {
        if self.queue.is_empty() {
            self.interval = MIN_INTERVAL;
            self.retry = Some(now + MIN_INTERVAL);
        }
        self.queue.push_back((port, place));
    }

    /// When to try again, if any wait.
    pub(super) fn retry(&self) -> Option<Instant> {
        self.retry
    }

    /// Takes all of them, to be kept again or not.
    pub(super) fn take(&mut self) -> VecDeque<(u32, usize)> {
        std::mem::take(&mut self.queue)
    }

    /// Has one go on waiting. A guest that has given up and asks again from the same place waits once.
    pub(super) fn keep(&mut self, port: u32, place: usize) {
        if !self.queue.contains(&(port, place)) {
            self.queue.push_back((port, place));
        }
    }

    /// Sets the time of the next attempt, by whether this one has connected any.
    pub(super) fn schedule(&mut self, has_connected: bool, now: Instant) {
        self.interval = match has_connected {
            true => MIN_INTERVAL,
            false => MAX_INTERVAL.min(2 * self.interval),
        };
        self.retry = (!self.queue.is_empty()).then(|| now + self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rarer_until_one_succeeds() {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        assert_eq!(waiting.retry(), None);
        waiting.add(52, 0, now);
        assert_eq!(waiting.retry(), Some(now + MIN_INTERVAL));
        let mut last = MIN_INTERVAL;
        for _ in 0..20 {
            waiting.schedule(false, now);
            let interval = waiting.retry().unwrap() - now;
            assert_eq!(interval, (2 * last).min(MAX_INTERVAL));
            last = interval;
        }
        waiting.add(53, 1, now);
        assert_eq!(waiting.retry(), Some(now + MAX_INTERVAL));
        waiting.schedule(true, now);
        assert_eq!(waiting.retry(), Some(now + MIN_INTERVAL));
        waiting.take();
        waiting.schedule(true, now);
        assert_eq!(waiting.retry(), None);
    }
}
