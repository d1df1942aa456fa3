//! The state of a vCPU.

use bantam_arch::cpuid::missing_features;
use bantam_state::{RestoreError, SaveError, SavedState};
use kvm_bindings::{
    CpuId, KVM_CAP_SREGS2, KVM_MAX_CPUID_ENTRIES, KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, Xsave,
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use super::msrs::{self, IA32_TSC, Msr, SetMsrsError};
use super::tsc::{TscRestorer, is_same_frequency};
use super::tsc_offset::tsc_offset;
use crate::error::Error;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// Most MSRs that a saved vCPU can have. KVM lists fewer than 256.
const MAX_MSRS: usize = 1024;
/// Words of the part of the XSAVE area that every KVM has: 4 KiB.
const MIN_XSAVE_WORDS: usize = 1024;
/// Most words of an XSAVE area. The largest of today's processors is 11 KiB.
const MAX_XSAVE_WORDS: usize = 16 << 10;

/// What this host's KVM can save of a vCPU.
pub(crate) struct StateSupport {
    msrs: Vec<u32>,
    xsave_words: usize,
    sregs2: bool,
    tsc_scaling: bool,
}

impl StateSupport {
    /// Asks KVM. The process must have created a vCPU: from then on the kernel grants it no further extended
    /// processor state (`arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)`), so the size of that state is fixed.
    pub(crate) fn new(kvm: &Kvm) -> Result<StateSupport, Error> {
        let msrs = kvm
            .get_msr_index_list()
            .map_err(Error::kvm("list the MSRs it knows"))?;
        let xsave_size = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(StateSupport {
            msrs: msrs.as_slice().to_vec(),
            xsave_words: xsave_size.div_ceil(size_of::<u32>()),
            sregs2: kvm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
        })
    }

    /// Allocates a buffer for all extended processor state that KVM can save.
    fn xsave(&self) -> Result<Xsave, kvm_ioctls::Error> {
        Xsave::new(self.xsave_words.saturating_sub(MIN_XSAVE_WORDS))
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))
    }
}

/// All state that KVM keeps of a vCPU between two instructions. The floating-point state of `KVM_GET_FPU` is
/// a part of the XSAVE area.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    index: u8,
    mp_state: kvm_mp_state,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// `None` if KVM does not say.
    tsc_khz: Option<u32>,
    /// `None` if KVM is older than Linux 5.16.
    tsc_offset: Option<u64>,
    msrs: Vec<Msr>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// Page directory pointers, if the vCPU uses PAE paging and KVM returns them.
    pdptrs: Option<[u64; 4]>,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_registers: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl SavedState for VcpuState {
    const KIND: &'static str = "vcpu";
    const VERSION: u16 = 1;
}

impl VcpuState {
    /// Saves the state of vCPU `index`, which must be out of the guest between two instructions, as must all
    /// other vCPUs of the machine.
    ///
    /// # Errors
    /// If KVM does not return a part of it.
    pub(crate) fn save(
        fd: &VcpuFd,
        index: u8,
        support: &StateSupport,
    ) -> Result<VcpuState, SaveError> {
        let failed = |what| {
            move |source: kvm_ioctls::Error| SaveError::Host {
                part: part(index, what),
                source: source.into(),
            }
        };
        // First: before it answers, KVM delivers an INIT or SIPI that has arrived, which changes most of the
        // rest.
        let mp_state = fd.get_mp_state().map_err(failed("run state"))?;
        // Before the local APIC: a deadline that passes in between is in both, and at worst its interrupt
        // comes twice. The other way round it could be in neither, and the guest would wait for ever.
        let msrs = msrs::read(fd, &support.msrs).map_err(failed("MSRs"))?;
        let lapic = fd.get_lapic().map_err(failed("local APIC"))?;
        let sregs = fd.get_sregs().map_err(failed("special registers"))?;
        Ok(VcpuState {
            index,
            mp_state,
            cpuid: fd
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(failed("CPUID"))?
                .as_slice()
                .to_vec(),
            tsc_khz: fd.get_tsc_khz().ok().filter(|&khz| khz > 0),
            tsc_offset: tsc_offset(fd),
            msrs,
            regs: fd.get_regs().map_err(failed("registers"))?,
            sregs: kvm_sregs {
                // An interrupt on its way to the guest is also among the events.
                interrupt_bitmap: [0; 4],
                ..sregs
            },
            pdptrs: support
                .sregs2
                .then(|| page_directory_pointers(fd))
                .transpose()
                .map_err(failed("special registers"))?
                .flatten(),
            xsave: extended_state(fd, support).map_err(failed("extended state"))?,
            xcrs: fd.get_xcrs().map_err(failed("XCRs"))?,
            debug_registers: fd.get_debug_regs().map_err(failed("debug registers"))?,
            lapic,
            // Last, because other requests can turn what is pending into events.
            events: fd.get_vcpu_events().map_err(failed("events"))?,
        })
    }

    /// Returns the index of the vCPU.
    pub(crate) fn index(&self) -> u8 {
        self.index
    }

    /// Checks that a new vCPU of this host, with its own CPUID, has all features that this state promises the guest.
    ///
    /// # Errors
    /// [`RestoreError::Invalid`] with the names of those that are missing.
    pub(crate) fn check_features(&self, fd: &VcpuFd) -> Result<(), RestoreError> {
        let offered = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        let offered = offered.map_err(|source| RestoreError::Host {
            part: part(self.index, "CPUID"),
            source: source.into(),
        })?;
        let missing = missing_features(&self.cpuid, offered.as_slice());
        if missing.is_empty() {
            return Ok(());
        }
        Err(invalid(format!(
            "its guest was promised what this host's processor lacks: {}; use a host that has it",
            missing.join(", ")
        )))
    }

    /// Sets the state of a vCPU that has not run yet. Guest memory must be in place, and the machine's clock
    /// must be set. `tsc` has to be the same for all vCPUs of the machine.
    ///
    /// This does not check that the host has the features that CPUID promises the guest.
    ///
    /// # Errors
    /// If this host cannot give a vCPU the state. The vCPU is then of no further use.
    pub(crate) fn restore(
        &self,
        fd: &VcpuFd,
        support: &StateSupport,
        tsc: &mut TscRestorer,
    ) -> Result<(), RestoreError> {
        let failed = |what| {
            move |source: kvm_ioctls::Error| RestoreError::Host {
                part: part(self.index, what),
                source: source.into(),
            }
        };
        let cpuid = self.cpuid()?;
        let xsave = self.xsave(support)?;
        if self.msrs.len() > MAX_MSRS {
            return Err(invalid(format!("{} MSRs are too many", self.msrs.len())));
        }

        // Before all others: it determines which bits of control registers, XCRs and MSRs exist.
        fd.set_cpuid2(&cpuid).map_err(failed("CPUID"))?;
        // Before the MSRs, which hold times in its ticks.
        self.restore_tsc_frequency(fd, support)?;
        // Before the local APIC: the base address register says whether that is an x2APIC, which determines
        // the layout of its registers.
        self.restore_special_registers(fd, support)
            .map_err(failed("special registers"))?;
        // Before the events: KVM drops a pending exception when registers are set.
        fd.set_regs(&self.regs).map_err(failed("registers"))?;
        fd.set_xcrs(&self.xcrs).map_err(failed("XCRs"))?;
        // SAFETY: the buffer is at least as large as KVM said it needs when no more state could be added.
        unsafe { fd.set_xsave2(&xsave) }.map_err(failed("extended state"))?;
        fd.set_debug_regs(&self.debug_registers)
            .map_err(failed("debug registers"))?;
        // Before the MSRs: KVM ignores a TSC deadline unless the local APIC's timer is in that mode, and
        // drops the present one when the mode changes.
        fd.set_lapic(&self.lapic).map_err(failed("local APIC"))?;
        self.restore_msrs(fd, tsc)?;
        // After the special registers: if they are as after a reset, KVM assumes a reset and starts the boot
        // vCPU.
        fd.set_mp_state(self.mp_state)
            .map_err(failed("run state"))?;
        // Last, so that nothing clears or replaces what is pending.
        fd.set_vcpu_events(&self.events).map_err(failed("events"))?;
        // Time may have passed that the guest did not see. This fails for a guest that does not use the
        // clock.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }

    fn cpuid(&self) -> Result<CpuId, RestoreError> {
        // This fails only for more entries than KVM takes.
        CpuId::from_entries(&self.cpuid).map_err(|_| {
            let count = self.cpuid.len();
            invalid(format!("{count} entries of CPUID are too many"))
        })
    }

    /// Returns the extended state in a buffer of the size that KVM reads. Zeros stand for state that this
    /// host has and the other did not, so that it is as after a reset.
    fn xsave(&self, support: &StateSupport) -> Result<Xsave, RestoreError> {
        if !(MIN_XSAVE_WORDS..=MAX_XSAVE_WORDS).contains(&self.xsave.len()) {
            return Err(invalid(format!(
                "its extended state has {} bytes",
                self.xsave.len() * size_of::<u32>()
            )));
        }
        let mut buffer = support.xsave().map_err(|source| RestoreError::Host {
            part: part(self.index, "extended state"),
            source: source.into(),
        })?;
        let (region, extra) = self.xsave.split_at(MIN_XSAVE_WORDS);
        // SAFETY: only the length of the buffer must not be changed, and it is not.
        let header = unsafe { buffer.as_mut_fam_struct() };
        header.xsave.region.copy_from_slice(region);
        let room = buffer.as_mut_slice();
        let (extra, beyond) = extra.split_at(extra.len().min(room.len()));
        if beyond.iter().any(|&word| word != 0) {
            return Err(invalid(
                "its extended state has parts that this host's processor lacks".to_owned(),
            ));
        }
        room[..extra.len()].copy_from_slice(extra);
        Ok(buffer)
    }

    fn restore_tsc_frequency(
        &self,
        fd: &VcpuFd,
        support: &StateSupport,
    ) -> Result<(), RestoreError> {
        let (Some(wanted), Ok(found)) = (self.tsc_khz, fd.get_tsc_khz()) else {
            return Ok(());
        };
        if is_same_frequency(wanted, found) {
            return Ok(());
        }
        // Without scaling, KVM may accept the frequency anyway, and then slow down or fail to keep it.
        if !support.tsc_scaling {
            return Err(invalid(format!(
                "its clock runs at {wanted} kHz, and this host's processor only has {found} kHz"
            )));
        }
        fd.set_tsc_khz(wanted).map_err(|source| RestoreError::Host {
            part: part(self.index, "clock frequency"),
            source: source.into(),
        })
    }

    fn restore_special_registers(
        &self,
        fd: &VcpuFd,
        support: &StateSupport,
    ) -> Result<(), kvm_ioctls::Error> {
        match self.pdptrs {
            Some(pdptrs) if support.sregs2 => set_sregs2(fd, &self.sregs, pdptrs),
            // KVM reads the page directory pointers from guest memory.
            _ => fd.set_sregs(&self.sregs),
        }
    }

    fn restore_msrs(&self, fd: &VcpuFd, tsc: &mut TscRestorer) -> Result<(), RestoreError> {
        let failed = |source: kvm_ioctls::Error| RestoreError::Host {
            part: part(self.index, "MSRs"),
            source: source.into(),
        };
        let mut msrs = self.msrs.clone();
        let counter = msrs.iter().find(|msr| msr.index == IA32_TSC);
        if let Some(counter) = counter
            && tsc
                .restore(fd, counter.value, self.tsc_offset)
                .map_err(failed)?
        {
            msrs.retain(|msr| msr.index != IA32_TSC);
        }
        msrs::set(fd, msrs).map_err(|error| match error {
            SetMsrsError::Kvm(source) => failed(source),
            refused @ SetMsrsError::Refused(_) => invalid(refused.to_string()),
        })
    }
}

/// Names a part of a vCPU for messages.
fn part(index: u8, what: &str) -> String {
    format!("vCPU {index}: {what}")
}

fn invalid(reason: String) -> RestoreError {
    RestoreError::Invalid {
        kind: VcpuState::KIND.to_owned(),
        reason,
    }
}

fn extended_state(fd: &VcpuFd, support: &StateSupport) -> Result<Vec<u32>, kvm_ioctls::Error> {
    // This KVM is older than Linux 5.17.
    if support.xsave_words == 0 {
        return Ok(fd.get_xsave()?.region.to_vec());
    }
    let mut xsave = support.xsave()?;
    // SAFETY: the buffer is as large as KVM said it needs when no more state could be added.
    unsafe { fd.get_xsave2(&mut xsave) }?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

fn page_directory_pointers(fd: &VcpuFd) -> Result<Option<[u64; 4]>, kvm_ioctls::Error> {
    let mut sregs2 = kvm_sregs2::default();
    // SAFETY: KVM writes a kvm_sregs2, and it gets a reference to one.
    let result = unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut sregs2) };
    if result != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    let valid = sregs2.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    Ok(valid.then_some(sregs2.pdptrs))
}

fn set_sregs2(fd: &VcpuFd, sregs: &kvm_sregs, pdptrs: [u64; 4]) -> Result<(), kvm_ioctls::Error> {
    let sregs2 = kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: KVM_SREGS2_FLAGS_PDPTRS_VALID.into(),
        pdptrs,
    };
    // SAFETY: KVM reads a kvm_sregs2, and it gets a reference to one.
    let result = unsafe { ioctl_with_ref(fd, KVM_SET_SREGS2(), &sregs2) };
    if result != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bantam_memory::GuestMemory;
    use bantam_state::Section;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::host::open_kvm;
    use crate::vm::Vm;

    const IA32_SYSENTER_EIP: u32 = 0x176;

    /// A virtual machine with the memory and interrupt controllers that a vCPU needs.
    struct Host {
        kvm: Kvm,
        vm: Vm,
        fd: VcpuFd,
        support: StateSupport,
    }

    /// Returns `None` if there is no KVM here.
    fn host() -> Option<Host> {
        let Ok(kvm) = open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return None;
        };
        let (vm, fd) = vcpu(&kvm);
        let support = StateSupport::new(&kvm).unwrap();
        Some(Host {
            kvm,
            vm,
            fd,
            support,
        })
    }

    fn vcpu(kvm: &Kvm) -> (Vm, VcpuFd) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let vm = Vm::new(kvm, Arc::new(memory), false).unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        (vm, fd)
    }

    /// Returns the state of a vCPU in which no part is empty.
    fn full_state(host: &Host) -> VcpuState {
        let cpuid = host.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        host.fd.set_cpuid2(&cpuid).unwrap();
        let mut state = VcpuState::save(&host.fd, 0, &host.support).unwrap();
        state.regs.rax = 0x1122_3344_5566_7788;
        state.regs.rip = 0x1234;
        state.debug_registers.db[0] = 0x5000;
        // XMM0. XSTATE_BV says that SSE state is present.
        state.xsave[40..44].copy_from_slice(&[1, 2, 3, 4]);
        state.xsave[128] |= 0b11;
        for msr in &mut state.msrs {
            if msr.index == IA32_SYSENTER_EIP {
                msr.value = 0x4242;
            }
        }
        state.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_HALTED;
        state.events.nmi.pending = 1;
        state
    }

    /// Returns `state` without what changes with time.
    fn at_rest(state: &VcpuState) -> VcpuState {
        let mut state = state.clone();
        state.msrs.retain(|msr| msr.index != IA32_TSC);
        state.tsc_offset = None;
        state
    }

    #[test]
    fn a_vcpu_gets_the_state_of_another() {
        let Some(host) = host() else { return };
        let state = full_state(&host);
        let section = Section::of(&state).unwrap();
        let state: VcpuState = section.decode().unwrap();

        let (_vm, fd) = vcpu(&host.kvm);
        state
            .restore(&fd, &host.support, &mut TscRestorer::default())
            .unwrap();
        let restored = VcpuState::save(&fd, 0, &host.support).unwrap();
        assert_eq!(at_rest(&restored), at_rest(&state));
        assert_eq!(restored.index(), 0);
        drop(host.vm);
    }

    #[test]
    fn sizes_that_no_vcpu_has_are_refused() {
        let Some(host) = host() else { return };
        let state = full_state(&host);
        let refused = |change: &dyn Fn(&mut VcpuState), expected: &str| {
            let mut state = state.clone();
            change(&mut state);
            let error = state
                .restore(&host.fd, &host.support, &mut TscRestorer::default())
                .unwrap_err();
            assert!(
                matches!(&error, RestoreError::Invalid { kind, reason } if kind == "vcpu" && reason.contains(expected)),
                "{error}"
            );
        };
        refused(&|state| state.xsave.truncate(1023), "4092 bytes");
        refused(
            &|state| state.xsave.resize(MAX_XSAVE_WORDS + 1, 0),
            "65540 bytes",
        );
        refused(&|state| state.xsave.push(1), "lacks");
        refused(&|state| state.cpuid = vec![state.cpuid[0]; 257], "257");
        refused(&|state| state.msrs = vec![state.msrs[0]; 1025], "1025");
        if !host.support.tsc_scaling {
            refused(&|state| state.tsc_khz = Some(1), "1 kHz");
        }
        let unknown = Msr {
            index: 0x1234_5678,
            value: 1,
        };
        refused(&|state| state.msrs.push(unknown), "0x12345678");
    }

    #[test]
    fn extended_state_of_a_larger_host_is_taken_if_it_is_empty() {
        let Some(host) = host() else { return };
        let mut state = full_state(&host);
        state.xsave.resize(MAX_XSAVE_WORDS, 0);
        let (_vm, fd) = vcpu(&host.kvm);
        state
            .restore(&fd, &host.support, &mut TscRestorer::default())
            .unwrap();
    }

    /// Applies `changes`, each a place and a change of its byte, to `bytes`.
    fn changed(bytes: &[u8], changes: &[(u16, u8)]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for &(place, change) in changes {
            let place = usize::from(place) % bytes.len();
            bytes[place] ^= change;
        }
        bytes
    }

    #[test]
    fn damaged_state_is_set_or_refused() {
        let Some(host) = host() else { return };
        let bytes = postcard::to_stdvec(&full_state(&host)).unwrap();
        bolero::check!()
            .with_type::<Vec<(u16, u8)>>()
            .for_each(|changes| {
                let bytes = changed(&bytes, changes);
                if let Ok(state) = postcard::from_bytes::<VcpuState>(&bytes) {
                    let (_vm, fd) = vcpu(&host.kvm);
                    let mut tsc = TscRestorer::default();
                    if state.restore(&fd, &host.support, &mut tsc).is_ok() {
                        let _ = VcpuState::save(&fd, 0, &host.support);
                    }
                }
            });
    }

    #[test]
    fn any_bytes_are_decoded_or_refused() {
        bolero::check!().for_each(|bytes| {
            let _ = postcard::from_bytes::<VcpuState>(bytes);
        });
    }
}
