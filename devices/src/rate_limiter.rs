//! Limits on the rate of a device's work.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A token bucket: how much a device may do on average, and how much of it at once.
///
/// A bucket of size zero, or one that fills in no time, limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Units that the bucket holds, which is how many may be used at once after an idle period.
    pub size: u64,
    /// How long the empty bucket takes to fill. A size of one and a time of a minute allow one unit a minute.
    pub refill_time: Duration,
    /// Extra units that may be used once: they are used first and are not refilled.
    pub one_time_burst: u64,
}

impl RateLimit {
    /// Makes a limit of `per_second` units a second that lets `burst` of them come at once, or a tenth of a
    /// second's worth if that is not given. Both are at least one.
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

/// Limits on a device's bytes and operations; `None` means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Limit on bytes.
    pub bytes: Option<RateLimit>,
    /// Limit on operations: requests of a disk or an entropy device, packets of a network card.
    pub operations: Option<RateLimit>,
}

/// Enforces a [`RateLimit`].
///
/// It stores the moment at which the use so far is paid off at the limit's rate. That may be as far ahead as
/// the bucket takes to fill. An operation that begins within the limit may exceed it, however large it is;
/// the next one waits that much longer.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    limit: RateLimit,
    /// What is left of the one-time burst.
    extra: u64,
    paid_until: Instant,
}

impl RateLimiter {
    /// Makes a limiter whose bucket is full at `now`.
    pub(crate) fn new(limit: RateLimit, now: Instant) -> RateLimiter {
        RateLimiter {
            limit,
            extra: limit.one_time_burst,
            paid_until: now,
        }
    }

    /// Returns the limit that is enforced.
    pub(crate) fn limit(&self) -> RateLimit {
        self.limit
    }

    /// Returns how long it takes from `now` until more may be used; zero if it may be used at once.
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

/// A year. Nobody waits for longer than that, and adding it to a moment cannot overflow.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// Returns how long `units` take if each `size` of them takes `refill_time`, rounded up so that no more
/// passes than the limit allows. Zero if there is no limit.
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
