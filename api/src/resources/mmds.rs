//! `/mmds`: the metadata service.

use std::net::Ipv4Addr;

use bantam_vmm::config::{DeviceName, MetadataAddress, MetadataConfig as MachineMetadata};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Configuration;
use super::{Part, Resource, put_all};
use crate::fault::Fault;
use crate::metrics_groups::Group;
use crate::reply::Reply;
use crate::request::{Method, Request};

pub(crate) const RESOURCE: Resource = Resource {
    path: "mmds",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("mmds", |view| {
            Reply::value(&match view.metadata()? {
                None | Some(Value::Null) => json!({}),
                Some(contents) => contents,
            })
        })),
        (Method::Put, []) => {
            let contents: Value = call.value()?;
            Ok(Request::change(Method::Put, "mmds", |instance| {
                instance.put_metadata(contents)
            }))
        }
        (Method::Patch, []) => {
            let patch: Value = call.value()?;
            Ok(Request::patch("mmds", |instance| {
                instance.patch_metadata(patch)
            }))
        }
        (Method::Put, ["config"]) => Ok(Request::put("mmds", call.json::<MetadataConfig>()?)),
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.mmds_config.take(), checked),
    configure: |configuration, machine| {
        if let Some(metadata) = &configuration.mmds_config {
            machine.metadata = Some(metadata.config(configuration)?);
        }
        Ok(())
    },
    groups: &[Group::new(
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token \
         rx_no_token rx_count tx_bytes tx_count tx_errors tx_frames connections_created \
         connections_destroyed",
    )],
};

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
    fn config(&self, configuration: &Configuration) -> Result<MachineMetadata, Fault> {
        let nets: Vec<DeviceName> = self
            .network_interfaces
            .iter()
            .map(|id| configuration.interface_name(id))
            .collect::<Result<_, _>>()?;
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

impl Part for MetadataConfig {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        self.config(configuration)?;
        configuration.mmds_config = Some(self);
        Ok(())
    }
}
