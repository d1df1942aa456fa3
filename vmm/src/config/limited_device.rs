//! Devices for which a user can only set limits.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::limits::ShortKeys;
use super::short_keys::serde_with_short_keys;
use super::{ConfigError, LimitsConfig, is_default};

/// Describes a device that has no options except its limits. A machine has it unless it is told otherwise.
///
/// In a machine file, the key of the device is `true` or `false`, which says whether there is such a device,
/// or a table with the keys of a disk's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    remote = "Self",
    deny_unknown_fields,
    expecting = "a device: a table with limits"
)]
pub struct LimitedDevice {
    /// Limits of bytes, and of the guest's buffers as operations.
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
    /// Checks that each burst has its limit; `device` names the device for messages.
    pub(super) fn validate(&self, device: &str) -> Result<(), ConfigError> {
        self.limits.check_bursts(|| device.to_owned())
    }
}

/// Writes a device without limits as `true`, and the absence of a device as `false`.
pub(super) fn serialize<S: Serializer>(
    device: &Option<LimitedDevice>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match device {
        Some(device) if !is_default(device) => device.serialize(serializer),
        _ => serializer.serialize_bool(device.is_some()),
    }
}

/// Reads `true`, `false` or the table of a device.
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
