//! Processors and memory.

use bantam_vmm::config::{HugePages as GuestPages, MemorySize, VcpuCount};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;

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
    /// Whether pages that the guest writes are recorded, for snapshots of type `Diff`.
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

impl MachineConfiguration {
    /// The number of vCPUs, if a machine can have it.
    pub(crate) fn vcpu_count(&self) -> Result<VcpuCount, Fault> {
        let count = i64::from(self.vcpu_count);
        if self.smt && count > 1 && count % 2 != 0 {
            return Err(Fault::Value {
                what: "vcpu_count",
                reason: "it must be 1 or even where smt is true".to_string(),
            });
        }
        VcpuCount::try_from(count).map_err(Fault::value("vcpu_count"))
    }

    /// The size of the memory, if a machine can have it.
    pub(crate) fn memory_size(&self) -> Result<MemorySize, Fault> {
        let mib = self.mem_size_mib;
        if self.huge_pages == HugePages::TwoMib && !mib.is_multiple_of(2) {
            return Err(Fault::Value {
                what: "mem_size_mib",
                reason: "it must be even where huge_pages is 2M".to_string(),
            });
        }
        let bytes = mib.saturating_mul(1 << 20);
        MemorySize::from_bytes(bytes).map_err(Fault::value("mem_size_mib"))
    }

    /// Checks that it asks for nothing that is not supported.
    pub(crate) fn check_supported(&self) -> Result<(), Fault> {
        if !matches!(self.cpu_template, None | Some(CpuTemplate::None)) {
            return Err(Fault::NotSupported {
                what: "CPU templates other than 'None'".to_string(),
            });
        }
        Ok(())
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

impl From<HugePages> for GuestPages {
    fn from(pages: HugePages) -> GuestPages {
        match pages {
            HugePages::None => GuestPages::None,
            HugePages::Transparent => GuestPages::Transparent,
            HugePages::TwoMib => GuestPages::TwoMib,
        }
    }
}
