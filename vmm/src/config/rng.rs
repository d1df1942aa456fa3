//! The entropy device.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::limits::ShortKeys;
use super::short_keys::serde_with_short_keys;
use super::{ConfigError, LimitsConfig, is_default};

/// An entropy device.
///
/// A machine has one unless its machine file says `rng = false`; a table `[rng]` limits what it gives, with
/// the keys of a disk's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    remote = "Self",
    deny_unknown_fields,
    expecting = "an entropy device: a table with limits"
)]
pub struct RngConfig {
    /// Limits of bytes, and of the guest's buffers.
    #[serde(
        default,
        skip_serializing_if = "is_default",
        alias = "bytes-per-second",
        alias = "burst-bytes",
        alias = "operations-per-second",
        alias = "burst-operations"
    )]
    pub limits: LimitsConfig,
}

serde_with_short_keys!(RngConfig);

impl RngConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        self.limits.check_bursts(|| "the entropy device".into())
    }
}

/// Writes a device without limits as `true`, and none as `false`.
pub(super) fn serialize<S: Serializer>(
    rng: &Option<RngConfig>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match rng {
        Some(rng) if !is_default(rng) => rng.serialize(serializer),
        _ => serializer.serialize_bool(rng.is_some()),
    }
}

/// Reads whether there is a device, or its table.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<RngConfig>, D::Error> {
    deserializer.deserialize_any(RngVisitor)
}

struct RngVisitor;

impl<'de> Visitor<'de> for RngVisitor {
    type Value = Option<RngConfig>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a boolean")
    }

    fn visit_bool<E: Error>(self, is_there: bool) -> Result<Self::Value, E> {
        Ok(is_there.then(RngConfig::default))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        <RngConfig as Deserialize>::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }
}
