//! Kernel parameters that a Linux guest needs on hosts without hardware virtualization.

use bantam_boot::CommandLine;

use crate::error::Error;
use crate::host::{Virtualization, virtualization};

/// Keeps a kernel from four things: instructions that KVM's emulator does not know; filling and copying
/// memory byte by byte, as it does with the features `erms` and `fsrm`, because the emulator takes as long
/// for one byte as for eight; measurements that take long under emulation (clock calibration, the timer
/// check); and a hypercall for KVM's clock (`ptp_kvm`), which never returns. See docs/nested-kvm.md.
const KERNEL_PARAMETERS: &str = "clearcpuid=popcnt,cx16,smap,fsgsbase,rdrand,rdseed,xsave,erms,fsrm \
     tsc=reliable no_timer_check initcall_blacklist=ptp_kvm_init";

/// Keeps glibc from using AVX registers. Programs see the host's processor, but a kernel without `xsave`
/// does not save AVX registers for them. The kernel passes this word on to init as an environment variable.
const ENVIRONMENT: &str = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,\
     -AVX_Fast_Unaligned_Load";

/// Gives a kernel that is not built for such hosts a console before it reaches what it cannot do; its
/// ordinary console would come minutes later.
const EARLY_CONSOLE: &str = "earlyprintk=ttyS0";

/// Parameter for the frequency of the time stamp counter in kHz.
const CLOCK_PARAMETER: &str = "tsc_early_khz";

/// Returns the parameters that a Linux guest needs on its command line on this host, if any.
pub fn guest_kernel_parameters() -> Option<String> {
    match virtualization() {
        Virtualization::Vmx | Virtualization::Svm => None,
        Virtualization::Pvm | Virtualization::None => {
            Some(format!("{KERNEL_PARAMETERS} {ENVIRONMENT}"))
        }
    }
}

/// Adds the parameters that this host needs to `line`: an early console only if there is a serial port, and
/// no parameter that the kernel would pass on to the guest's init, as `passes_to_init` tells.
///
/// Without KVM's clock a kernel measures the time stamp counter itself, which can fail under emulation; the
/// kernel then waits for ever. So it is told that the counter runs at `tsc_khz` kHz, if KVM knows.
pub(crate) fn add_guest_kernel_parameters(
    line: &mut CommandLine,
    has_serial_port: bool,
    tsc_khz: Option<u32>,
    passes_to_init: impl Fn(&str) -> Result<bool, Error>,
) -> Result<(), Error> {
    if guest_kernel_parameters().is_none() {
        return Ok(());
    }
    tracing::info!("this host has no hardware virtualization: the kernel is told what it needs");
    let early_console = (has_serial_port && !line.has_parameter("quiet")).then_some(EARLY_CONSOLE);
    let clock = tsc_khz.map(|khz| format!("{CLOCK_PARAMETER}={khz}"));
    let words = KERNEL_PARAMETERS.split(' ').chain(early_console);
    for word in words.chain(clock.as_deref()) {
        if !passes_to_init(parameter_name(word))? {
            line.append(word)?;
        }
    }
    // The last one of a name wins, and the user's is to win.
    if !line.names_parameter(parameter_name(ENVIRONMENT)) {
        line.append(ENVIRONMENT)?;
    }
    Ok(())
}

fn parameter_name(word: &str) -> &str {
    word.split_once('=').map_or(word, |(name, _)| name)
}

/// Whether hypercalls of a guest's kernel reach KVM.
pub(crate) fn hypercalls_work() -> bool {
    matches!(virtualization(), Virtualization::Vmx | Virtualization::Svm)
}

/// Says what to do about an instruction that KVM cannot emulate.
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
