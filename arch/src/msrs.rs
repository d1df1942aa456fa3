//! Model-specific registers at boot.

use kvm_bindings::kvm_msr_entry;

const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_TYPE_WRITE_BACK: u64 = 6;

/// Returns the model-specific registers with which every vCPU starts.
///
/// Memory is write-back cached by default, as firmware would set it up: a guest that finds the
/// MTRRs disabled treats all memory as uncached. The time-stamp counter is not here: KVM starts
/// those of all vCPUs together, and setting them one by one could only make them differ.
///
/// KVM may not have all of these: set only those listed by `KVM_GET_MSR_INDEX_LIST`, or set them
/// one at a time.
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    [
        (IA32_SYSENTER_CS, 0),
        (IA32_SYSENTER_ESP, 0),
        (IA32_SYSENTER_EIP, 0),
        (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_TYPE_WRITE_BACK),
        (STAR, 0),
        (LSTAR, 0),
        (CSTAR, 0),
        (SYSCALL_MASK, 0),
        (KERNEL_GS_BASE, 0),
    ]
    .into_iter()
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
    .collect()
}

/// A change to a model-specific register, applied after [`boot_msrs`] are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrModifier {
    /// Which register.
    pub index: u32,
    /// Bits that are changed.
    pub mask: u64,
    /// Their new values; bits outside the mask are ignored.
    pub value: u64,
}

impl MsrModifier {
    /// Returns the new value of a register that contains `before`.
    pub fn applied_to(&self, before: u64) -> u64 {
        before & !self.mask | self.value & self.mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modifier_changes_only_the_bits_of_its_mask() {
        let modifier = MsrModifier {
            index: 0x10a,
            mask: 0xff00_0000_0000_00f0,
            value: 0x1234_5678_9abc_def0,
        };
        assert_eq!(modifier.applied_to(0), 0x1200_0000_0000_00f0);
        assert_eq!(modifier.applied_to(u64::MAX), 0x12ff_ffff_ffff_ffff);
    }

    #[test]
    fn memory_is_write_back_without_variable_or_fixed_ranges() {
        let msrs = boot_msrs();
        let default_type = msrs.iter().find(|msr| msr.index == 0x2ff).unwrap();
        assert_eq!(default_type.data, 0x806);
    }

    #[test]
    fn no_register_is_set_twice() {
        let mut indices: Vec<u32> = boot_msrs().iter().map(|msr| msr.index).collect();
        let count = indices.len();
        indices.sort_unstable();
        indices.dedup();
        assert_eq!(indices.len(), count);
    }
}
