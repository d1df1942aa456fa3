//! Limits of how much a device does in a time.

use std::time::{Duration, Instant};

/// A rate that is kept on average, and how much may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Units a second, at least one.
    pub per_second: u64,
    /// Units that may be used at once after a time of rest.
    pub burst: u64,
}

impl RateLimit {
    /// A limit that lets a tenth of a second's worth come at once.
    pub fn per_second(per_second: u64) -> RateLimit {
        RateLimit {
            per_second,
            burst: per_second.div_ceil(10),
        }
    }
}

/// Keeps a [`RateLimit`].
///
/// It knows the moment until which what was used so far is paid for at the limit's rate. That may be
/// as far ahead as the burst takes. What is begun within the limit may go beyond it, however large it
/// is; the next has to wait for that much longer.
#[derive(Debug)]
pub struct RateLimiter {
    limit: RateLimit,
    burst_time: Duration,
    paid_until: Instant,
}

impl RateLimiter {
    /// A limiter that has rested by `now`.
    pub fn new(limit: RateLimit, now: Instant) -> RateLimiter {
        RateLimiter {
            burst_time: time_for(limit.burst, limit.per_second),
            limit,
            paid_until: now,
        }
    }

    /// How long it takes from `now` until more may be used; zero if it may be.
    pub fn wait_time(&self, now: Instant) -> Duration {
        self.paid_until
            .saturating_duration_since(now)
            .saturating_sub(self.burst_time)
    }

    /// Uses up `units`.
    pub fn take(&mut self, units: u64, now: Instant) {
        let time = time_for(units, self.limit.per_second);
        self.paid_until = self.paid_until.max(now) + time;
    }
}

fn time_for(units: u64, per_second: u64) -> Duration {
    let nanoseconds = u128::from(units) * 1_000_000_000 / u128::from(per_second.max(1));
    // A year: what takes longer is not waited for anyway, and moments cannot overflow by it.
    const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
    u64::try_from(nanoseconds).map_or(LONGEST, |nanoseconds| {
        Duration::from_nanos(nanoseconds).min(LONGEST)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_is_free_and_the_rest_is_paid_for() {
        let start = Instant::now();
        let limit = RateLimit {
            per_second: 1000,
            burst: 50,
        };
        let mut limiter = RateLimiter::new(limit, start);
        for _ in 0..50 {
            assert_eq!(limiter.wait_time(start), Duration::ZERO);
            limiter.take(1, start);
        }
        limiter.take(1, start);
        assert_eq!(limiter.wait_time(start), Duration::from_millis(1));
        let later = start + Duration::from_millis(1);
        assert_eq!(limiter.wait_time(later), Duration::ZERO);
        // After a long rest there is no more than a burst.
        let later = start + Duration::from_secs(100);
        limiter.take(51, later);
        assert_eq!(limiter.wait_time(later), Duration::from_millis(1));
    }

    proptest! {
        #[test]
        fn no_more_is_used_than_the_limit_allows(
            per_second in 1..1_000_000_u64,
            burst in 1..1_000_000_u64,
            units in prop::collection::vec(0..100_000_u64, 1..50),
        ) {
            let start = Instant::now();
            let mut limiter = RateLimiter::new(RateLimit { per_second, burst }, start);
            let mut now = start;
            let mut used = 0;
            for units in units {
                now += limiter.wait_time(now);
                prop_assert_eq!(limiter.wait_time(now), Duration::ZERO);
                let allowed = burst as f64 + (now - start).as_secs_f64() * per_second as f64;
                prop_assert!(used as f64 <= allowed + 1.0, "{} of {} were used", used, allowed);
                limiter.take(units, now);
                used += units;
            }
        }
    }
}
