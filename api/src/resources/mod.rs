//! The resources of the API: at which path each is, what can be asked of it, what it adds to the
//! configuration, and what is counted of it; and the configuration that clients put together of them.
//!
//! The bodies of requests and answers name their fields as Firecracker does. A field that is not listed is
//! refused. A client gets back what it has put: fields that it left out stay out if they have no default.

pub mod actions;
pub mod balloon;
pub mod boot_source;
pub mod cpu_config;
pub mod drives;
pub mod entropy;
pub mod instance;
pub mod logger;
pub mod machine_config;
pub mod metrics;
pub mod mmds;
pub mod network_interfaces;
pub mod rate_limiter;
pub mod serial;
pub mod version;
pub mod vm;
pub mod vsock;

use bantam_vmm::config::MachineConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use crate::fault::Fault;
use crate::metrics_groups::Group;
use crate::request::{Call, Request};
use balloon::Balloon;
use boot_source::BootSource;
use cpu_config::CpuConfig;
use drives::Drive;
use entropy::Entropy;
use logger::Logger;
use machine_config::MachineConfiguration;
use metrics::Metrics;
use mmds::MetadataConfig;
use network_interfaces::NetworkInterface;
use serial::Serial;
use vsock::Vsock;

/// Every resource. Parts of the configuration come in the order in which those of a file are checked.
pub(crate) static RESOURCES: &[Resource] = &[
    instance::RESOURCE,
    version::RESOURCE,
    vm::RESOURCE,
    actions::RESOURCE,
    logger::RESOURCE,
    metrics::RESOURCE,
    machine_config::RESOURCE,
    boot_source::RESOURCE,
    drives::RESOURCE,
    network_interfaces::RESOURCE,
    balloon::RESOURCE,
    vsock::RESOURCE,
    mmds::RESOURCE,
    entropy::RESOURCE,
    serial::RESOURCE,
    cpu_config::RESOURCE,
];

/// What clients find at a path. A field that a resource has no use for is that of [`Resource::DEFAULT`].
pub(crate) struct Resource {
    /// The first part of the path.
    pub(crate) path: &'static str,
    /// Reads a request to it.
    pub(crate) parse: fn(&Call<'_>) -> Result<Request, Fault>,
    /// Moves its part of a configuration that was given as a whole to the one that is checked so far.
    pub(crate) check: fn(&mut Configuration, &mut Configuration) -> Result<(), Fault>,
    /// Puts what the configuration says of it into that of the machine.
    pub(crate) configure: fn(&Configuration, &mut MachineConfig) -> Result<(), Fault>,
    /// The groups of metrics that are its own.
    pub(crate) groups: &'static [Group],
}

impl Resource {
    /// One that has no requests, no part in the configuration and no metrics.
    const DEFAULT: Resource = Resource {
        path: "",
        parse: |call| Err(call.unknown()),
        check: |_, _| Ok(()),
        configure: |_, _| Ok(()),
        groups: &[],
    };
}

/// Content of a configuration file, and answer of `GET /vm/config`: all that clients have put so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Configuration {
    /// See `PUT /boot-source`.
    #[serde(default)]
    pub boot_source: Option<BootSource>,
    /// See `PUT /machine-config`.
    #[serde(default)]
    pub machine_config: MachineConfiguration,
    /// See `PUT /drives`, in the order in which they came.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// See `PUT /network-interfaces`.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// See `PUT /balloon`.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// See `PUT /vsock`.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// See `PUT /entropy`.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// See `PUT /serial`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// See `PUT /logger`.
    #[serde(default)]
    pub logger: Option<Logger>,
    /// See `PUT /metrics`.
    #[serde(default)]
    pub metrics: Option<Metrics>,
    /// See `PUT /mmds/config`.
    #[serde(default)]
    pub mmds_config: Option<MetadataConfig>,
    /// See `PUT /cpu-config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfig>,
    /// Persistent memory devices, which are not supported.
    #[serde(default, skip_serializing)]
    pub pmem: Vec<serde_json::Value>,
    /// Memory hotplug, which is not supported.
    #[serde(default, skip_serializing)]
    pub memory_hotplug: Option<serde_json::Value>,
}

impl Configuration {
    /// Checks each part as if a client had put it, in the order of the table of resources.
    ///
    /// # Errors
    /// When a part cannot be used.
    pub fn check(mut self) -> Result<Configuration, Fault> {
        let not_supported = |what: &str| Fault::NotSupported {
            what: what.to_string(),
        };
        if !self.pmem.is_empty() {
            return Err(not_supported("Persistent memory devices"));
        }
        if self.memory_hotplug.is_some() {
            return Err(not_supported("Memory hotplug"));
        }
        let mut checked = Configuration::default();
        for resource in RESOURCES {
            (resource.check)(&mut self, &mut checked)?;
        }
        Ok(checked)
    }

    /// Checks that the parts that there are fit a machine like `wanted`, so that a client hears of it at once.
    fn check_fit(&self, wanted: &MachineConfiguration) -> Result<(), Fault> {
        match &self.balloon {
            Some(balloon) => balloon.check(wanted),
            None => Ok(()),
        }
    }

    /// The machine that is made of all parts.
    pub(crate) fn machine(&self) -> Result<MachineConfig, Fault> {
        let boot_source = self.boot_source.as_ref().ok_or(Fault::NoBootSource)?;
        let mut machine = MachineConfig::new(&boot_source.kernel_image_path);
        for resource in RESOURCES {
            (resource.configure)(self, &mut machine)?;
        }
        machine.validate()?;
        Ok(machine)
    }
}

/// A part of the configuration, which clients put as a whole before the start.
pub(crate) trait Part: DeserializeOwned + Send + 'static {
    /// Puts it into `configuration`, in the place of one that is there already.
    ///
    /// # Errors
    /// When it cannot be used. What is in `configuration` then is of no use either.
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault>;
}

/// Puts all of `parts`, one after the other.
fn put_all<P: Part>(
    parts: impl IntoIterator<Item = P>,
    configuration: &mut Configuration,
) -> Result<(), Fault> {
    let mut parts = parts.into_iter();
    parts.try_for_each(|part| part.put(configuration))
}

/// Puts `item` in the place of the one with its name, or behind the last.
fn put_by<T>(items: &mut Vec<T>, item: T, name: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| name(other) == name(&item)) {
        Some(place) => *place = item,
        None => items.push(item),
    }
}

/// Reads a field that clients may set to null to say nothing of it.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
