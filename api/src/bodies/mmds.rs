//! The metadata service.

use std::net::Ipv4Addr;

use bantam_vmm::config::{DeviceName, MetadataAddress, MetadataConfig as MachineMetadata};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;

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
    /// With a plain request.
    #[default]
    V1,
    /// With a token from an earlier request.
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

impl MetadataConfig {
    /// The machine's configuration of it, for interfaces that the machine calls `nets`.
    pub(crate) fn config(&self, nets: Vec<DeviceName>) -> Result<MachineMetadata, Fault> {
        if nets.is_empty() {
            return Err(Fault::Value {
                what: "network_interfaces",
                reason: "there must be one at least".to_string(),
            });
        }
        let address = match self.ipv4_address {
            Some(address) => MetadataAddress::try_from(address).map_err(|error| Fault::Value {
                what: "ipv4_address",
                reason: error.to_string(),
            })?,
            None => MetadataAddress::default(),
        };
        Ok(MachineMetadata {
            version: self.version.into(),
            address,
            imds_compat: self.imds_compat,
            ..MachineMetadata::new(nets)
        })
    }
}
