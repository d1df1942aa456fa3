//! The metadata service.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Body of `PUT /mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetadataConfig {
    /// Whether the guest needs a token to read.
    #[serde(default)]
    pub version: MetadataVersion,
    /// Names of the interfaces on which the guest reaches the service.
    pub network_interfaces: Vec<String>,
    /// The service's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether answers are plain text whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

/// How a guest asks for metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetadataVersion {
    /// By a plain request.
    #[default]
    V1,
    /// With a token that it has asked for before.
    V2,
}

impl From<MetadataVersion> for bantam_vmm::config::MetadataVersion {
    fn from(version: MetadataVersion) -> Self {
        match version {
            MetadataVersion::V1 => Self::V1,
            MetadataVersion::V2 => Self::V2,
        }
    }
}
