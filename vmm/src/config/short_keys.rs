//! Reads devices whose limits can also be given by keys of the device itself, such as `bytes-per-second`.
//!
//! `#[serde(flatten)]` would do so too, but an error would then name neither the line of the key nor the
//! valid keys.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

use super::limits::ShortKeys;
use super::{ConfigError, Quantity};

/// Implements `Deserialize` for a struct whose field `limits` can also be given by short keys, and
/// `Serialize`, which writes the field. Serde derives both as functions of the struct itself
/// (`remote = "Self"`). `Self::` resolves to these here, as they take precedence over functions of traits.
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
                let reader = super::short_keys::ShortKeyReader {
                    inner: deserializer,
                    limits: &mut short,
                };
                let mut config = Self::deserialize(reader)?;
                super::short_keys::settle(&mut config.limits, short)?;
                Ok(config)
            }
        }
    };
}
pub(super) use serde_with_short_keys;

/// Replaces `limits` by limits that were given by short keys.
///
/// # Errors
///
/// If limits are given in both ways.
pub(super) fn settle<L: ShortKeys, E: Error>(limits: &mut L, short: L) -> Result<(), E> {
    if let Some((key, _)) = short.rates().first() {
        if *limits != L::default() {
            return Err(E::custom(ConfigError::LimitsTwice { key }));
        }
        *limits = short;
    }
    Ok(())
}

/// A deserializer that hides short keys from the struct and puts their values into `limits`.
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
    /// The short key of a rate or burst, and the place for its value.
    Short(&'static str, &'a mut Option<Quantity>),
    Other(K),
}

/// Reads a key. A key that is not short uses up `seed`.
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
