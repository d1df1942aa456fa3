//! A vCPU: its setup and the loop that runs the guest on a thread of its own.

use std::fmt::Write;
use std::io;
use std::sync::Arc;

use bantam_arch::cpuid::{self, Topology};
use bantam_arch::{EntryProtocol, lapic, msrs, registers};
use bantam_devices::bus::Bus;
use bantam_memory::GuestMemory;
use bantam_state::RestoreError;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, KVMIO, Msrs,
    kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_signal_mask, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::config::{CpuModifiers, MsrModifier};
use crate::error::Error;
use crate::exit_reason::ExitReason;
use crate::gdb::Debugger;
use crate::kvm::{StateSupport, TscRestorer, VcpuState};
use crate::metrics::VcpuMetrics;
use crate::run_control::{RunControl, kick_signal};
use crate::vcpu_statistics::VcpuStatistics;
use crate::vm::Vm;
use crate::workarounds::{emulation_remedy, hypercalls_work};

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// Bit of RFLAGS that enables interrupts (IF).
const RFLAGS_INTERRUPTS: u64 = 1 << 9;

/// Longest instruction of the architecture in bytes.
const MAX_INSTRUCTION_SIZE: usize = 15;

/// Where and how the boot vCPU starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BootEntry {
    pub(crate) entry: GuestAddress,
    pub(crate) protocol: EntryProtocol,
}

/// The initial state that all vCPUs of a machine have in common.
pub(crate) struct VcpuModel {
    supported_cpuid: Vec<kvm_cpuid_entry2>,
    tsc_deadline_timer: bool,
    msrs: Msrs,
    topology: Topology,
    modifiers: CpuModifiers,
}

impl VcpuModel {
    /// Builds the model for the vCPUs of `topology` on this host, with `modifiers`.
    pub(crate) fn new(
        kvm: &Kvm,
        topology: Topology,
        modifiers: &CpuModifiers,
    ) -> Result<VcpuModel, Error> {
        let mut supported_cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("list the CPU features it supports"))?
            .as_slice()
            .to_vec();
        if !hypercalls_work() {
            cpuid::hide_hypercalls(&mut supported_cpuid);
        }
        let known = kvm
            .get_msr_index_list()
            .map_err(Error::kvm("list the MSRs it knows"))?;
        let mut boot_msrs = msrs::boot_msrs();
        boot_msrs.retain(|msr| known.as_slice().contains(&msr.index));
        Ok(VcpuModel {
            supported_cpuid,
            tsc_deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
            // This fails only for more entries than KVM takes, which is far beyond these.
            msrs: Msrs::from_entries(&boot_msrs).map_err(|_| Error::Kvm {
                action: "take the MSRs",
                source: kvm_ioctls::Error::new(libc::E2BIG),
            })?,
            topology,
            modifiers: modifiers.clone(),
        })
    }
}

/// A vCPU that does not run yet.
pub(crate) struct Vcpu {
    index: u8,
    fd: VcpuFd,
    metrics: Arc<VcpuMetrics>,
}

/// A vCPU that is out of the guest, between two instructions, on the thread that runs it.
pub(crate) struct ParkedVcpu<'a> {
    pub(crate) index: u8,
    pub(crate) fd: &'a VcpuFd,
    pub(crate) state_support: &'a StateSupport,
}

/// What a vCPU reaches when it leaves the guest.
pub(crate) struct VcpuEnvironment {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) control: Arc<RunControl>,
    pub(crate) state_support: StateSupport,
    pub(crate) debugger: Option<Arc<Debugger>>,
}

impl Vcpu {
    /// Creates vCPU number `index`. With `boot`, it starts there. Without, KVM keeps it off until the guest
    /// starts it by an INIT-SIPI sequence, unless it gets the state of another vCPU.
    pub(crate) fn new(
        vm: &Vm,
        model: &VcpuModel,
        index: u8,
        boot: Option<BootEntry>,
    ) -> Result<Vcpu, Error> {
        let vcpu = Vcpu::without_model(vm, index)?;
        let fd = &vcpu.fd;
        let mut table = cpuid::vcpu_cpuid(
            &model.supported_cpuid,
            index,
            model.topology,
            model.tsc_deadline_timer,
        )?;
        cpuid::modify_cpuid(&mut table, &model.modifiers.cpuid)?;
        fd.set_cpuid2(&table)
            .map_err(Error::kvm("set the CPU features of a vCPU"))?;
        let set = fd
            .set_msrs(&model.msrs)
            .map_err(Error::kvm("set the MSRs of a vCPU"))?;
        if let Some(refused) = model.msrs.as_slice().get(set) {
            tracing::debug!(
                "KVM refused to set MSR {:#x} and those after it",
                refused.index
            );
        }
        for modifier in &model.modifiers.msrs {
            modify_msr(fd, modifier)?;
        }
        if let Some(boot) = boot {
            set_boot_state(fd, boot)?;
        }
        Ok(vcpu)
    }

    /// Creates vCPU number `index`, which is to get the state of another vCPU, with its CPUID.
    pub(crate) fn without_model(vm: &Vm, index: u8) -> Result<Vcpu, Error> {
        Ok(Vcpu {
            index,
            fd: vm.create_vcpu(index)?,
            metrics: Arc::default(),
        })
    }

    /// Returns the counters of the vCPU.
    pub(crate) fn metrics(&self) -> Arc<VcpuMetrics> {
        self.metrics.clone()
    }

    /// Returns the statistics that KVM keeps of the vCPU.
    ///
    /// # Errors
    /// If KVM gives no access to them.
    pub(crate) fn statistics(&self) -> io::Result<VcpuStatistics> {
        VcpuStatistics::of(&self.fd)
    }

    /// Checks that this vCPU has what `state` promises its guest; see [`VcpuState::check_features`].
    ///
    /// # Errors
    /// If features are missing.
    pub(crate) fn check_features(&self, state: &VcpuState) -> Result<(), RestoreError> {
        state.check_features(&self.fd)
    }

    /// Gives this vCPU the saved state of another; see [`VcpuState::restore`].
    ///
    /// # Errors
    /// If it cannot be the state of a vCPU on this host.
    pub(crate) fn restore(
        &self,
        state: &VcpuState,
        support: &StateSupport,
        tsc: &mut TscRestorer,
    ) -> Result<(), RestoreError> {
        state.restore(&self.fd, support, tsc)
    }

    /// Runs the guest on the calling thread until the machine ends.
    pub(crate) fn run(mut self, environment: &VcpuEnvironment) {
        let control = &environment.control;
        let outcome = match self.unblock_kick_signal_in_guest() {
            Ok(()) => {
                // Not earlier: until it is blocked, the signal ends the process.
                control.register_vcpu_thread(self.index);
                self.run_loop(environment)
            }
            Err(error) => Err(error),
        };
        match outcome.transpose() {
            Some(outcome) => {
                if outcome.is_err() {
                    self.metrics.failures.add(1);
                    tracing::error!("{}", self.describe_registers());
                }
                control.finish(outcome);
            }
            // Shows where a guest hung that had to be stopped.
            None if tracing::enabled!(tracing::Level::DEBUG) => {
                tracing::debug!("{}", self.describe_registers());
            }
            None => {}
        }
    }

    /// Blocks the kick signal on this thread, and has KVM unblock it while it runs the guest. A
    /// signal that arrives outside the guest stays pending and ends the next entry at once.
    fn unblock_kick_signal_in_guest(&self) -> Result<(), Error> {
        /// `struct kvm_signal_mask` with the kernel's `sigset_t` of 64 bits in place.
        #[repr(C)]
        struct SignalMask {
            header: kvm_signal_mask,
            set: [u8; KERNEL_SIGSET_SIZE],
        }
        const KERNEL_SIGSET_SIZE: usize = 8;

        // SAFETY: an all-zero sigset_t is valid storage for the calls below, which get valid
        // pointers to it and change nothing but this thread's signal mask.
        let outside = unsafe {
            let mut kick: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut kick);
            libc::sigaddset(&mut kick, kick_signal());
            let mut outside: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, &kick, &mut outside);
            libc::sigdelset(&mut outside, kick_signal());
            outside
        };
        let mut mask = SignalMask {
            header: kvm_signal_mask {
                len: KERNEL_SIGSET_SIZE as u32,
                ..Default::default()
            },
            set: [0; KERNEL_SIGSET_SIZE],
        };
        for (position, byte) in mask.set.iter_mut().enumerate() {
            for bit in 0..8 {
                let signal = (position * 8 + bit + 1) as libc::c_int;
                // SAFETY: `outside` is an initialized set and `signal` a number from 1 to 64.
                if unsafe { libc::sigismember(&outside, signal) } == 1 {
                    *byte |= 1 << bit;
                }
            }
        }
        // SAFETY: KVM reads the header and the `len` bytes that follow it, all within `mask`.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_SET_SIGNAL_MASK(), &mask) };
        if result != 0 {
            return Err(Error::Kvm {
                action: "set the signal mask of a vCPU",
                source: kvm_ioctls::Error::last(),
            });
        }
        Ok(())
    }

    /// Runs the guest until the machine ends. Returns the reason if this vCPU ended it, and `None` if
    /// something else did.
    fn run_loop(&mut self, environment: &VcpuEnvironment) -> Result<Option<ExitReason>, Error> {
        let VcpuEnvironment {
            ports,
            mmio,
            control,
            ..
        } = environment;
        let metrics = self.metrics.clone();
        self.wait_while_held(environment);
        while !control.is_stopping() {
            match self.fd.run() {
                Ok(VcpuExit::MmioRead(address, data)) => {
                    metrics.exit_mmio_read.add(1);
                    mmio.read(address, data);
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    metrics.exit_mmio_write.add(1);
                    mmio.write(address, data);
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    metrics.exit_io_out.add(1);
                    let data: *const [u8] = data;
                    let width = self.port_access_width();
                    // SAFETY: the data is in the run structure that KVM shares, which is mapped for as
                    // long as the vCPU exists and changed only by the next entry.
                    for value in unsafe { &*data }.chunks(width) {
                        ports.write(port.into(), value);
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    metrics.exit_io_in.add(1);
                    let data: *mut [u8] = data;
                    let width = self.port_access_width();
                    // SAFETY: as above, and the borrow that `data` came from has ended.
                    for value in unsafe { &mut *data }.chunks_mut(width) {
                        ports.read(port.into(), value);
                    }
                }
                Ok(VcpuExit::Shutdown) => {
                    return Err(Error::TripleFault {
                        vcpu: self.index,
                        rip: self.registers().rip,
                    });
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                    return Ok(Some(ExitReason::PowerOff));
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                    return Ok(Some(ExitReason::Reboot));
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                    return Ok(Some(ExitReason::Panic));
                }
                Ok(VcpuExit::Debug(exit)) => {
                    let Some(debugger) = &environment.debugger else {
                        return Err(self.error("a debug exit without a debugger".to_owned()));
                    };
                    // This exit leaves nothing of an instruction undone, so the vCPU can wait here.
                    debugger
                        .take_debug_exit(&self.parked(environment), &exit)
                        .map_err(|error| self.error(error.to_string()))?;
                    self.wait_while_held(environment);
                }
                Ok(VcpuExit::InternalError) => {
                    let debugger = environment.debugger.as_ref();
                    if !debugger.is_some_and(|it| it.take_failure(&self.parked(environment))) {
                        return Err(self.internal_error(&environment.memory));
                    }
                    self.wait_while_held(environment);
                }
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return Err(self.error(format!("entering the guest failed ({reason:#x})")));
                }
                Ok(VcpuExit::Intr) => self.attend_to_kick(environment),
                Ok(other) => {
                    let reason = format!("an exit that this machine does not expect: {other:?}");
                    return Err(self.error(reason));
                }
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                    self.attend_to_kick(environment);
                }
                Err(error) => {
                    return Err(self.error(io::Error::from(error).to_string()));
                }
            }
        }
        Ok(None)
    }

    /// Does what the vCPU was taken out of the guest for: it says whether it has halted for good, and stays
    /// out while the machine is paused or a debugger holds it.
    ///
    /// Its registers are those between two instructions, so its state can be saved. After an access to a
    /// device, that is true only when `KVM_RUN` has been called again, which finishes the instruction before
    /// it looks for signals (KVM API, section 5, "kvm_run"). That has happened: the only way here is an entry
    /// that a signal has ended, never the exit that asked for the access.
    fn attend_to_kick(&self, environment: &VcpuEnvironment) {
        // Before looking at what is wanted: a later kick is for something later.
        take_kick_signals();
        let control = &environment.control;
        control.tell_whether_halted(self.index, || self.has_halted_for_good());
        self.wait_while_held(environment);
    }

    fn wait_while_held(&self, environment: &VcpuEnvironment) {
        if environment
            .control
            .wait_while_held(&self.parked(environment))
        {
            // This fails for a guest that does not use the clock.
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    /// Returns this vCPU, which is out of the guest, for what other threads ask of it.
    fn parked<'a>(&'a self, environment: &'a VcpuEnvironment) -> ParkedVcpu<'a> {
        ParkedVcpu {
            index: self.index,
            fd: &self.fd,
            state_support: &environment.state_support,
        }
    }

    /// Whether no interrupt can wake the vCPU: it has halted with interrupts off, or was never started. Only
    /// another vCPU can wake it, by an NMI or by starting it.
    fn has_halted_for_good(&self) -> bool {
        match self.fd.get_mp_state().map(|state| state.mp_state) {
            Ok(KVM_MP_STATE_HALTED) => self.registers().rflags & RFLAGS_INTERRUPTS == 0,
            Ok(KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) => true,
            _ => false,
        }
    }

    /// Returns the width in bytes of each access of the port exit that just happened: a string instruction
    /// makes many at once.
    fn port_access_width(&mut self) -> usize {
        // SAFETY: the exit reason was KVM_EXIT_IO, for which this is the active member; any bits
        // are a valid u8.
        let width = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        usize::from(width.max(1))
    }

    fn error(&self, reason: String) -> Error {
        Error::Vcpu {
            vcpu: self.index,
            reason,
        }
    }

    fn internal_error(&mut self, memory: &GuestMemory) -> Error {
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which this is the active
        // member; it consists of integers only.
        let failure = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.emulation_failure };
        if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return self.error(format!("internal error {}", failure.suberror));
        }
        let rip = self.registers().rip;
        let has_bytes = failure.ndata >= 3
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        let bytes = if has_bytes {
            // SAFETY: it is the only member of the union, and consists of integers only.
            let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let size = usize::from(instruction.insn_size).min(MAX_INSTRUCTION_SIZE);
            instruction.insn_bytes[..size].to_vec()
        } else {
            self.instruction_bytes(rip, memory)
        };
        Error::Emulation {
            vcpu: self.index,
            rip,
            bytes: hexadecimal(&bytes),
            remedy: emulation_remedy(),
        }
    }

    /// Returns up to [`MAX_INSTRUCTION_SIZE`] bytes from `rip` on, within its page; none if the guest's page
    /// tables do not map it.
    fn instruction_bytes(&self, rip: u64, memory: &GuestMemory) -> Vec<u8> {
        let Ok(translation) = self.fd.translate_gva(rip) else {
            return Vec::new();
        };
        let mut bytes = vec![0; MAX_INSTRUCTION_SIZE.min(0x1000 - (rip & 0xfff) as usize)];
        let address = GuestAddress(translation.physical_address);
        if translation.valid == 0 || memory.read_slice(&mut bytes, address).is_err() {
            bytes.clear();
        }
        bytes
    }

    fn registers(&self) -> kvm_regs {
        self.fd.get_regs().unwrap_or_default()
    }

    fn describe_registers(&self) -> String {
        let regs = self.registers();
        let sregs = self.fd.get_sregs().unwrap_or_default();
        format!(
            "vCPU {}: {}",
            self.index,
            format_registers(&regs, &sregs).unwrap_or_default()
        )
    }
}

/// Takes the kick signals that are pending on this thread, which would end every entry into the guest.
fn take_kick_signals() {
    const NOW: libc::timespec = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: an all-zero sigset_t is valid storage for the calls, which get valid pointers to it. The
    // signal is blocked on this thread, so it is not delivered in any other way.
    unsafe {
        let mut kick: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut kick);
        libc::sigaddset(&mut kick, kick_signal());
        while libc::sigtimedwait(&kick, std::ptr::null_mut(), &NOW) > 0 {}
    }
}

/// Changes a single MSR: for several at once, KVM would only say how many it accepted.
fn modify_msr(fd: &VcpuFd, modifier: &MsrModifier) -> Result<(), Error> {
    let index = modifier.index;
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .map_err(|_| Error::NoMsr { index })?;
    let read = fd
        .get_msrs(&mut msrs)
        .map_err(Error::kvm("read an MSR of a vCPU"))?;
    let value = match msrs.as_mut_slice() {
        [msr] if read == 1 => {
            msr.data = modifier.applied_to(msr.data);
            msr.data
        }
        _ => return Err(Error::NoMsr { index }),
    };
    match fd.set_msrs(&msrs) {
        Ok(0) => Err(Error::MsrValue { index, value }),
        Ok(_) => Ok(()),
        Err(error) => Err(Error::kvm("set an MSR of a vCPU")(error)),
    }
}

/// Sets the registers of the boot vCPU for its entry, and the wiring of the legacy interrupt pins.
fn set_boot_state(fd: &VcpuFd, boot: BootEntry) -> Result<(), Error> {
    let BootEntry { entry, protocol } = boot;
    let sregs = fd
        .get_sregs()
        .map_err(Error::kvm("read the registers of a vCPU"))?;
    fd.set_sregs(&registers::special_registers(sregs, protocol))
        .and_then(|()| fd.set_regs(&registers::general_registers(entry.0, protocol)))
        .and_then(|()| fd.set_fpu(&registers::floating_point_state()))
        .map_err(Error::kvm("set the registers of a vCPU"))?;
    let mut lapic = fd
        .get_lapic()
        .map_err(Error::kvm("read the local APIC of a vCPU"))?;
    lapic::set_local_interrupt_pins(&mut lapic);
    fd.set_lapic(&lapic)
        .map_err(Error::kvm("set the local APIC of a vCPU"))
}

fn format_registers(regs: &kvm_regs, sregs: &kvm_sregs) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    for (name, value) in [
        ("rip", regs.rip),
        ("rflags", regs.rflags),
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("r8", regs.r8),
        ("r9", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("efer", sregs.efer),
        ("cs", sregs.cs.selector.into()),
        ("ss", sregs.ss.selector.into()),
        ("idt", sregs.idt.base),
        ("gdt", sregs.gdt.base),
    ] {
        write!(text, "{name}={value:#x} ")?;
    }
    Ok(text)
}

/// Formats bytes as a debugger prints them; `unknown` if there are none.
fn hexadecimal(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "unknown".to_string();
    }
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::open_kvm;

    #[test]
    fn a_modifier_changes_the_msr_that_kvm_has() {
        const IA32_SYSENTER_EIP: u32 = 0x176;
        let Ok(kvm) = open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        let modify = |index, mask, value| modify_msr(&fd, &MsrModifier { index, mask, value });
        modify(IA32_SYSENTER_EIP, 0xffff, 0x1234).unwrap();
        modify(IA32_SYSENTER_EIP, 0xf0, 0x50).unwrap();
        let entry = kvm_msr_entry {
            index: IA32_SYSENTER_EIP,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(fd.get_msrs(&mut msrs).unwrap(), 1);
        assert_eq!(msrs.as_slice()[0].data, 0x1254);

        let error = modify(0x1234_5678, 1, 1).unwrap_err();
        assert!(
            matches!(error, Error::NoMsr { index: 0x1234_5678 }),
            "{error}"
        );
    }
}
