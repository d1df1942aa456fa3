//! What a Linux guest must be told on hosts without hardware virtualization.

use crate::host::{Virtualization, virtualization};

/// Keeps a kernel from instructions that KVM's emulator does not know (`xsave` and the features
/// named), and from measurements that take long under emulation: clock calibration by `tsc=`, the
/// timer check. See docs/nested-kvm.md.
const KERNEL_PARAMETERS: &str = "noxsave clearcpuid=popcnt,cx16,smap,fsgsbase,rdrand,rdseed,xsave \
                                 tsc=reliable no_timer_check";

/// Gives a kernel that is not built for such hosts a console before it reaches what it cannot do,
/// which is minutes before its ordinary one.
pub(crate) const EARLY_CONSOLE: &str = "earlyprintk=ttyS0";

/// The kernel parameters that the host asks for, if any.
pub(crate) fn kernel_parameters() -> Option<&'static str> {
    match virtualization() {
        Virtualization::Vmx | Virtualization::Svm => None,
        Virtualization::Pvm | Virtualization::None => Some(KERNEL_PARAMETERS),
    }
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
