//! Limits of what a device does in a time.

use serde::{Deserialize, Serialize};

/// Limits of bytes and of operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Of operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A limit as a bucket: what is done takes tokens from it, and it fills up with time. One of size zero or
/// with no time to refill limits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// How many tokens it holds.
    pub size: u64,
    /// Tokens on top of that at the start, which are not refilled.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which it fills up.
    pub refill_time: u64,
}
