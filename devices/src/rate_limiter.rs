//! Limits of how much a device does in a time.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A token bucket: how much a device may do on average, and how much of it at once.
///
/// One that holds nothing, or that fills in no time, limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Units that the bucket holds: so many may be used at once after a time of rest.
    pub size: u64,
    /// How long it takes the empty bucket to fill. A size of one and a minute are a unit a minute.
    pub refill_time: Duration,
    /// Units that may be used beyond that, once: they are used up first and do not come again.
    pub one_time_burst: u64,
}

impl RateLimit {
    /// A limit of so many units a second that lets `burst` of them come at once, or a tenth of a
    /// second's worth where it is not given. Both are one at least.
    pub fn per_second(per_second: u64, burst: Option<u64>) -> RateLimit {
        let per_second = per_second.max(1);
        let size = burst.unwrap_or(per_second.div_ceil(10)).max(1);
        RateLimit {
            size,
            refill_time: time_for(size, Duration::from_secs(1), per_second),
            one_time_burst: 0,
        }
    }

    /// Whether it limits anything.
    pub(crate) fn limits(&self) -> bool {
        self.size > 0 && !self.refill_time.is_zero()
    }
}

/// Limits of the two things that a device does much of; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Of bytes.
    pub bytes: Option<RateLimit>,
    /// Of operations: requests of a disk or an entropy device, packets of a network card.
    pub operations: Option<RateLimit>,
}

/// Keeps a [`RateLimit`].
///
/// It knows the moment until which what was used so far is paid for at the limit's rate. That may be
/// as far ahead as the bucket takes to fill. What is begun within the limit may go beyond it, however
/// large it is; the next has to wait for that much longer.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    limit: RateLimit,
    /// What is left of the one-time burst.
    extra: u64,
    paid_until: Instant,
}

impl RateLimiter {
    /// A limiter that has rested by `now`.
    pub(crate) fn new(limit: RateLimit, now: Instant) -> RateLimiter {
        RateLimiter {
            limit,
            extra: limit.one_time_burst,
            paid_until: now,
        }
    }

    /// The limit that is kept.
    pub(crate) fn limit(&self) -> RateLimit {
        self.limit
    }

    /// How long it takes from `now` until more may be used; zero if it may be.
    pub(crate) fn wait_time(&self, now: Instant) -> Duration {
        self.paid_until
            .saturating_duration_since(now)
            .saturating_sub(self.limit.refill_time.min(LONGEST))
            .min(LONGEST)
    }

    /// Uses up `units`.
    pub(crate) fn take(&mut self, units: u64, now: Instant) {
        let of_extra = units.min(self.extra);
        self.extra -= of_extra;
        let RateLimit {
            size, refill_time, ..
        } = self.limit;
        let time = time_for(units - of_extra, refill_time, size);
        self.paid_until = self.paid_until.max(now) + time;
    }
}

/// A year: what takes longer is not waited for anyway, and moments cannot overflow by it.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long `units` take where it takes `refill_time` for each `size` of them, rounded up so that no
/// more is let through than the limit says. None at all where there is no limit.
fn time_for(units: u64, refill_time: Duration, size: u64) -> Duration {
    if size == 0 {
        return Duration::ZERO;
    }
    let nanoseconds = refill_time.min(LONGEST).as_nanos() * u128::from(units);
    u64::try_from(nanoseconds.div_ceil(size.into())).map_or(LONGEST, |nanoseconds| {
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
        let limit = RateLimit::per_second(1000, Some(50));
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

    #[test]
    fn what_is_given_once_is_used_first_and_does_not_come_again() {
        let start = Instant::now();
        let limit = RateLimit {
            size: 1,
            refill_time: Duration::from_secs(60),
            one_time_burst: 3,
        };
        let mut limiter = RateLimiter::new(limit, start);
        for _ in 0..4 {
            limiter.take(1, start);
            assert_eq!(limiter.wait_time(start), Duration::ZERO);
        }
        limiter.take(1, start);
        assert_eq!(limiter.wait_time(start), limit.refill_time);
        let later = start + Duration::from_secs(3600);
        limiter.take(2, later);
        assert_eq!(limiter.wait_time(later), limit.refill_time);
    }

    #[test]
    fn without_size_or_time_there_is_no_limit() {
        let start = Instant::now();
        for (size, refill_time) in [(0, Duration::from_secs(1)), (1, Duration::ZERO)] {
            let limit = RateLimit {
                size,
                refill_time,
                one_time_burst: 0,
            };
            let mut limiter = RateLimiter::new(limit, start);
            limiter.take(u64::MAX, start);
            assert_eq!(limiter.wait_time(start), Duration::ZERO);
        }
    }

    proptest! {
        #[test]
        fn no_more_is_used_than_the_limit_allows(
            size in 1..1_000_000_u64,
            refill_time in 1..1_000_000_u64,
            one_time_burst in prop_oneof![Just(0), 0..1_000_000_u64],
            units in prop::collection::vec(0..100_000_u64, 1..50),
        ) {
            let refill_time = Duration::from_millis(refill_time);
            let start = Instant::now();
            let limit = RateLimit { size, refill_time, one_time_burst };
            let mut limiter = RateLimiter::new(limit, start);
            let mut now = start;
            let mut used = 0;
            for units in units {
                now += limiter.wait_time(now);
                prop_assert_eq!(limiter.wait_time(now), Duration::ZERO);
                let buckets = 1.0 + (now - start).as_secs_f64() / refill_time.as_secs_f64();
                let allowed = one_time_burst as f64 + size as f64 * buckets;
                prop_assert!(used as f64 <= allowed + 1.0, "{} of {} were used", used, allowed);
                limiter.take(units, now);
                used += units;
            }
        }

        #[test]
        fn no_limit_overflows(
            size in any::<u64>(),
            refill_time in any::<u64>(),
            one_time_burst in any::<u64>(),
            units in prop::collection::vec(any::<u64>(), 1..50),
        ) {
            let refill_time = Duration::from_millis(refill_time);
            let now = Instant::now();
            let mut limiter = RateLimiter::new(RateLimit { size, refill_time, one_time_burst }, now);
            for units in units {
                limiter.take(units, now);
                prop_assert!(limiter.wait_time(now) <= LONGEST);
            }
        }

        #[test]
        fn a_rate_is_kept_however_small_the_burst(
            per_second in 1..100_000_000_u64,
            burst in prop::option::of(1..1_000_000_u64),
        ) {
            let limit = RateLimit::per_second(per_second, burst);
            let rate = limit.size as f64 / limit.refill_time.as_secs_f64();
            prop_assert!(rate <= per_second as f64 * 1.000_001);
            // The time is rounded up to a whole nanosecond.
            let rounding = per_second as f64 / limit.size as f64 / 1e9;
            prop_assert!(rate >= per_second as f64 / (1.0 + rounding) * 0.999_999);
        }
    }
}
