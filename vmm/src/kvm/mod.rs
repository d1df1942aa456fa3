//! The state that KVM keeps of a machine: saving it from a paused machine, and setting it in a new one.

mod msrs;
mod processors;
mod tsc;
mod tsc_offset;
mod vcpu_state;
mod vm_state;

use bantam_state::SavedState;

pub(crate) use processors::SavedProcessors;
pub(crate) use tsc::TscRestorer;
pub(crate) use vcpu_state::{StateSupport, VcpuState};
pub(crate) use vm_state::VmState;

/// Kind of the section of a virtual machine.
pub(crate) const VM_KIND: &str = VmState::KIND;
/// Kind of the section of a vCPU.
pub(crate) const VCPU_KIND: &str = VcpuState::KIND;
