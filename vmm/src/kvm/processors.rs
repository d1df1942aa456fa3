//! The state of a machine's virtual machine and vCPUs together.

use std::time::Duration;

use bantam_state::{RestoreError, SaveError, SavedState, Section};

use super::tsc::TscRestorer;
use super::vcpu_state::{StateSupport, VcpuState};
use super::vm_state::VmState;
use crate::error::Error;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// The state, besides memory, that a machine goes on from instead of booting.
pub(crate) struct SavedProcessors {
    vm: VmState,
    /// Ordered by index.
    vcpus: Vec<VcpuState>,
}

impl SavedProcessors {
    /// Creates it from the saved states of the virtual machine and all its vCPUs, ordered by index.
    pub(crate) fn new(vm: VmState, vcpus: Vec<VcpuState>) -> SavedProcessors {
        SavedProcessors { vm, vcpus }
    }

    /// Encodes the state as sections: one of the virtual machine, and then one of each vCPU.
    ///
    /// # Errors
    /// If a state cannot be encoded.
    pub(crate) fn encode(&self) -> Result<Vec<Section>, SaveError> {
        let vcpus = self.vcpus.iter().map(Section::of);
        [Section::of(&self.vm)].into_iter().chain(vcpus).collect()
    }

    /// Decodes the `sections` that [`SavedProcessors::encode`] returns for a machine with `vcpu_count` vCPUs.
    ///
    /// # Errors
    /// If the sections are not those of such a machine, or damaged.
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

    /// Lets the guest's clock go on as if the machine had run since its state was saved, at `saved_at` since 1970.
    pub(crate) fn catch_up_clock(&mut self, saved_at: Duration) {
        self.vm.catch_up_clock(saved_at);
    }

    /// Checks that `vcpus`, which have CPUID of this host, have all features that the guest was promised.
    ///
    /// # Errors
    /// If some are missing.
    pub(crate) fn check_features(&self, vcpus: &[Vcpu]) -> Result<(), RestoreError> {
        let mut pairs = vcpus.iter().zip(&self.vcpus);
        pairs.try_for_each(|(vcpu, state)| vcpu.check_features(state))
    }

    /// Sets the state of a machine that has its memory and has not run yet.
    ///
    /// # Errors
    /// If this host cannot give such a machine the state. The machine is then of no further use.
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
