//! The state of a machine's virtual machine and vCPUs together.

use bantam_state::{RestoreError, SaveError, SavedState, Section};

use super::tsc::TscRestorer;
use super::vcpu_state::{StateSupport, VcpuState};
use super::vm_state::VmState;
use crate::error::Error;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// What a machine goes on from in place of a boot, beside its memory.
pub(crate) struct SavedProcessors {
    vm: VmState,
    /// By index.
    vcpus: Vec<VcpuState>,
}

impl SavedProcessors {
    /// From what was saved, and nothing else: the virtual machine, and all its vCPUs by index.
    pub(crate) fn new(vm: VmState, vcpus: Vec<VcpuState>) -> SavedProcessors {
        SavedProcessors { vm, vcpus }
    }

    /// As sections: that of the virtual machine, and one for each vCPU.
    ///
    /// # Errors
    /// When a state cannot be encoded.
    pub(crate) fn encode(&self) -> Result<Vec<Section>, SaveError> {
        let vcpus = self.vcpus.iter().map(Section::of);
        [Section::of(&self.vm)].into_iter().chain(vcpus).collect()
    }

    /// From the `sections` that [`SavedProcessors::encode`] gives for a machine with `vcpu_count` vCPUs.
    ///
    /// # Errors
    /// When they are others, or damaged.
    pub(crate) fn decode(
        sections: &[Section],
        vcpu_count: u8,
    ) -> Result<SavedProcessors, RestoreError> {
        let invalid = |kind: &str, reason: String| RestoreError::Invalid {
            kind: kind.to_owned(),
            reason,
        };
        let Some((vm, vcpus)) = sections.split_first() else {
            return Err(invalid(VmState::KIND, "it is missing".to_owned()));
        };
        if vcpus.len() != usize::from(vcpu_count) {
            let reason = format!(
                "there are {}, and the machine has {vcpu_count}",
                vcpus.len()
            );
            return Err(invalid(VcpuState::KIND, reason));
        }
        let vm = vm.decode()?;
        let vcpus: Vec<VcpuState> = vcpus
            .iter()
            .map(Section::decode)
            .collect::<Result<_, _>>()?;
        for (index, vcpu) in (0..vcpu_count).zip(&vcpus) {
            if vcpu.index() != index {
                let reason = format!("vCPU {} is in the place of {index}", vcpu.index());
                return Err(invalid(VcpuState::KIND, reason));
            }
        }
        Ok(SavedProcessors { vm, vcpus })
    }

    /// Sets the state of a machine that has its memory and has not run yet.
    ///
    /// # Errors
    /// When the state cannot be that of such a machine on this host. The machine is of no more use then.
    pub(crate) fn restore(
        &self,
        vm: &Vm,
        vcpus: &[Vcpu],
        support: &StateSupport,
    ) -> Result<(), Error> {
        self.vm.restore_clock(vm)?;
        let mut tsc = TscRestorer::default();
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            vcpu.restore(state, support, &mut tsc)?;
        }
        self.vm.restore_interrupt_sources(vm)
    }
}
