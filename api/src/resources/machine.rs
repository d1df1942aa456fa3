//! The machine as a whole.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Answer of `GET /`.
#[derive(Clone, Debug, Serialize)]
pub struct InstanceInformation {
    /// The program's name.
    pub app_name: &'static str,
    /// The instance's name.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: &'static str,
    /// Version of the API's model.
    pub vmm_version: &'static str,
}

/// Answer of `GET /version`.
#[derive(Clone, Debug, Serialize)]
pub struct Version {
    /// Version of the API's model.
    pub firecracker_version: &'static str,
}

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What is to be done.
    pub action_type: ActionType,
}

/// What `PUT /actions` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum ActionType {
    /// Writes the metrics now.
    FlushMetrics,
    /// Starts the machine.
    InstanceStart,
    /// Presses Ctrl-Alt-Del on the guest's keyboard.
    SendCtrlAltDel,
}

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The state wanted.
    pub state: VmState,
}

/// A state that a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum VmState {
    /// The vCPUs stand still.
    Paused,
    /// They run.
    Resumed,
}

/// Body of `PUT /machine-config`, and answer of `GET`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfiguration {
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_size_mib: u64,
    /// Whether the guest sees two threads to a core.
    #[serde(default)]
    pub smt: bool,
    /// A model of processor to imitate; none but `None` is known here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether pages that the guest writes are noted.
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
    /// Those that the host can make of ordinary ones where it likes to.
    Transparent,
    /// Those of 2 MiB that the host has set aside.
    #[serde(rename = "2M")]
    TwoMib,
}

/// Body of `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel image.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line, in place of the usual one.
    #[serde(default)]
    pub boot_args: Option<String>,
}
