//! How far a migration is, for other threads to ask.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bantam_memory::{PAGE_SIZE, PageSet};
use bantam_migration::{Breaker, Counters};
use serde::{Deserialize, Serialize};

use crate::lock::lock;

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationProgress {
    /// How long it has been under way.
    pub time: Duration,
    /// How often pages have been sent, including those that are being sent now. 0 as long as the other end checks whether
    /// it can run the machine.
    pub rounds: u32,
    /// How many bytes of memory have been sent. A page that the guest has written meanwhile counts each time.
    pub sent: u64,
    /// How many bytes of memory are sent in a second, on average since the first.
    pub rate: u64,
    /// How many bytes are left of the pages of this round. Pages that the guest writes meanwhile are part of the next one.
    pub remaining: u64,
    /// For how long the guest would have stood still if it had been stopped at the end of the last round. `None` in the
    /// first.
    pub expected_downtime: Option<Duration>,
    /// How much of its time the machine does not run now, in percent, because it writes faster than its memory is copied.
    pub throttle: u8,
}

/// A migration that is under way.
pub(super) struct UnderWay {
    /// What ends it.
    pub(super) breaker: Breaker,
    begun: Instant,
    copying: Mutex<Option<Copying>>,
}

/// The copying of memory.
struct Copying {
    begun: Instant,
    counters: Arc<Counters>,
    rounds: u32,
    /// What [`Counters::passed`] will be at the end of the round.
    round_end: u64,
    expected_downtime: Option<Duration>,
    throttle: u8,
}

impl UnderWay {
    pub(super) fn new(breaker: Breaker) -> UnderWay {
        UnderWay {
            breaker,
            begun: Instant::now(),
            copying: Mutex::new(None),
        }
    }

    /// How long it has been under way.
    pub(super) fn time(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Notes that the memory is going to be sent.
    pub(super) fn begin_copy(&self, counters: &Arc<Counters>) {
        *lock(&self.copying) = Some(Copying {
            begun: Instant::now(),
            counters: counters.clone(),
            rounds: 0,
            round_end: 0,
            expected_downtime: None,
            throttle: 0,
        });
    }

    /// Notes that `pages` are going to be sent.
    pub(super) fn begin_round(&self, pages: &PageSet) {
        if let Some(copying) = &mut *lock(&self.copying) {
            copying.rounds += 1;
            copying.round_end = copying.counters.passed() + (pages.len() * PAGE_SIZE) as u64;
        }
    }

    /// Notes for how long the guest would stand still if it were stopped now.
    pub(super) fn expect_downtime(&self, downtime: Duration) {
        if let Some(copying) = &mut *lock(&self.copying) {
            copying.expected_downtime = Some(downtime);
        }
    }

    /// Notes how much of its time the machine does not run from now on, in percent.
    pub(super) fn throttle(&self, share: u8) {
        if let Some(copying) = &mut *lock(&self.copying) {
            copying.throttle = share;
        }
    }

    pub(super) fn progress(&self) -> MigrationProgress {
        let time = self.time();
        let copying = lock(&self.copying);
        let Some(copying) = &*copying else {
            return MigrationProgress {
                time,
                ..MigrationProgress::default()
            };
        };
        let sent = copying.counters.sent();
        let seconds = copying.begun.elapsed().as_secs_f64();
        MigrationProgress {
            time,
            rounds: copying.rounds,
            sent,
            // It is finite, as the clock has gone on; a cast saturates otherwise.
            rate: (sent as f64 / seconds) as u64,
            remaining: copying.round_end.saturating_sub(copying.counters.passed()),
            expected_downtime: copying.expected_downtime,
            throttle: copying.throttle,
        }
    }
}
