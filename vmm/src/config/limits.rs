//! Rate limits of devices.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bantam_devices::rate_limiter::{Limits, RateLimit};
use bantam_devices::virtio::net::NetLimits;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ConfigError, Quantity, WideNumber, is_default};

/// Describes a limit of bytes or operations; there is none by default.
///
/// In a machine file it is a table with `per-second` and perhaps `burst`, or one with `size`, `refill-time`
/// and perhaps `one-time-burst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "LimitKeys", into = "LimitKeys")]
pub enum LimitConfig {
    /// An average rate, as a user gives it.
    Rate {
        /// Units per second; `None` is no limit.
        per_second: Option<Quantity>,
        /// Units that may come at once after a rest; by default a tenth of a second's worth.
        burst: Option<Quantity>,
    },
    /// A token bucket of any size and refill time.
    Bucket(RateLimit),
}

impl LimitConfig {
    /// Returns the bucket that enforces the limit; `None` if there is no limit.
    pub fn rate_limit(self) -> Option<RateLimit> {
        match self {
            Self::Rate { per_second, burst } => {
                let burst = burst.map(Quantity::get);
                per_second.map(|per_second| RateLimit::per_second(per_second.get(), burst))
            }
            Self::Bucket(bucket) => Some(bucket),
        }
    }

    /// Checks that a burst has the limit that it belongs to. `keys` and `device` name them in the error.
    pub(super) fn check_burst(
        self,
        keys: RateKeys,
        device: impl FnOnce() -> String,
    ) -> Result<(), ConfigError> {
        match self {
            Self::Rate {
                per_second: None,
                burst: Some(_),
            } => Err(ConfigError::BurstWithoutLimit {
                device: device(),
                burst: keys.burst,
                limit: keys.per_second,
            }),
            _ => Ok(()),
        }
    }
}

impl Default for LimitConfig {
    fn default() -> Self {
        Self::Rate {
            per_second: None,
            burst: None,
        }
    }
}

impl From<Option<RateLimit>> for LimitConfig {
    fn from(limit: Option<RateLimit>) -> Self {
        limit.map_or_else(Self::default, Self::Bucket)
    }
}

/// The keys of a limit, as they are written.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a limit: a table with per-second, or with size and refill-time"
)]
struct LimitKeys {
    per_second: Option<Quantity>,
    burst: Option<Quantity>,
    size: Option<WideNumber>,
    refill_time: Option<RefillTime>,
    one_time_burst: Option<WideNumber>,
}

impl TryFrom<LimitKeys> for LimitConfig {
    type Error = ConfigError;

    fn try_from(keys: LimitKeys) -> Result<Self, ConfigError> {
        match keys {
            LimitKeys {
                per_second,
                burst,
                size: None,
                refill_time: None,
                one_time_burst: None,
            } => Ok(Self::Rate { per_second, burst }),
            LimitKeys {
                per_second: None,
                burst: None,
                size: Some(WideNumber(size)),
                refill_time: Some(RefillTime(refill_time)),
                one_time_burst,
            } => Ok(Self::Bucket(RateLimit {
                size,
                refill_time,
                one_time_burst: one_time_burst.map_or(0, |burst| burst.0),
            })),
            _ => Err(ConfigError::LimitForm),
        }
    }
}

impl From<LimitConfig> for LimitKeys {
    fn from(limit: LimitConfig) -> Self {
        match limit {
            LimitConfig::Rate { per_second, burst } => Self {
                per_second,
                burst,
                ..Self::default()
            },
            LimitConfig::Bucket(bucket) => Self {
                size: Some(WideNumber(bucket.size)),
                refill_time: Some(RefillTime(bucket.refill_time)),
                one_time_burst: match bucket.one_time_burst {
                    0 => None,
                    burst => Some(WideNumber(burst)),
                },
                ..Self::default()
            },
        }
    }
}

/// Time in which a bucket fills, such as `500ms`; exact to the nanosecond.
#[derive(Clone, Copy)]
struct RefillTime(Duration);

/// Units of time and their nanoseconds, the longest first.
const TIME_UNITS: [(&str, u128); 5] = [
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

impl FromStr for RefillTime {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let parse = || {
            let (_, nanoseconds) = TIME_UNITS.into_iter().find(|(name, _)| *name == unit)?;
            let nanoseconds = number.parse::<u128>().ok()?.checked_mul(nanoseconds)?;
            let seconds = u64::try_from(nanoseconds / 1_000_000_000).ok()?;
            let rest = u32::try_from(nanoseconds % 1_000_000_000).ok()?;
            Some(Self(Duration::new(seconds, rest)))
        };
        parse().ok_or_else(|| ConfigError::RefillTime { text: text.into() })
    }
}

impl TryFrom<String> for RefillTime {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl fmt::Display for RefillTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        let divides = |(_, unit): &(&str, u128)| nanoseconds.is_multiple_of(*unit);
        let (name, unit) = TIME_UNITS.into_iter().find(divides).unwrap_or(("ns", 1));
        write!(f, "{}{name}", nanoseconds / unit)
    }
}

impl Serialize for RefillTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RefillTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// Describes the limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "limits: a table with bytes and operations"
)]
pub struct LimitsConfig {
    /// Limit of bytes.
    #[serde(skip_serializing_if = "is_default")]
    pub bytes: LimitConfig,
    /// Limit of operations, such as requests of a disk or packets of a network device.
    #[serde(skip_serializing_if = "is_default")]
    pub operations: LimitConfig,
}

impl From<LimitsConfig> for Limits {
    fn from(config: LimitsConfig) -> Self {
        Self {
            bytes: config.bytes.rate_limit(),
            operations: config.operations.rate_limit(),
        }
    }
}

impl From<Limits> for LimitsConfig {
    fn from(limits: Limits) -> Self {
        Self {
            bytes: limits.bytes.into(),
            operations: limits.operations.into(),
        }
    }
}

/// Describes the limits of a network device in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "limits: a table with receive and transmit"
)]
pub struct NetLimitsConfig {
    /// Limits of what the guest receives.
    #[serde(skip_serializing_if = "is_default")]
    pub receive: LimitsConfig,
    /// Limits of what the guest transmits.
    #[serde(skip_serializing_if = "is_default")]
    pub transmit: LimitsConfig,
}

impl From<NetLimitsConfig> for NetLimits {
    fn from(config: NetLimitsConfig) -> Self {
        Self {
            receive: config.receive.into(),
            transmit: config.transmit.into(),
        }
    }
}

impl From<NetLimits> for NetLimitsConfig {
    fn from(limits: NetLimits) -> Self {
        Self {
            receive: limits.receive.into(),
            transmit: limits.transmit.into(),
        }
    }
}

/// The keys of a device for a rate and its burst.
#[derive(Clone, Copy)]
pub(super) struct RateKeys {
    pub(super) per_second: &'static str,
    pub(super) burst: &'static str,
}

/// Limits whose rates can also be given by keys of the device itself, such as `bytes-per-second`.
pub(super) trait ShortKeys: Copy + Default + PartialEq {
    /// Returns each limit with its keys.
    fn with_keys(&mut self) -> Vec<(RateKeys, &mut LimitConfig)>;

    /// Returns the rates and bursts that are given, with their keys.
    fn rates(mut self) -> Vec<(&'static str, Quantity)> {
        let limits = self.with_keys().into_iter();
        let rates = limits.flat_map(|(keys, limit)| match *limit {
            LimitConfig::Rate { per_second, burst } => {
                [(keys.per_second, per_second), (keys.burst, burst)]
            }
            LimitConfig::Bucket(_) => [(keys.per_second, None), (keys.burst, None)],
        });
        rates
            .filter_map(|(key, quantity)| Some((key, quantity?)))
            .collect()
    }

    /// Finds the rate or burst with this key. Returns `None` if there is none, or a bucket in its place.
    fn rate_mut(&mut self, key: &str) -> Option<(&'static str, &mut Option<Quantity>)> {
        self.with_keys().into_iter().find_map(|(keys, limit)| {
            let LimitConfig::Rate { per_second, burst } = limit else {
                return None;
            };
            if key == keys.per_second {
                Some((keys.per_second, per_second))
            } else if key == keys.burst {
                Some((keys.burst, burst))
            } else {
                None
            }
        })
    }

    /// Checks that each burst has the limit that it belongs to. `device` names the device in the error.
    fn check_bursts(mut self, device: impl Fn() -> String) -> Result<(), ConfigError> {
        let mut limits = self.with_keys().into_iter();
        limits.try_for_each(|(keys, limit)| limit.check_burst(keys, &device))
    }
}

impl ShortKeys for LimitsConfig {
    fn with_keys(&mut self) -> Vec<(RateKeys, &mut LimitConfig)> {
        let keys = |per_second, burst| RateKeys { per_second, burst };
        vec![
            (keys("bytes-per-second", "burst-bytes"), &mut self.bytes),
            (
                keys("operations-per-second", "burst-operations"),
                &mut self.operations,
            ),
        ]
    }
}

impl ShortKeys for NetLimitsConfig {
    fn with_keys(&mut self) -> Vec<(RateKeys, &mut LimitConfig)> {
        let keys = |per_second, burst| RateKeys { per_second, burst };
        let Self { receive, transmit } = self;
        vec![
            (
                keys("rx-bytes-per-second", "rx-burst-bytes"),
                &mut receive.bytes,
            ),
            (
                keys("rx-packets-per-second", "rx-burst-packets"),
                &mut receive.operations,
            ),
            (
                keys("tx-bytes-per-second", "tx-burst-bytes"),
                &mut transmit.bytes,
            ),
            (
                keys("tx-packets-per-second", "tx-burst-packets"),
                &mut transmit.operations,
            ),
        ]
    }
}
