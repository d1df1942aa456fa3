//! Devices of which a user can only set limits.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::limits::ShortKeys;
use super::short_keys::serde_with_short_keys;
use super::{ConfigError, LimitsConfig, is_default};

/// A device that a machine has unless it is told otherwise, and its limits.
///
/// In a machine file, `false` or `true` for the key of the device says whether there is one; a table has the keys of a
/// disk's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    remote = "Self",
    deny_unknown_fields,
    expecting = "a device: a table with limits"
)]
pub struct LimitedDevice {
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

serde_with_short_keys!(LimitedDevice);

impl LimitedDevice {
    /// Checks that each burst has its limit; `device` says what the device is called.
    pub(super) fn validate(&self, device: &str) -> Result<(), ConfigError> {
        self.limits.check_bursts(|| device.to_owned())
    }
}

/// Writes a device without limits as `true`, and none as `false`.
pub(super) fn serialize<S: Serializer>(
    device: &Option<LimitedDevice>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match device {
        Some(device) if !is_default(device) => device.serialize(serializer),
        _ => serializer.serialize_bool(device.is_some()),
    }
}

/// Reads whether there is a device, or its table.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<LimitedDevice>, D::Error> {
    deserializer.deserialize_any(DeviceVisitor)
}

struct DeviceVisitor;

impl<'de> Visitor<'de> for DeviceVisitor {
    type Value = Option<LimitedDevice>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a boolean")
    }

    fn visit_bool<E: Error>(self, is_there: bool) -> Result<Self::Value, E> {
        Ok(is_there.then(LimitedDevice::default))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        <LimitedDevice as Deserialize>::deserialize(MapAccessDeserializer::new(map)).map(Some)
    }
}
