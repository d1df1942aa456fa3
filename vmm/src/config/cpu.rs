//! Changes to the vCPUs that KVM creates.

pub use bantam_arch::cpuid::{CpuidModifier, CpuidRegister};
pub use bantam_arch::msrs::MsrModifier;
use serde::{Deserialize, Serialize};

use super::WideNumber;

use crate::host::{HostError, Virtualization, virtualization};

/// Changes to the vCPUs that KVM creates, and the capabilities that KVM must have for them. Both are empty
/// by default.
///
/// KVM may ignore bits that it does not know, and it decides what a guest may do: a guest may be able to
/// use instructions that CPUID hides from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "changes to vCPUs: a table with cpuid, msrs and required-capabilities"
)]
pub struct CpuModifiers {
    /// Changes to CPUID, in the order in which they are made. They cannot change the machine's topology.
    #[serde(with = "cpuid", skip_serializing_if = "Vec::is_empty")]
    pub cpuid: Vec<CpuidModifier>,
    /// Changes to model-specific registers, in the order in which they are made.
    #[serde(with = "msrs", skip_serializing_if = "Vec::is_empty")]
    pub msrs: Vec<MsrModifier>,
    /// Numbers of the capabilities that KVM must have for the machine to start (KVM API,
    /// `KVM_CHECK_EXTENSION`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub required_capabilities: Vec<u32>,
}

/// Reads and writes lists of [`CpuidModifier`]s.
mod cpuid {
    use serde::{Deserializer, Serializer};

    use super::{CpuidKeys, CpuidModifier, Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Item(#[serde(with = "CpuidKeys")] CpuidModifier);

    pub(super) fn serialize<S: Serializer>(
        list: &[CpuidModifier],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().copied().map(Item))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<CpuidModifier>, D::Error> {
        let items = Vec::<Item>::deserialize(deserializer)?;
        Ok(items.into_iter().map(|item| item.0).collect())
    }
}

/// The keys of a [`CpuidModifier`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "CpuidModifier", deny_unknown_fields)]
struct CpuidKeys {
    leaf: u32,
    #[serde(default)]
    subleaf: u32,
    #[serde(default)]
    flags: u32,
    #[serde(with = "RegisterName")]
    register: CpuidRegister,
    mask: u32,
    value: u32,
}

/// Names of [`CpuidRegister`]s.
#[derive(Serialize, Deserialize)]
#[serde(remote = "CpuidRegister", rename_all = "lowercase")]
enum RegisterName {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Reads and writes lists of [`MsrModifier`]s.
mod msrs {
    use serde::{Deserializer, Serializer};

    use super::{Deserialize, MsrKeys, MsrModifier, WideNumber};

    pub(super) fn serialize<S: Serializer>(
        list: &[MsrModifier],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|modifier| MsrKeys {
            index: modifier.index,
            mask: WideNumber(modifier.mask),
            value: WideNumber(modifier.value),
        }))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<MsrModifier>, D::Error> {
        let items = Vec::<MsrKeys>::deserialize(deserializer)?.into_iter();
        let modifiers = items.map(|keys| MsrModifier {
            index: keys.index,
            mask: keys.mask.0,
            value: keys.value.0,
        });
        Ok(modifiers.collect())
    }
}

/// The keys of a [`MsrModifier`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MsrKeys {
    index: u32,
    mask: WideNumber,
    value: WideNumber,
}

impl CpuModifiers {
    /// Checks that the host's way of running guests allows these changes.
    ///
    /// # Errors
    ///
    /// [`HostError::FixedCpuid`] if CPUID is to be changed on a host without hardware virtualization.
    pub fn check_host(&self) -> Result<(), HostError> {
        self.check_virtualization(virtualization())
    }

    /// Checks the same, given how the host runs guests. If KVM runs programs of the guest without help from
    /// the processor, the processor answers their CPUID instructions itself.
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
