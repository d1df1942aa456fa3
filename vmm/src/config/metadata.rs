//! The metadata service.

use bantam_metadata::{MetadataAddress, MetadataOptions, MetadataVersion};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::forms::Single;
use super::{DeviceName, is_default};

/// Describes the metadata that the guest can read over HTTP at a link-local address.
///
/// In a machine file it is a table `[metadata]`, whose `contents` are a string with JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "metadata: a table with nets"
)]
pub struct MetadataConfig {
    /// Names of the network devices over which the guest reaches the service; at least one.
    pub nets: Vec<DeviceName>,
    /// Version of the service, which determines the requests that it answers.
    #[serde(default, skip_serializing_if = "is_default")]
    pub version: MetadataVersion,
    /// Address at which the guest finds it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub address: MetadataAddress,
    /// Whether the guest always gets plain text, whatever format it asks for.
    #[serde(default, skip_serializing_if = "is_default")]
    pub imds_compat: bool,
    /// Maximum size of all contents in bytes, as JSON without spaces.
    #[serde(
        default = "default_size_limit",
        skip_serializing_if = "is_default_size_limit",
        with = "size"
    )]
    pub size_limit: usize,
    /// The initial contents. Without them, a guest finds nothing until some are set.
    #[serde(default, with = "json", skip_serializing_if = "Option::is_none")]
    pub contents: Option<Value>,
}

fn default_size_limit() -> usize {
    MetadataOptions::default().size_limit
}

fn is_default_size_limit(size: &usize) -> bool {
    *size == default_size_limit()
}

/// Reads and writes a size that may be too large for an integer in TOML.
mod size {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::config::WideNumber;

    pub(super) fn serialize<S: Serializer>(size: &usize, serializer: S) -> Result<S::Ok, S::Error> {
        WideNumber(*size as u64).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<usize, D::Error> {
        let WideNumber(size) = WideNumber::deserialize(deserializer)?;
        usize::try_from(size).map_err(D::Error::custom)
    }
}

/// Reads and writes JSON as text, because TOML has neither null nor such large numbers.
mod json {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};
    use serde_json::Value;

    pub(super) fn serialize<S: Serializer>(
        contents: &Option<Value>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match contents {
            Some(contents) => serializer.collect_str(contents),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Value>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let contents = serde_json::from_str(&text)
            .map_err(|error| D::Error::custom(format_args!("the metadata is not JSON: {error}")))?;
        Ok(Some(contents))
    }
}

impl Single for MetadataConfig {
    const NAME: &'static str = "metadata";
}

impl MetadataConfig {
    /// Describes metadata that is served over `nets`, with the defaults: version 1 at 169.254.169.254, up to
    /// 51,200 bytes, and no contents yet.
    pub fn new(nets: Vec<DeviceName>) -> Self {
        let MetadataOptions {
            version,
            imds_compat,
            size_limit,
        } = MetadataOptions::default();
        Self {
            nets,
            version,
            address: MetadataAddress::default(),
            imds_compat,
            size_limit,
            contents: None,
        }
    }
}
