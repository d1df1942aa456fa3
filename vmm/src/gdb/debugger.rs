//! What the threads of vCPUs and the thread that talks to gdb have in common.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use bantam_memory::GuestMemory;
use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, KVM_MP_STATE_HALTED, kvm_debug_exit_arch, kvm_guest_debug,
};
use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::breakpoints::{Access, DebugRegisters, SoftwareBreakpoints};
use super::delivery::{self, Delivery};
use super::guest_memory;
use crate::host::{Virtualization, virtualization};
use crate::lock::lock;
use crate::run_control::{RunControl, VcpuSet};
use crate::vcpu::ParkedVcpu;

/// Number of the debug exception (#DB), and of the breakpoint exception (#BP).
const DEBUG_EXCEPTION: u8 = 1;
const BREAKPOINT_EXCEPTION: u8 = 3;

/// Bit of DR6 that says that a single step has ended (BS).
const DR6_STEP: u64 = 1 << 14;

/// Why a vCPU has stopped for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stop {
    pub(super) vcpu: u8,
    pub(super) cause: Cause,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A breakpoint instruction.
    Software,
    /// A breakpoint instruction that the debugger has set at another address of the same memory.
    SharedSoftware,
    /// A debug register with the address of an instruction.
    Hardware,
    /// A debug register with this address of data.
    Watch { address: u64, access: Access },
    /// The vCPU has executed the instruction that it was to execute.
    Step,
}

/// The breakpoints of the debugger, and why vCPUs have stopped.
pub(crate) struct Debugger {
    control: Arc<RunControl>,
    memory: Arc<GuestMemory>,
    vcpu_count: u8,
    /// Whether KVM can keep interrupts away from a vCPU during a single step.
    blocks_interrupts: bool,
    /// Whether KVM delivers the exceptions of programs to the guest.
    delivers_to_guest: bool,
    state: Mutex<State>,
    /// Signalled when a vCPU has stopped.
    stopped: EventFd,
}

/// Only `stops` and `passing` change while vCPUs are in the guest.
#[derive(Default)]
struct State {
    is_attached: bool,
    software: SoftwareBreakpoints,
    registers: DebugRegisters,
    /// The vCPUs that are to execute one instruction.
    stepping: VcpuSet,
    /// The vCPUs that execute the first instruction of their handler of a program's exception, which is not the
    /// debugger's.
    passing: VcpuSet,
    /// In the order in which they have happened.
    stops: VecDeque<Stop>,
}

impl Debugger {
    /// Creates a debugger, to which no gdb is connected, of a machine with `vcpu_count` vCPUs.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub(super) fn new(
        kvm: &Kvm,
        control: &Arc<RunControl>,
        memory: &Arc<GuestMemory>,
        vcpu_count: u8,
    ) -> io::Result<Debugger> {
        let flags = kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        Ok(Debugger {
            control: control.clone(),
            memory: memory.clone(),
            vcpu_count,
            delivers_to_guest: virtualization() == Virtualization::Pvm,
            blocks_interrupts: flags & KVM_GUESTDBG_BLOCKIRQ as i32 != 0,
            state: Mutex::default(),
            stopped: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    pub(super) fn vcpu_count(&self) -> u8 {
        self.vcpu_count
    }

    pub(super) fn control(&self) -> &RunControl {
        &self.control
    }

    /// Returns a descriptor that is readable when a vCPU has stopped since the last [`Debugger::take_stop`].
    pub(super) fn stopped_event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the event exists, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.stopped.as_raw_fd()) }
    }

    /// Takes all vCPUs out of the guest. Returns `false` if the machine ends first.
    pub(super) fn stop_all(&self) -> bool {
        self.control.hold_all_vcpus();
        self.control.await_held_vcpus(self.vcpu_count.into())
    }

    /// Begins a session, for which all vCPUs must be stopped.
    pub(super) fn attach(&self) {
        lock(&self.state).is_attached = true;
    }

    /// Ends a session: removes all breakpoints, and lets all vCPUs go on.
    pub(super) fn detach(self: &Arc<Debugger>) {
        // Otherwise the machine has ended.
        if self.stop_all() {
            {
                let mut state = lock(&self.state);
                let State {
                    software,
                    registers,
                    ..
                } = &mut *state;
                software.clear(&self.memory);
                registers.clear();
                state.is_attached = false;
                (state.stepping, state.passing) = (0, 0);
                state.stops.clear();
            }
            self.configure_vcpus();
        }
        let _ = self.stopped.read();
        self.control.release_vcpus(VcpuSet::MAX);
    }

    /// Lets the vCPUs in `run` go on, and those in `step` for one instruction. All must be stopped. If one has
    /// stopped for a reason that was not reported yet, none goes on, and that is reported next.
    pub(super) fn resume(self: &Arc<Debugger>, run: VcpuSet, step: VcpuSet) {
        {
            let mut state = lock(&self.state);
            // A vCPU comes upon a breakpoint again, if it is still there; and a step is not wanted any more.
            state
                .stops
                .retain(|stop| matches!(stop.cause, Cause::Watch { .. }));
            if !state.stops.is_empty() {
                // This fails only if the counter is full, and then the event is readable anyway.
                let _ = self.stopped.write(1);
                return;
            }
            state.stepping = step;
        }
        if self.configure_vcpus() {
            self.control.release_vcpus(run | step);
        }
    }

    /// Returns why a vCPU has stopped, once all are stopped; `None` if none has.
    pub(super) fn take_stop(&self) -> Option<Stop> {
        let _ = self.stopped.read();
        let mut state = lock(&self.state);
        state.stepping = 0;
        state.stops.pop_front()
    }

    /// Tells KVM for each vCPU what it has to stop for. Returns `false` if the machine has ended.
    fn configure_vcpus(self: &Arc<Debugger>) -> bool {
        let debugger = self.clone();
        let configured = self
            .control
            .on_parked_vcpus(0..self.vcpu_count, move |vcpu| {
                let setting = debugger.setting(&lock(&debugger.state), vcpu);
                vcpu.fd.set_guest_debug(&setting)
            });
        let results = configured.iter().flatten();
        for error in results.filter_map(|result| result.as_ref().err()) {
            tracing::error!("KVM cannot debug a vCPU: {error}");
        }
        configured.is_some()
    }

    /// Returns what KVM has to stop `vcpu` for.
    fn setting(&self, state: &State, vcpu: &ParkedVcpu<'_>) -> kvm_guest_debug {
        let mut setting = kvm_guest_debug::default();
        if !state.is_attached {
            return setting;
        }
        setting.control = KVM_GUESTDBG_ENABLE;
        if !state.software.is_empty() {
            setting.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        let mut registers = state.registers.clone();
        let is_passing = state.passing & (1 << vcpu.index) != 0;
        if self.delivers_to_guest && !is_passing {
            for (_, handler) in self.handlers(state, vcpu) {
                // A debug register of gdb's counts for more.
                registers.add(handler, 1, Access::Execute);
            }
        }
        if !registers.is_empty() {
            setting.control |= KVM_GUESTDBG_USE_HW_BP;
            setting.arch = registers.for_kvm();
        }
        if state.stepping & (1 << vcpu.index) != 0 || is_passing {
            setting.control |= KVM_GUESTDBG_SINGLESTEP;
            // Only an interrupt ends a halt, and with it the step.
            let halts = vcpu.fd.get_mp_state();
            let halts = halts.is_ok_and(|state| state.mp_state == KVM_MP_STATE_HALTED);
            if self.blocks_interrupts && !halts {
                setting.control |= KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        setting
    }

    /// Returns the exceptions by which `vcpu` may come upon a breakpoint or end a step in a program of the guest, with
    /// the addresses of their handlers.
    fn handlers(&self, state: &State, vcpu: &ParkedVcpu<'_>) -> impl Iterator<Item = (u8, u64)> {
        let steps = state.stepping & (1 << vcpu.index) != 0;
        let vectors = [
            (DEBUG_EXCEPTION, steps),
            (BREAKPOINT_EXCEPTION, !state.software.is_empty()),
        ];
        let read = move |address, bytes: &mut [u8]| self.read_locked(state, vcpu, address, bytes);
        vectors
            .into_iter()
            .filter(|(_, is_used)| *is_used)
            .filter_map(move |(vector, _)| Some((vector, delivery::handler(vcpu, vector, read)?)))
    }

    /// Has the thread of `vcpu`, which must be stopped, call `work`. Returns `None` if the machine ends.
    pub(super) fn on_vcpu<T: Send + 'static>(
        &self,
        vcpu: u8,
        work: impl Fn(&ParkedVcpu<'_>) -> T + Send + Sync + 'static,
    ) -> Option<T> {
        self.control.on_parked_vcpus(vcpu..vcpu + 1, work)?.pop()
    }

    /// Reads memory on the thread of `vcpu`; see [`guest_memory::read`].
    pub(super) fn read(&self, vcpu: &ParkedVcpu<'_>, address: u64, bytes: &mut [u8]) -> usize {
        self.read_locked(&lock(&self.state), vcpu, address, bytes)
    }

    fn read_locked(
        &self,
        state: &State,
        vcpu: &ParkedVcpu<'_>,
        address: u64,
        bytes: &mut [u8],
    ) -> usize {
        guest_memory::read(vcpu, &self.memory, &state.software, address, bytes)
    }

    /// Writes memory on the thread of `vcpu`; see [`guest_memory::write`].
    pub(super) fn write(&self, vcpu: &ParkedVcpu<'_>, address: u64, bytes: &mut [u8]) -> bool {
        let mut state = lock(&self.state);
        guest_memory::write(vcpu, &self.memory, &mut state.software, address, bytes)
    }

    /// Puts a breakpoint instruction at `address`, which the page tables of `vcpu` map, on its thread.
    pub(super) fn add_software(&self, vcpu: &ParkedVcpu<'_>, address: u64) -> bool {
        guest_memory::translate(vcpu, address).is_some_and(|physical| {
            let mut state = lock(&self.state);
            state.software.add(&self.memory, address, physical)
        })
    }

    pub(super) fn remove_software(&self, address: u64) -> bool {
        lock(&self.state).software.remove(&self.memory, address)
    }

    /// Calls `change` with the debug registers, which KVM gets when vCPUs go on.
    pub(super) fn with_registers<T>(&self, change: impl FnOnce(&mut DebugRegisters) -> T) -> T {
        change(&mut lock(&self.state).registers)
    }

    /// Handles a debug exit on the thread of `vcpu`: stops all vCPUs if it is the debugger's, and passes the
    /// exception on to the guest otherwise.
    ///
    /// # Errors
    /// If KVM does not take the guest's exception.
    pub(crate) fn take_debug_exit(
        &self,
        vcpu: &ParkedVcpu<'_>,
        exit: &kvm_debug_exit_arch,
    ) -> Result<(), kvm_ioctls::Error> {
        let mut state = lock(&self.state);
        let bit = 1 << vcpu.index;
        let was_passing = state.passing & bit != 0;
        state.passing &= !bit;
        if let Some(cause) = cause(&state, vcpu, exit) {
            self.stop(&mut state, vcpu, cause);
            return Ok(());
        }
        if was_passing {
            return vcpu.fd.set_guest_debug(&self.setting(&state, vcpu));
        }
        let mut handlers = self
            .handlers(&state, vcpu)
            .filter(|_| self.delivers_to_guest);
        let handler = handlers.find(|(_, handler)| *handler == exit.pc);
        drop(handlers);
        if let Some((vector, _)) = handler {
            if let Some(cause) = self.take_back(&state, vcpu, vector) {
                self.stop(&mut state, vcpu, cause);
                return Ok(());
            }
            state.passing |= bit;
            return vcpu.fd.set_guest_debug(&self.setting(&state, vcpu));
        }
        let mut setting = self.setting(&state, vcpu);
        setting.control |= match exit.exception == u32::from(BREAKPOINT_EXCEPTION) {
            true => KVM_GUESTDBG_INJECT_BP,
            false => KVM_GUESTDBG_INJECT_DB,
        };
        vcpu.fd.set_guest_debug(&setting)
    }

    /// Takes back the delivery of exception `vector`, at whose handler `vcpu` has arrived, if it is the debugger's.
    fn take_back(&self, state: &State, vcpu: &ParkedVcpu<'_>, vector: u8) -> Option<Cause> {
        let read = move |address, bytes: &mut [u8]| self.read_locked(state, vcpu, address, bytes);
        let delivery = Delivery::read(vcpu, read)?;
        let (cause, rip) = match vector {
            BREAKPOINT_EXCEPTION => {
                // The breakpoint instruction has one byte.
                let rip = delivery.rip.wrapping_sub(1);
                (software_cause(state, vcpu, rip)?, rip)
            }
            // Only if it is wanted is there a handler of it.
            _ => (Cause::Step, delivery.rip),
        };
        match delivery.take_back(vcpu, rip, read) {
            Ok(()) => Some(cause),
            Err(error) => {
                tracing::warn!("cannot stop a program of the guest: {error}");
                None
            }
        }
    }

    /// Handles an instruction that KVM has failed to emulate, on the thread of `vcpu`. If that is a breakpoint,
    /// this stops all vCPUs, and returns `true`.
    ///
    /// A KVM without hardware virtualization emulates the guest's kernel, but not its breakpoint instructions.
    pub(crate) fn take_failure(&self, vcpu: &ParkedVcpu<'_>) -> bool {
        let (Ok(regs), Ok(sregs)) = (vcpu.fd.get_regs(), vcpu.fd.get_sregs()) else {
            return false;
        };
        let pc = sregs.cs.base.wrapping_add(regs.rip);
        let mut state = lock(&self.state);
        let Some(cause) = software_cause(&state, vcpu, pc) else {
            return false;
        };
        // Takes back the exception for an invalid instruction, which KVM may have queued.
        if vcpu.fd.set_regs(&regs).is_err() {
            return false;
        }
        self.stop(&mut state, vcpu, cause);
        true
    }

    fn stop(&self, state: &mut State, vcpu: &ParkedVcpu<'_>, cause: Cause) {
        let vcpu = vcpu.index;
        state.stops.push_back(Stop { vcpu, cause });
        self.control.hold_all_vcpus();
        // This fails only if the counter is full, and then the event is readable anyway.
        let _ = self.stopped.write(1);
    }
}

/// Returns why the debugger wants to know of a debug exit; `None` if it is about the guest's own exception.
fn cause(state: &State, vcpu: &ParkedVcpu<'_>, exit: &kvm_debug_exit_arch) -> Option<Cause> {
    if !state.is_attached {
        return None;
    }
    if exit.exception == u32::from(BREAKPOINT_EXCEPTION) {
        return software_cause(state, vcpu, exit.pc);
    }
    // Before a step, which may end at the same place.
    if let Some(register) = state.registers.hit(exit.dr6) {
        return Some(match register.access {
            Access::Execute => Cause::Hardware,
            access => Cause::Watch {
                address: register.address,
                access,
            },
        });
    }
    let steps = state.stepping & (1 << vcpu.index) != 0;
    (steps && exit.dr6 & DR6_STEP != 0).then_some(Cause::Step)
}

fn software_cause(state: &State, vcpu: &ParkedVcpu<'_>, pc: u64) -> Option<Cause> {
    if state.software.is_at_virtual(pc) {
        return Some(Cause::Software);
    }
    let physical = guest_memory::translate(vcpu, pc)?;
    let is_shared = state.software.is_at_physical(physical);
    is_shared.then_some(Cause::SharedSoftware)
}
