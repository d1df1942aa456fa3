//! Changes to CPUID leaves at the user's request.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::{
    CACHES_AMD, CACHES_INTEL, ECX_CORE_MULTIPROCESSING_LEGACY, EDX_HYPER_THREADING, FEATURES,
    FEATURES_AMD, IDS_AMD, SIZES_AMD, TOPOLOGY, TOPOLOGY_V2,
};
use crate::error::{Error, Result};

/// A change to one register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidModifier {
    /// The leaf: what the guest puts into EAX.
    pub leaf: u32,
    /// The subleaf: what it puts into ECX, and zero for a leaf without subleaves.
    pub subleaf: u32,
    /// Flags of the entry (KVM API, `KVM_SET_CPUID2`); bit 0 says that the leaf has subleaves.
    pub flags: u32,
    /// Which register is changed.
    pub register: CpuidRegister,
    /// Bits that are changed.
    pub mask: u32,
    /// Their new values; bits outside the mask are ignored.
    pub value: u32,
}

/// A register in which CPUID returns a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Applies `modifiers` in order to a table that [`vcpu_cpuid`](super::vcpu_cpuid) has made.
///
/// The topology stays that of the machine: modifiers do not change the ids and counts that its
/// [`Topology`](super::Topology) decides. So a description of a whole processor that was taken from
/// one vCPU can be applied to all.
///
/// # Errors
/// [`Error::NoCpuidLeaf`] if the table does not have a leaf that should be changed.
pub fn modify_cpuid(table: &mut CpuId, modifiers: &[CpuidModifier]) -> Result<()> {
    for modifier in modifiers {
        let &CpuidModifier { leaf, subleaf, .. } = modifier;
        let mut entries = table.as_mut_slice().iter_mut();
        let entry = entries
            .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
            .ok_or(Error::NoCpuidLeaf { leaf, subleaf })?;
        modifier.apply(entry);
    }
    Ok(())
}

impl CpuidModifier {
    fn apply(&self, entry: &mut kvm_cpuid_entry2) {
        let register = match self.register {
            CpuidRegister::Eax => &mut entry.eax,
            CpuidRegister::Ebx => &mut entry.ebx,
            CpuidRegister::Ecx => &mut entry.ecx,
            CpuidRegister::Edx => &mut entry.edx,
        };
        let mask = self.mask & !topology_bits(self.leaf, self.register);
        *register = *register & !mask | self.value & mask;
        entry.flags = self.flags;
    }
}

/// Bits that say which vCPUs exist, or which of them executes CPUID.
fn topology_bits(leaf: u32, register: CpuidRegister) -> u32 {
    match (leaf, register) {
        (FEATURES, CpuidRegister::Ebx) => 0xffff_0000,
        (FEATURES, CpuidRegister::Edx) => 1 << EDX_HYPER_THREADING,
        (FEATURES_AMD, CpuidRegister::Ecx) => 1 << ECX_CORE_MULTIPROCESSING_LEGACY,
        (CACHES_INTEL | CACHES_AMD, CpuidRegister::Eax) => 0xffff_c000,
        (SIZES_AMD, CpuidRegister::Ecx) => 0xf0ff,
        (TOPOLOGY | TOPOLOGY_V2 | IDS_AMD, _) => u32::MAX,
        _ => 0,
    }
}
