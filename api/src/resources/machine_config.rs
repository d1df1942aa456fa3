//! `/machine-config`: processors and memory.

use serde::Deserialize;

use crate::bodies::machine_config::{CpuTemplate, HugePages, MachineConfiguration};
use crate::configuration::Configuration;
use crate::method::Method;
use crate::metrics_groups::Group;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::resource::Resource;

pub(super) const RESOURCE: Resource = Resource {
    path: "machine-config",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("machine_cfg", |view| {
            Reply::value(&view.configuration().machine_config)
        })),
        (Method::Put, []) => Ok(Request::put(
            "machine_cfg",
            call.json()?,
            Configuration::put_machine_config,
        )),
        (Method::Patch, []) => {
            let update: MachineConfigurationUpdate = call.json()?;
            if update.is_empty() {
                return Err(call.without_body());
            }
            Ok(Request::patch("machine_cfg", |instance| {
                instance.change(|configuration| {
                    let wanted = update.applied_to(&configuration.machine_config);
                    configuration.put_machine_config(wanted)
                })
            }))
        }
        _ => Err(call.unknown()),
    },
    groups: &[Group::new(
        "vcpu",
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures exit_io_in_agg \
         exit_io_out_agg exit_mmio_read_agg exit_mmio_write_agg",
    )
    .and_each()],
};

/// Body of `PATCH /machine-config`: what is left out stays as it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineConfigurationUpdate {
    /// See [`MachineConfiguration::vcpu_count`].
    vcpu_count: Option<u8>,
    /// See [`MachineConfiguration::mem_size_mib`].
    mem_size_mib: Option<u64>,
    /// See [`MachineConfiguration::smt`].
    smt: Option<bool>,
    /// See [`MachineConfiguration::cpu_template`].
    cpu_template: Option<CpuTemplate>,
    /// See [`MachineConfiguration::track_dirty_pages`].
    track_dirty_pages: Option<bool>,
    /// See [`MachineConfiguration::huge_pages`].
    huge_pages: Option<HugePages>,
}

impl MachineConfigurationUpdate {
    /// Whether it says nothing.
    fn is_empty(&self) -> bool {
        self.vcpu_count.is_none()
            && self.mem_size_mib.is_none()
            && self.smt.is_none()
            && self.cpu_template.is_none()
            && self.track_dirty_pages.is_none()
            && self.huge_pages.is_none()
    }

    /// `before` with what this says.
    fn applied_to(self, before: &MachineConfiguration) -> MachineConfiguration {
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
