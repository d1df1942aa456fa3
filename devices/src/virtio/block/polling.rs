//! Looking for requests instead of sleeping until the doorbell rings.

use std::time::{Duration, Instant};

/// How long a queue that has become empty is looked at before the event loop goes to sleep.
///
/// It is the longest time as long as requests come within it, and shrinks to nothing while they do
/// not.
pub(super) struct Polling {
    window: Duration,
    /// When a queue was found empty last.
    idle_since: Instant,
}

impl Polling {
    const SHORTEST: Duration = Duration::from_micros(4);
    const LONGEST: Duration = Duration::from_micros(64);

    pub(super) fn new() -> Polling {
        Polling {
            window: Duration::ZERO,
            idle_since: Instant::now(),
        }
    }

    /// Takes account of a request for which the doorbell had to be rung.
    pub(super) fn woken(&mut self) {
        self.window = if self.idle_since.elapsed() <= Self::LONGEST {
            Self::LONGEST
        } else {
            self.window / 2
        };
        if self.window < Self::SHORTEST {
            self.window = Duration::ZERO;
        }
    }

    /// Takes account of a queue that is empty, and gives the moment until which to look at it.
    pub(super) fn begin(&mut self) -> Instant {
        self.idle_since = Instant::now();
        self.idle_since + self.window
    }
}
