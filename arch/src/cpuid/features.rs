//! Features that one CPUID table promises and another lacks.

use kvm_bindings::kvm_cpuid_entry2;

use super::{ECX_HYPERVISOR, EDX_HYPER_THREADING, FEATURES, FEATURES_AMD, KVM_FEATURES};

const VENDOR: u32 = 0;
const STRUCTURED_FEATURES: u32 = 7;
const EXTENDED_STATE: u32 = 0xd;
const POWER_MANAGEMENT: u32 = 0x8000_0007;
const EXTENDED_FEATURES: u32 = 0x8000_0008;

/// Follow control register 4, so they are no features.
const ECX_OSXSAVE: u32 = 27;
const ECX_OSPKE: u32 = 4;

/// A register that CPUID returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// Registers in which each bit is a feature: leaf, subleaf, register, and the bits that are not. (CPUID in Intel SDM volume
/// 2, and appendix E.3 and E.4 of AMD APM volume 3.)
const FEATURE_REGISTERS: [(u32, u32, Register, u32); 16] = [
    (FEATURES, 0, Ecx, 1 << ECX_OSXSAVE | 1 << ECX_HYPERVISOR),
    (FEATURES, 0, Edx, 1 << EDX_HYPER_THREADING),
    (STRUCTURED_FEATURES, 0, Ebx, 0),
    (STRUCTURED_FEATURES, 0, Ecx, 1 << ECX_OSPKE),
    (STRUCTURED_FEATURES, 0, Edx, 0),
    (STRUCTURED_FEATURES, 1, Eax, 0),
    (STRUCTURED_FEATURES, 1, Edx, 0),
    (STRUCTURED_FEATURES, 2, Edx, 0),
    (EXTENDED_STATE, 0, Eax, 0),
    (EXTENDED_STATE, 1, Eax, 0),
    (KVM_FEATURES, 0, Eax, 0),
    (FEATURES_AMD, 0, Ecx, 0),
    (FEATURES_AMD, 0, Edx, 0),
    (POWER_MANAGEMENT, 0, Edx, 0),
    (EXTENDED_FEATURES, 0, Ebx, 0),
    (0x8000_0021, 0, Eax, 0),
];

/// Names of features as Linux has them in /proc/cpuinfo.
const NAMES: [(u32, u32, Register, u32, &str); 47] = [
    (FEATURES, 0, Ecx, 0, "sse3"),
    (FEATURES, 0, Ecx, 1, "pclmulqdq"),
    (FEATURES, 0, Ecx, 9, "ssse3"),
    (FEATURES, 0, Ecx, 12, "fma"),
    (FEATURES, 0, Ecx, 13, "cx16"),
    (FEATURES, 0, Ecx, 17, "pcid"),
    (FEATURES, 0, Ecx, 19, "sse4_1"),
    (FEATURES, 0, Ecx, 20, "sse4_2"),
    (FEATURES, 0, Ecx, 21, "x2apic"),
    (FEATURES, 0, Ecx, 22, "movbe"),
    (FEATURES, 0, Ecx, 23, "popcnt"),
    (FEATURES, 0, Ecx, 24, "tsc_deadline_timer"),
    (FEATURES, 0, Ecx, 25, "aes"),
    (FEATURES, 0, Ecx, 26, "xsave"),
    (FEATURES, 0, Ecx, 28, "avx"),
    (FEATURES, 0, Ecx, 29, "f16c"),
    (FEATURES, 0, Ecx, 30, "rdrand"),
    (STRUCTURED_FEATURES, 0, Ebx, 0, "fsgsbase"),
    (STRUCTURED_FEATURES, 0, Ebx, 3, "bmi1"),
    (STRUCTURED_FEATURES, 0, Ebx, 5, "avx2"),
    (STRUCTURED_FEATURES, 0, Ebx, 7, "smep"),
    (STRUCTURED_FEATURES, 0, Ebx, 8, "bmi2"),
    (STRUCTURED_FEATURES, 0, Ebx, 9, "erms"),
    (STRUCTURED_FEATURES, 0, Ebx, 10, "invpcid"),
    (STRUCTURED_FEATURES, 0, Ebx, 16, "avx512f"),
    (STRUCTURED_FEATURES, 0, Ebx, 17, "avx512dq"),
    (STRUCTURED_FEATURES, 0, Ebx, 18, "rdseed"),
    (STRUCTURED_FEATURES, 0, Ebx, 19, "adx"),
    (STRUCTURED_FEATURES, 0, Ebx, 20, "smap"),
    (STRUCTURED_FEATURES, 0, Ebx, 23, "clflushopt"),
    (STRUCTURED_FEATURES, 0, Ebx, 24, "clwb"),
    (STRUCTURED_FEATURES, 0, Ebx, 28, "avx512cd"),
    (STRUCTURED_FEATURES, 0, Ebx, 29, "sha_ni"),
    (STRUCTURED_FEATURES, 0, Ebx, 30, "avx512bw"),
    (STRUCTURED_FEATURES, 0, Ebx, 31, "avx512vl"),
    (STRUCTURED_FEATURES, 0, Ecx, 3, "pku"),
    (STRUCTURED_FEATURES, 0, Ecx, 16, "la57"),
    (STRUCTURED_FEATURES, 0, Edx, 24, "amx_tile"),
    (EXTENDED_STATE, 1, Eax, 0, "xsaveopt"),
    (EXTENDED_STATE, 1, Eax, 1, "xsavec"),
    (EXTENDED_STATE, 1, Eax, 3, "xsaves"),
    (FEATURES_AMD, 0, Ecx, 0, "lahf_lm"),
    (FEATURES_AMD, 0, Ecx, 5, "abm"),
    (FEATURES_AMD, 0, Ecx, 6, "sse4a"),
    (FEATURES_AMD, 0, Edx, 26, "pdpe1gb"),
    (FEATURES_AMD, 0, Edx, 27, "rdtscp"),
    (POWER_MANAGEMENT, 0, Edx, 8, "constant_tsc"),
];

/// Returns the name of a feature.
fn name(leaf: u32, subleaf: u32, register: Register, bit: u32) -> String {
    let known = NAMES
        .iter()
        .find(|it| (it.0, it.1, it.2, it.3) == (leaf, subleaf, register, bit));
    match known {
        Some((.., name)) => (*name).to_owned(),
        None => format!("CPUID {leaf:#x}.{subleaf} {register:?} bit {bit}").to_lowercase(),
    }
}

fn entry(table: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    table
        .iter()
        .find(|entry| entry.function == leaf && entry.index == subleaf)
}

/// Returns the names of the features that the CPUID table `promised` has and the table `offered` lacks. A vendor that
/// differs is one of them, as a guest depends on much that only processors of its vendor have.
pub fn missing_features(
    promised: &[kvm_cpuid_entry2],
    offered: &[kvm_cpuid_entry2],
) -> Vec<String> {
    let vendor = |table| entry(table, VENDOR, 0).map(|it| (it.ebx, it.ecx, it.edx));
    let mut missing = Vec::new();
    if vendor(promised) != vendor(offered) {
        missing.push("the processor's vendor".to_owned());
    }
    for (leaf, subleaf, register, ignored) in FEATURE_REGISTERS {
        let bits = |table| entry(table, leaf, subleaf).map_or(0, |entry| register.of(entry));
        let lacking = bits(promised) & !bits(offered) & !ignored;
        let lacking = (0..u32::BITS).filter(|bit| lacking >> bit & 1 != 0);
        missing.extend(lacking.map(|bit| name(leaf, subleaf, register, bit)));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ecx: u32, ebx_7: u32) -> Vec<kvm_cpuid_entry2> {
        let entry = |function, ebx, ecx| kvm_cpuid_entry2 {
            function,
            ebx,
            ecx,
            ..Default::default()
        };
        vec![
            entry(VENDOR, 1, 2),
            entry(FEATURES, 0, ecx),
            entry(STRUCTURED_FEATURES, ebx_7, 0),
        ]
    }

    #[test]
    fn what_is_missing_is_named() {
        let promised = table(1 << 28 | 1 << ECX_OSXSAVE | 1 << 7, 1 << 5);
        assert_eq!(missing_features(&promised, &promised), [""; 0]);
        assert_eq!(
            missing_features(&promised, &table(1 << 1, 0)),
            ["cpuid 0x1.0 ecx bit 7", "avx", "avx2"]
        );
        // More features do no harm.
        assert_eq!(missing_features(&table(0, 0), &promised), [""; 0]);
        let mut other = promised.clone();
        other[0].ebx = 7;
        assert_eq!(
            missing_features(&promised, &other),
            ["the processor's vendor"]
        );
        assert_eq!(missing_features(&promised, &[]).len(), 4);
    }
}
