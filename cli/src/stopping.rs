//! The time that the end of the process may take once its user has asked for it.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the process may wait in all for others: the machine's devices, readers of the last output, clients
/// of the API.
const TIME: Duration = Duration::from_millis(1500);
/// Least time for each of them.
const LEAST_TIME: Duration = Duration::from_millis(100);

static ASKED: OnceLock<Instant> = OnceLock::new();

/// Notes that the user wants the process to end from now on.
pub fn ask() {
    ASKED.get_or_init(Instant::now);
}

/// Returns whether the user wants the process to end.
pub fn is_asked() -> bool {
    ASKED.get().is_some()
}

/// Returns how much of `most` is available for a wait that begins now.
pub fn time_left(most: Duration) -> Duration {
    match ASKED.get() {
        Some(&asked) => most.min(left(asked, Instant::now())),
        None => most,
    }
}

fn left(asked: Instant, now: Instant) -> Duration {
    (asked + TIME)
        .saturating_duration_since(now)
        .max(LEAST_TIME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_end_is_spent_once() {
        let asked = Instant::now();
        assert_eq!(left(asked, asked), TIME);
        let later = asked + Duration::from_millis(900);
        assert_eq!(left(asked, later), Duration::from_millis(600));
        assert_eq!(left(asked, asked + TIME), LEAST_TIME);
        assert_eq!(left(asked, asked + 2 * TIME), LEAST_TIME);
    }
}
