//! The state that KVM keeps of a machine: saving it from a paused machine, and setting it in a new one.

mod msrs;
mod processors;
mod tsc;
mod tsc_offset;
mod vcpu_state;
mod vm_state;

pub(crate) use processors::SavedProcessors;
pub(crate) use tsc::TscRestorer;
pub(crate) use vcpu_state::{StateSupport, VcpuState};
pub(crate) use vm_state::VmState;
