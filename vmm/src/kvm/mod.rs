//! State that KVM keeps of a machine: saved from one that is paused, and set in one that is built.

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
