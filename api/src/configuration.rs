//! The configuration that clients have put together so far, and the machine that is made of it.

use bantam_vmm::config::MachineConfig;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::resources::RESOURCES;
use crate::resources::balloon::Balloon;
use crate::resources::boot_source::BootSource;
use crate::resources::cpu_config::CpuConfig;
use crate::resources::drives::Drive;
use crate::resources::entropy::Entropy;
use crate::resources::logger::Logger;
use crate::resources::machine_config::MachineConfiguration;
use crate::resources::metrics::Metrics;
use crate::resources::mmds::MetadataConfig;
use crate::resources::network_interfaces::NetworkInterface;
use crate::resources::serial::Serial;
use crate::resources::vsock::Vsock;

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

    /// The drives in the order in which the guest finds them: the root device is the first.
    pub(crate) fn drives_in_order(&self) -> impl Iterator<Item = &Drive> {
        let root = self.drives.iter().filter(|drive| drive.is_root_device);
        root.chain(self.drives.iter().filter(|drive| !drive.is_root_device))
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

#[cfg(test)]
mod tests;
