//! Rate limits of devices.

use std::time::Duration;

use bantam_vmm::{Limits, RateLimit};
use serde::{Deserialize, Serialize};

/// Limits of bytes and of operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Limit of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Limit of operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Returns the limits of `limiter`; without a limiter there are none.
    pub(crate) fn limits(limiter: Option<&RateLimiter>) -> Limits {
        let limiter = limiter.copied().unwrap_or_default();
        Limits {
            bytes: limiter.bandwidth.as_ref().and_then(TokenBucket::rate_limit),
            operations: limiter.ops.as_ref().and_then(TokenBucket::rate_limit),
        }
    }

    /// Returns `before` with the limits that this sets, and the others as they are.
    pub(crate) fn applied_to(self, before: Option<RateLimiter>) -> RateLimiter {
        let before = before.unwrap_or_default();
        RateLimiter {
            bandwidth: self.bandwidth.or(before.bandwidth),
            ops: self.ops.or(before.ops),
        }
    }
}

/// A limit as a token bucket: work takes tokens from it, and it fills up with time. A bucket with a size or a
/// refill time of zero limits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// How many tokens it holds.
    pub size: u64,
    /// Extra tokens at the start, which are not refilled.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which it fills up.
    pub refill_time: u64,
}

impl TokenBucket {
    pub(crate) fn rate_limit(&self) -> Option<RateLimit> {
        let limits = self.size > 0 && self.refill_time > 0;
        limits.then(|| RateLimit {
            size: self.size,
            refill_time: Duration::from_millis(self.refill_time),
            one_time_burst: self.one_time_burst.unwrap_or(0),
        })
    }
}
