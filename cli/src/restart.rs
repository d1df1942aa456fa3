//! The delays before a machine is started again.

use std::time::Duration;

/// A machine that ran for this long does not count as failing at its start.
const LONG_RUN: Duration = Duration::from_secs(10);
/// The second restart in a row waits for this long, and each further one for twice as long as the
/// one before.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The restarts of a machine.
#[derive(Debug, Default)]
pub struct Restarts {
    limit: Option<u32>,
    count: u32,
    /// How many of them followed one another, each after a short run.
    in_a_row: u32,
}

impl Restarts {
    /// Makes a record without restarts, which allows at most `limit` of them.
    pub fn new(limit: Option<u32>) -> Restarts {
        Restarts {
            limit,
            ..Restarts::default()
        }
    }

    /// Returns how long a machine that has run for `run` has to wait until it is started again;
    /// `None` if it must not be started again.
    pub fn next(&mut self, run: Duration) -> Option<Duration> {
        if self.limit.is_some_and(|limit| self.count >= limit) {
            return None;
        }
        self.count = self.count.saturating_add(1);
        if run >= LONG_RUN {
            self.in_a_row = 0;
        }
        let wait = match self.in_a_row {
            0 => Duration::ZERO,
            earlier => {
                let factor = 2_u32.saturating_pow(earlier - 1);
                FIRST_WAIT.saturating_mul(factor).min(LONGEST_WAIT)
            }
        };
        self.in_a_row = self.in_a_row.saturating_add(1);
        Some(wait)
    }

    /// Returns the number of this restart, for messages.
    pub fn describe(&self) -> String {
        match self.limit {
            Some(limit) => format!("restart {} of {limit}", self.count),
            None => format!("restart {}", self.count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT_RUN: Duration = Duration::from_millis(5);

    fn waits(restarts: &mut Restarts, count: usize) -> Vec<u128> {
        let next = |_| restarts.next(SHORT_RUN).unwrap().as_millis();
        (0..count).map(next).collect()
    }

    #[test]
    fn waits_grow_to_their_limit_and_start_again_after_a_long_run() {
        let mut restarts = Restarts::new(None);
        let all = [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000];
        assert_eq!(waits(&mut restarts, 10), all);
        assert_eq!(waits(&mut restarts, 100), [10_000; 100]);
        assert_eq!(restarts.next(LONG_RUN), Some(Duration::ZERO));
        assert_eq!(waits(&mut restarts, 2), [100, 200]);
    }

    #[test]
    fn the_limit_counts_all_restarts() {
        let mut restarts = Restarts::new(Some(2));
        assert!(restarts.next(SHORT_RUN).is_some());
        assert!(restarts.next(LONG_RUN).is_some());
        assert_eq!(restarts.describe(), "restart 2 of 2");
        assert_eq!(restarts.next(LONG_RUN), None);
        assert_eq!(Restarts::new(Some(0)).next(LONG_RUN), None);
    }
}
