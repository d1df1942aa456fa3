//! What a Linux guest must be told on hosts without hardware virtualization.

use crate::host::{Virtualization, virtualization};

/// Keeps a kernel from instructions that KVM's emulator does not know (`xsave` and the features
/// named), from filling and copying memory byte by byte, as it does with the features `erms` and
/// `fsrm` and the emulator then takes as long for each byte as for eight, and from measurements that
/// take long under emulation (clock calibration, the timer check). Programs still see the host's processor: as a kernel without `xsave` keeps no AVX
/// registers for them, the word that it hands to init as an environment variable keeps glibc from
/// using any. See docs/nested-kvm.md.
const KERNEL_PARAMETERS: &str = "noxsave clearcpuid=popcnt,cx16,smap,fsgsbase,rdrand,rdseed,xsave,\
     erms,fsrm tsc=reliable no_timer_check GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,\
     -AVX512BW,-AVX_Fast_Unaligned_Load";

/// Gives a kernel that is not built for such hosts a console before it reaches what it cannot do,
/// which is minutes before its ordinary one.
pub(crate) const EARLY_CONSOLE: &str = "earlyprintk=ttyS0";

/// What a Linux guest must be told on its command line on this host, if anything.
pub fn guest_kernel_parameters() -> Option<&'static str> {
    match virtualization() {
        Virtualization::Vmx | Virtualization::Svm => None,
        Virtualization::Pvm | Virtualization::None => Some(KERNEL_PARAMETERS),
    }
}

/// Whether a guest's kernel can call KVM.
pub(crate) fn hypercalls_work() -> bool {
    matches!(virtualization(), Virtualization::Vmx | Virtualization::Svm)
}

/// What to do about an instruction that KVM cannot emulate.
pub(crate) fn emulation_remedy() -> &'static str {
    match virtualization() {
        Virtualization::Vmx | Virtualization::Svm => {
            "the guest most likely ran into memory that holds no code; see its console"
        }
        Virtualization::Pvm | Virtualization::None => {
            "this host has no hardware virtualization and emulates the guest's kernel; use a \
             kernel built for such hosts (docs/nested-kvm.md), or a host with vmx or svm"
        }
    }
}
