//! What vCPUs are to be other than KVM makes them.

pub use bantam_arch::cpuid::{CpuidModifier, CpuidRegister};
pub use bantam_arch::msrs::MsrModifier;

use crate::host::{HostError, Virtualization, virtualization};

/// What is changed of the vCPUs that KVM makes, and what KVM must be able to do for it; nothing by
/// default. For embedding programs.
///
/// KVM may leave out bits that it does not know, and it decides what a guest may do: a guest can
/// have instructions that CPUID hides from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuModifiers {
    /// Changes to CPUID, in the order in which they are made. The topology stays the machine's.
    pub cpuid: Vec<CpuidModifier>,
    /// Changes to model-specific registers, in the order in which they are made.
    pub msrs: Vec<MsrModifier>,
    /// Numbers of capabilities without which the machine is not to start (KVM API,
    /// `KVM_CHECK_EXTENSION`).
    pub required_capabilities: Vec<u32>,
}

impl CpuModifiers {
    /// Checks that the host's way of running guests can honour these.
    ///
    /// # Errors
    ///
    /// [`HostError::FixedCpuid`]: CPUID is to be changed on a host without hardware virtualization.
    pub fn check_host(&self) -> Result<(), HostError> {
        self.check_virtualization(virtualization())
    }

    /// Where KVM runs programs of the guest without help of the processor, the processor answers
    /// their CPUID instructions itself.
    fn check_virtualization(&self, virtualization: Virtualization) -> Result<(), HostError> {
        match virtualization {
            Virtualization::Pvm | Virtualization::None if !self.cpuid.is_empty() => {
                Err(HostError::FixedCpuid)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuid_is_changed_only_where_the_processor_virtualizes() {
        use Virtualization::{None, Pvm, Svm, Vmx};
        let cpuid = CpuModifiers {
            cpuid: vec![CpuidModifier {
                leaf: 1,
                subleaf: 0,
                flags: 0,
                register: CpuidRegister::Ecx,
                mask: 1,
                value: 0,
            }],
            ..CpuModifiers::default()
        };
        let msrs = CpuModifiers {
            msrs: vec![MsrModifier {
                index: 0x10a,
                mask: 1,
                value: 0,
            }],
            ..CpuModifiers::default()
        };
        for (virtualization, honoured) in [(Vmx, true), (Svm, true), (Pvm, false), (None, false)] {
            assert_eq!(cpuid.check_virtualization(virtualization).is_ok(), honoured);
            assert!(msrs.check_virtualization(virtualization).is_ok());
        }
    }
}
