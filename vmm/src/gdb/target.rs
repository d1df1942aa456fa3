//! The machine as gdb sees it: one process, whose threads are the vCPUs.

use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
};

use super::breakpoints::Access;
use super::connection::Ended;
use super::debugger::{Cause, Debugger, Stop};
use super::registers::{CpuRegisters, Register, RegisterError, RegisterFile, X86_64};
use crate::host::{Virtualization, virtualization};
use crate::run_control::VcpuSet;
use crate::vcpu::ParkedVcpu;

/// Error numbers of the protocol are those of the host's C library.
const BAD_ADDRESS: TargetError<Ended> = TargetError::Errno(libc::EFAULT as u8);
const INVALID: TargetError<Ended> = TargetError::Errno(libc::EINVAL as u8);

/// The machine as gdb sees it.
pub(super) struct MachineTarget {
    debugger: Arc<Debugger>,
    /// The vCPU that gdb has looked at last.
    current: u8,
    /// What the vCPUs are to do when the machine goes on.
    run: VcpuSet,
    step: VcpuSet,
    /// Whether those that are in neither set stay where they are.
    locked: bool,
    is_running: bool,
}

impl MachineTarget {
    /// Creates the view of a machine whose vCPUs are all stopped.
    pub(super) fn new(debugger: Arc<Debugger>) -> MachineTarget {
        MachineTarget {
            debugger,
            current: 0,
            run: 0,
            step: 0,
            locked: false,
            is_running: false,
        }
    }

    /// Stops all vCPUs, and returns for what gdb, which waits for one to stop, is told that they have. Without a
    /// reason of its own, the machine was interrupted by gdb.
    pub(super) fn stop(&mut self) -> Result<MultiThreadStopReason<u64>, Ended> {
        if !self.debugger.stop_all() {
            return Err(Ended::Machine);
        }
        self.is_running = false;
        let stop = self.debugger.take_stop();
        if let Some(stop) = stop {
            self.current = stop.vcpu;
        }
        let tid = tid(self.current);
        let signal = |signal| MultiThreadStopReason::SignalWithThread { tid, signal };
        Ok(match stop.map(|Stop { cause, .. }| cause) {
            None => signal(Signal::SIGINT),
            Some(Cause::Software) => MultiThreadStopReason::SwBreak(tid),
            Some(Cause::Hardware) => MultiThreadStopReason::HwBreak(tid),
            Some(Cause::Watch { address, access }) => MultiThreadStopReason::Watch {
                tid,
                kind: match access {
                    Access::Write => WatchKind::Write,
                    _ => WatchKind::ReadWrite,
                },
                addr: address,
            },
            // gdb would take it for a breakpoint that it has removed, and ignore it for ever.
            Some(Cause::SharedSoftware | Cause::Step) => signal(Signal::SIGTRAP),
        })
    }

    /// Whether vCPUs run, so that gdb waits for one to stop.
    pub(super) fn is_running(&self) -> bool {
        self.is_running
    }

    fn vcpu(&self, tid: Tid) -> Option<u8> {
        let index = u8::try_from(tid.get() - 1).ok()?;
        (index < self.debugger.vcpu_count()).then_some(index)
    }

    /// Has the thread of the vCPU with this number call `work`.
    fn on_vcpu<T: Send + 'static>(
        &mut self,
        tid: Tid,
        work: impl Fn(&ParkedVcpu<'_>) -> T + Send + Sync + 'static,
    ) -> Result<T, TargetError<Ended>> {
        let vcpu = self.vcpu(tid).ok_or(INVALID)?;
        self.current = vcpu;
        let answer = self.debugger.on_vcpu(vcpu, work);
        answer.ok_or(TargetError::Fatal(Ended::Machine))
    }

    /// Changes the registers of a vCPU that differ from `wanted`.
    fn set_registers(
        &mut self,
        tid: Tid,
        wanted: Vec<(Register, Vec<u8>)>,
    ) -> Result<(), TargetError<Ended>> {
        let debugger = self.debugger.clone();
        let set = self.on_vcpu(tid, move |vcpu| {
            let mut registers = CpuRegisters::read(vcpu.fd)?;
            for (register, bytes) in &wanted {
                if registers.get(*register) != *bytes {
                    registers.set(*register, bytes, |address| {
                        let mut descriptor = [0; 8];
                        let read = debugger.read(vcpu, address, &mut descriptor);
                        (read == descriptor.len()).then_some(descriptor)
                    })?;
                }
            }
            Ok::<(), RegisterError>(registers.write(vcpu.fd)?)
        })?;
        set.map_err(|error| {
            tracing::warn!("gdb cannot set a register: {error}");
            INVALID
        })
    }
}

fn tid(vcpu: u8) -> Tid {
    Tid::MIN.saturating_add(vcpu.into())
}

impl Target for MachineTarget {
    type Arch = X86_64;
    type Error = Ended;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, Ended> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for MachineTarget {
    fn read_registers(&mut self, file: &mut RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let read = |vcpu: &ParkedVcpu<'_>| Some(CpuRegisters::read(vcpu.fd).ok()?.file());
        *file = self.on_vcpu(tid, read)?.ok_or(INVALID)?;
        Ok(())
    }

    fn write_registers(&mut self, file: &RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let wanted = file.registers();
        let wanted = wanted.map(|(register, bytes)| (register, bytes.to_vec()));
        self.set_registers(tid, wanted.collect())
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, address: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let (debugger, len) = (self.debugger.clone(), data.len());
        let bytes = self.on_vcpu(tid, move |vcpu| {
            let mut bytes = vec![0; len];
            let read = debugger.read(vcpu, address, &mut bytes);
            bytes.truncate(read);
            bytes
        })?;
        if bytes.is_empty() && len > 0 {
            return Err(BAD_ADDRESS);
        }
        data[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_addrs(&mut self, address: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let (debugger, data) = (self.debugger.clone(), data.to_vec());
        let write = move |vcpu: &ParkedVcpu<'_>| debugger.write(vcpu, address, &mut data.clone());
        match self.on_vcpu(tid, write)? {
            true => Ok(()),
            false => Err(BAD_ADDRESS),
        }
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), Ended> {
        (0..self.debugger.vcpu_count()).map(tid).for_each(found);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for MachineTarget {
    fn read_register(
        &mut self,
        tid: Tid,
        register: Register,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let read =
            move |vcpu: &ParkedVcpu<'_>| Some(CpuRegisters::read(vcpu.fd).ok()?.get(register));
        let bytes = self.on_vcpu(tid, read)?.ok_or(INVALID)?;
        let room = buffer.get_mut(..bytes.len()).ok_or(INVALID)?;
        room.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(
        &mut self,
        tid: Tid,
        register: Register,
        bytes: &[u8],
    ) -> TargetResult<(), Self> {
        self.set_registers(tid, vec![(register, bytes.to_vec())])
    }
}

impl ThreadExtraInfo for MachineTarget {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Ended> {
        let Some(index) = self.vcpu(tid) else {
            return Ok(0);
        };
        let state = self.debugger.on_vcpu(index, |vcpu| {
            let state = vcpu.fd.get_mp_state();
            match state.map(|state| state.mp_state) {
                Ok(KVM_MP_STATE_RUNNABLE) => "running",
                Ok(KVM_MP_STATE_HALTED) => "halted",
                Ok(KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) => "not started",
                _ => "in another state",
            }
        });
        let text = format!("vCPU {index}, {}", state.ok_or(Ended::Machine)?);
        let len = text.len().min(buffer.len());
        buffer[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for MachineTarget {
    fn resume(&mut self) -> Result<(), Ended> {
        let others = match self.locked {
            true => 0,
            false => !self.step,
        };
        self.is_running = true;
        self.debugger.resume(self.run | others, self.step);
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Ended> {
        (self.run, self.step, self.locked) = (0, 0, false);
        Ok(())
    }

    /// A vCPU has no signals, so gdb's request to go on with one, as after an interrupt, only lets it go on.
    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Ended> {
        if let Some(vcpu) = self.vcpu(tid) {
            self.run |= 1 << vcpu;
        }
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for MachineTarget {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Ended> {
        if let Some(vcpu) = self.vcpu(tid) {
            self.step |= 1 << vcpu;
        }
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for MachineTarget {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Ended> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for MachineTarget {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for MachineTarget {
    /// The protocol does not say whose addresses these are. They are looked up in the page tables of the vCPU that
    /// gdb has looked at last, and then of all others.
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let current = self.current;
        let others = (0..self.debugger.vcpu_count()).filter(|vcpu| *vcpu != current);
        for vcpu in std::iter::once(current).chain(others) {
            let debugger = self.debugger.clone();
            let added = self
                .debugger
                .on_vcpu(vcpu, move |vcpu| debugger.add_software(vcpu, address));
            if added.ok_or(TargetError::Fatal(Ended::Machine))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.debugger.remove_software(address))
    }
}

impl HwBreakpoint for MachineTarget {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let add = self
            .debugger
            .with_registers(|it| it.add(address, 1, Access::Execute));
        Ok(add)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let remove = self
            .debugger
            .with_registers(|it| it.remove(address, 1, Access::Execute));
        Ok(remove)
    }
}

/// The access that a debug register watches for `kind`. The processor cannot watch only reads; gdb drops those
/// accesses that have changed the value.
fn access(kind: WatchKind) -> Access {
    match kind {
        WatchKind::Write => Access::Write,
        WatchKind::Read | WatchKind::ReadWrite => Access::ReadOrWrite,
    }
}

impl HwWatchpoint for MachineTarget {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        if virtualization() == Virtualization::Pvm {
            tracing::warn!(
                "gdb cannot watch data on this host: it has no hardware virtualization, and KVM does not look at \
                 what the instructions access that it emulates"
            );
            return Ok(false);
        }
        let access = access(kind);
        let add = self
            .debugger
            .with_registers(|it| it.add(address, len, access));
        Ok(add)
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        let access = access(kind);
        let remove = self
            .debugger
            .with_registers(|it| it.remove(address, len, access));
        Ok(remove)
    }
}
