//! `/machine-config`: processors and memory.

use std::mem;

use bantam_vmm::config::{HugePages as GuestPages, MemorySize, VcpuCount};
use serde::{Deserialize, Serialize};

use super::Configuration;
use super::{Part, Resource};
use crate::fault::Fault;
use crate::metrics_groups::Group;
use crate::reply::Reply;
use crate::request::{Method, Request};

pub(crate) const RESOURCE: Resource = Resource {
    path: "machine-config",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("machine_cfg", |view| {
            Reply::value(&view.configuration().machine_config)
        })),
        (Method::Put, []) => {
            let wanted: MachineConfiguration = call.json()?;
            Ok(Request::put("machine_cfg", wanted))
        }
        (Method::Patch, []) => {
            let update: MachineConfigurationUpdate = call.json()?;
            if update.is_empty() {
                return Err(call.without_body());
            }
            Ok(Request::patch("machine_cfg", |instance| {
                instance.change(|configuration| {
                    let wanted = update.applied_to(&configuration.machine_config);
                    wanted.put(configuration)
                })
            }))
        }
        _ => Err(call.unknown()),
    },
    check: |given, checked| mem::take(&mut given.machine_config).put(checked),
    configure: |configuration, machine| {
        let wanted = &configuration.machine_config;
        machine.cpus = vcpu_count(wanted)?;
        machine.smt = wanted.smt;
        machine.memory = memory_size(wanted)?;
        machine.huge_pages = match wanted.huge_pages {
            HugePages::None => GuestPages::None,
            HugePages::Transparent => GuestPages::Transparent,
            HugePages::TwoMib => GuestPages::TwoMib,
        };
        Ok(())
    },
    groups: &[Group::new(
        "vcpu",
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures exit_io_in_agg \
         exit_io_out_agg exit_mmio_read_agg exit_mmio_write_agg",
    )
    .and_each()],
};

/// Body of `PUT /machine-config`, and answer of `GET`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfiguration {
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_size_mib: u64,
    /// Whether the guest sees two threads per core.
    #[serde(default)]
    pub smt: bool,
    /// A model of processor to imitate; only `None` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether pages that the guest writes are recorded.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Which pages guest memory is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfiguration {
    /// One vCPU and 128 MiB.
    fn default() -> MachineConfiguration {
        MachineConfiguration {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// Body of `PATCH /machine-config`: what is left out stays as it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigurationUpdate {
    /// See [`MachineConfiguration::vcpu_count`].
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfiguration::mem_size_mib`].
    pub mem_size_mib: Option<u64>,
    /// See [`MachineConfiguration::smt`].
    pub smt: Option<bool>,
    /// See [`MachineConfiguration::cpu_template`].
    pub cpu_template: Option<CpuTemplate>,
    /// See [`MachineConfiguration::track_dirty_pages`].
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfiguration::huge_pages`].
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigurationUpdate {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.vcpu_count.is_none()
            && self.mem_size_mib.is_none()
            && self.smt.is_none()
            && self.cpu_template.is_none()
            && self.track_dirty_pages.is_none()
            && self.huge_pages.is_none()
    }

    /// `before` with what this says.
    pub fn applied_to(self, before: &MachineConfiguration) -> MachineConfiguration {
        MachineConfiguration {
            vcpu_count: self.vcpu_count.unwrap_or(before.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(before.mem_size_mib),
            smt: self.smt.unwrap_or(before.smt),
            cpu_template: self.cpu_template.or(before.cpu_template),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(before.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(before.huge_pages),
        }
    }
}

/// A processor model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// That of the host.
    None,
    /// An Amazon EC2 instance type.
    C3,
    /// An Amazon EC2 instance type.
    T2,
    /// An Amazon EC2 instance type.
    T2S,
    /// An Amazon EC2 instance type.
    T2CL,
    /// An Amazon EC2 instance type.
    T2A,
    /// An Amazon EC2 instance type.
    V1N1,
}

/// Which pages of the host guest memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary ones.
    #[default]
    None,
    /// Those that the host may make of ordinary ones.
    Transparent,
    /// Those of 2 MiB that the host has set aside.
    #[serde(rename = "2M")]
    TwoMib,
}

impl Part for MachineConfiguration {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        vcpu_count(&self)?;
        memory_size(&self)?;
        configuration.check_fit(&self)?;
        if !matches!(self.cpu_template, None | Some(CpuTemplate::None)) {
            return Err(Fault::NotSupported {
                what: "CPU templates other than 'None'".to_string(),
            });
        }
        if self.track_dirty_pages {
            tracing::info!("track_dirty_pages has no effect: there are no snapshots yet");
        }
        configuration.machine_config = self;
        Ok(())
    }
}

fn vcpu_count(wanted: &MachineConfiguration) -> Result<VcpuCount, Fault> {
    let count = i64::from(wanted.vcpu_count);
    if wanted.smt && count > 1 && count % 2 != 0 {
        return Err(Fault::Value {
            what: "vcpu_count",
            reason: "it must be 1 or even where smt is true".to_string(),
        });
    }
    VcpuCount::try_from(count).map_err(Fault::value("vcpu_count"))
}

fn memory_size(wanted: &MachineConfiguration) -> Result<MemorySize, Fault> {
    let mib = wanted.mem_size_mib;
    if wanted.huge_pages == HugePages::TwoMib && !mib.is_multiple_of(2) {
        return Err(Fault::Value {
            what: "mem_size_mib",
            reason: "it must be even where huge_pages is 2M".to_string(),
        });
    }
    let bytes = mib.saturating_mul(1 << 20);
    MemorySize::from_bytes(bytes).map_err(Fault::value("mem_size_mib"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_and_memory_that_do_not_fit_are_refused() {
        let refused = [
            r#"{"vcpu_count": 3, "mem_size_mib": 64, "smt": true}"#,
            r#"{"vcpu_count": 1, "mem_size_mib": 65, "huge_pages": "2M"}"#,
        ];
        for text in refused {
            let mut configuration = Configuration::default();
            let wanted: MachineConfiguration = serde_json::from_str(text).unwrap();
            assert!(wanted.put(&mut configuration).is_err(), "{text}");
        }
    }
}
