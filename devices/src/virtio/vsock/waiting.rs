//! Connections of the guest that wait for programs on the host.
//!
//! A program has a limited backlog of connections that it has not accepted. Beyond that the kernel refuses a
//! non-blocking stream (`EAGAIN`), and does not report when there is room. So the attempt is repeated after a
//! time, which grows while attempts fail.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most connections that wait. More are refused.
pub(super) const MAX_WAITING: usize = 128;
/// Least and most time between two attempts.
const MIN_INTERVAL: Duration = Duration::from_millis(1);
const MAX_INTERVAL: Duration = Duration::from_millis(50);

/// The waiting connections, in the order in which they came.
pub(super) struct Waiting {
    /// The port of the host that each connection wants, and its place in the table. It may have ended
    /// meanwhile.
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

    /// Whether a connection waits for this port.
    pub(super) fn has(&self, port: u32) -> bool {
        self.queue.iter().any(|&(waiting, _)| waiting == port)
    }

    /// Adds a connection. The first is tried again soon; others wait for that attempt too, so that a guest
    /// cannot make attempts more frequent.
    pub(super) fn add(&mut self, port: u32, place: usize, now: Instant) {
        if self.queue.is_empty() {
            self.interval = MIN_INTERVAL;
            self.retry = Some(now + MIN_INTERVAL);
        }
        self.queue.push_back((port, place));
    }

    /// Returns when to try again, if any connection waits.
    pub(super) fn retry(&self) -> Option<Instant> {
        self.retry
    }

    /// Takes all connections, which the caller may keep again.
    pub(super) fn take(&mut self) -> VecDeque<(u32, usize)> {
        std::mem::take(&mut self.queue)
    }

    /// Has a connection go on waiting. If the guest has given up and asks again from the same place, it waits
    /// only once.
    pub(super) fn keep(&mut self, port: u32, place: usize) {
        if !self.queue.contains(&(port, place)) {
            self.queue.push_back((port, place));
        }
    }

    /// Sets the time of the next attempt, depending on whether this one has connected any.
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
