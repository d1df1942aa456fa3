//! Limits of what a device does in a time.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bantam_devices::rate_limiter::{Limits, RateLimit};
use bantam_devices::virtio::net::NetLimits;
use serde::de::value::StrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer, forward_to_deserialize_any};

use super::{ConfigError, Quantity, WideNumber, is_default};

/// A limit of bytes or operations; none by default.
///
/// In a machine file it is a table with `per-second` and perhaps `burst`, or one with `size`, `refill-time`
/// and perhaps `one-time-burst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "LimitKeys", into = "LimitKeys")]
pub enum LimitConfig {
    /// An average, as a user gives it.
    Rate {
        /// Units in a second; `None` is no limit.
        per_second: Option<Quantity>,
        /// Units that may come at once after a rest; a tenth of a second's worth, if not given.
        burst: Option<Quantity>,
    },
    /// A bucket of any size, which fills in any time.
    Bucket(RateLimit),
}

impl LimitConfig {
    /// The bucket that keeps the limit; `None` if there is no limit.
    pub fn rate_limit(self) -> Option<RateLimit> {
        match self {
            Self::Rate { per_second, burst } => {
                let burst = burst.map(Quantity::get);
                per_second.map(|per_second| RateLimit::per_second(per_second.get(), burst))
            }
            Self::Bucket(bucket) => Some(bucket),
        }
    }

    /// Checks that a burst has the limit that it belongs to. `keys` name both, and `device` whose they are.
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

/// A limit as it is written.
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

/// A time with a unit, such as `500ms`, to the nanosecond.
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

/// Limits of the two things that a disk or an entropy device does much of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "limits: a table with bytes and operations"
)]
pub struct LimitsConfig {
    /// Of bytes.
    #[serde(skip_serializing_if = "is_default")]
    pub bytes: LimitConfig,
    /// Of operations: requests of a disk, buffers of an entropy device, packets of a network device.
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

/// Limits of a network device, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "limits: a table with receive and transmit"
)]
pub struct NetLimitsConfig {
    /// Of what the guest receives.
    #[serde(skip_serializing_if = "is_default")]
    pub receive: LimitsConfig,
    /// Of what the guest transmits.
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

/// The keys of a device by which a user gives a rate and its burst.
#[derive(Clone, Copy)]
pub(super) struct RateKeys {
    pub(super) per_second: &'static str,
    pub(super) burst: &'static str,
}

/// Limits whose rates can also be given by keys of the device itself, such as `bytes-per-second`.
pub(super) trait ShortKeys: Copy + Default + PartialEq {
    /// Each limit with its keys.
    fn with_keys(&mut self) -> Vec<(RateKeys, &mut LimitConfig)>;

    /// The rates and bursts that are given, by their keys.
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

    /// Where the rate or burst with this key is kept, and the key; `None` if there is no such key, or a
    /// bucket in its place.
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

    /// Checks that no burst is without the limit that it belongs to. `device` names whose they are.
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

/// Implements `Deserialize` for a struct whose field `limits` can also be given by short keys, and
/// `Serialize`, which writes the field. Serde derives both as functions of the struct itself
/// (`remote = "Self"`), which `Self::` means here before any of a trait.
macro_rules! serde_with_short_keys {
    ($config:ty) => {
        impl serde::Serialize for $config {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                Self::serialize(self, serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $config {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let mut short = Default::default();
                let reader = super::limits::ShortKeyReader {
                    inner: deserializer,
                    limits: &mut short,
                };
                let mut config = Self::deserialize(reader)?;
                super::limits::settle(&mut config.limits, short)?;
                Ok(config)
            }
        }
    };
}
pub(super) use serde_with_short_keys;

/// Puts limits that were given by short keys in the place of `limits`, which then must not be given.
pub(super) fn settle<L: ShortKeys, E: Error>(limits: &mut L, short: L) -> Result<(), E> {
    if let Some((key, _)) = short.rates().first() {
        if *limits != L::default() {
            return Err(E::custom(ConfigError::LimitsTwice { key }));
        }
        *limits = short;
    }
    Ok(())
}

/// A deserializer that keeps short keys from the struct and puts their values into `limits`.
pub(super) struct ShortKeyReader<'a, T, L> {
    pub(super) inner: T,
    pub(super) limits: &'a mut L,
}

impl<'de, D: Deserializer<'de>, L: ShortKeys> Deserializer<'de> for ShortKeyReader<'_, D, L> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.inner.deserialize_any(ShortKeyReader {
            inner: visitor,
            limits: self.limits,
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = ShortKeyReader {
            inner: visitor,
            limits: self.limits,
        };
        self.inner.deserialize_struct(name, fields, visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

impl<'de, V: Visitor<'de>, L: ShortKeys> Visitor<'de> for ShortKeyReader<'_, V, L> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.inner.visit_map(ShortKeyReader {
            inner: map,
            limits: self.limits,
        })
    }
}

impl<'de, A: MapAccess<'de>, L: ShortKeys> MapAccess<'de> for ShortKeyReader<'_, A, L> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        let mut seed = Some(seed);
        loop {
            let key = self.inner.next_key_seed(KeySeed {
                seed: &mut seed,
                limits: self.limits,
            })?;
            match key {
                Some(Key::Short(key, rate)) => {
                    if rate.is_some() {
                        return Err(A::Error::duplicate_field(key));
                    }
                    *rate = Some(self.inner.next_value()?);
                }
                Some(Key::Other(key)) => return Ok(Some(key)),
                None => return Ok(None),
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.inner.next_value_seed(seed)
    }
}

/// A key of a device.
enum Key<'a, K> {
    /// One of a rate or burst, and where its value is kept.
    Short(&'static str, &'a mut Option<Quantity>),
    Other(K),
}

/// Reads a key; `seed` is used up by one that is not short.
struct KeySeed<'a, 's, K, L> {
    seed: &'s mut Option<K>,
    limits: &'a mut L,
}

impl<'de, 'a, K: DeserializeSeed<'de>, L: ShortKeys> DeserializeSeed<'de>
    for KeySeed<'a, '_, K, L>
{
    type Value = Key<'a, K::Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl<'de, 'a, K: DeserializeSeed<'de>, L: ShortKeys> Visitor<'de> for KeySeed<'a, '_, K, L> {
    type Value = Key<'a, K::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<Self::Value, E> {
        if let Some((key, rate)) = self.limits.rate_mut(key) {
            return Ok(Key::Short(key, rate));
        }
        let seed = self.seed.take();
        let seed = seed.ok_or_else(|| E::custom("a key has been read twice"))?;
        seed.deserialize(StrDeserializer::new(key)).map(Key::Other)
    }
}
