//! The state of a virtual machine beside its vCPUs: interrupt controllers, interval timer and clock.

use bantam_state::{RestoreError, SaveError, SavedState};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::vm::Vm;

/// The interrupt controllers, in the order of their state.
const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// All that KVM keeps of a virtual machine beside its memory and vCPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VmState {
    irqchips: [kvm_irqchip; IRQCHIPS.len()],
    /// None if the guest has not used it yet.
    interval_timer: Option<kvm_pit_state2>,
    /// With the host's time and time stamp counter when it was read, as far as KVM tells them.
    clock: kvm_clock_data,
}

impl SavedState for VmState {
    const KIND: &'static str = "vm";
    const VERSION: u16 = 1;
}

impl VmState {
    /// The state of a machine whose vCPUs are all out of the guest. It has to be saved before theirs: an
    /// interrupt that moves on to a local APIC in between is in both, and not in neither.
    ///
    /// # Errors
    /// When KVM does not give a part of it.
    pub(crate) fn save(vm: &Vm) -> Result<VmState, SaveError> {
        let failed = |part: &'static str| {
            move |source: kvm_ioctls::Error| SaveError::Host {
                part: part.to_owned(),
                source: source.into(),
            }
        };
        let mut irqchips = IRQCHIPS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for irqchip in &mut irqchips {
            vm.fd()
                .get_irqchip(irqchip)
                .map_err(failed("interrupt controllers"))?;
        }
        Ok(VmState {
            irqchips,
            interval_timer: match vm.fd().get_pit2() {
                Ok(state) => Some(state),
                // There is none.
                Err(error) if error.errno() == libc::ENXIO => None,
                Err(error) => return Err(failed("interval timer")(error)),
            },
            clock: vm.fd().get_clock().map_err(failed("clock"))?,
        })
    }

    /// Sets the clock (kvm-clock), which goes on from where it was: a guest sees nothing of the time in
    /// between, by this clock as by the time stamp counter.
    ///
    /// It has to be set before the state of vCPUs: from it KVM computes the time of the guest's start, which it
    /// writes to guest memory when a vCPU gets its MSRs.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn restore_clock(&self, vm: &Vm) -> Result<(), RestoreError> {
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.fd().set_clock(&clock).map_err(failed("clock"))
    }

    /// Sets the interrupt controllers and the interval timer, which is created if there was one, and starts
    /// its counts anew.
    ///
    /// The state of all vCPUs has to be set before: an interrupt that is pending is delivered at once, to
    /// local APICs whose state would otherwise be replaced afterwards.
    ///
    /// # Errors
    /// When the state cannot be that of a machine, or KVM refuses.
    pub(crate) fn restore_interrupt_sources(&self, vm: &Vm) -> Result<(), Error> {
        for (irqchip, chip_id) in self.irqchips.iter().zip(IRQCHIPS) {
            if irqchip.chip_id != chip_id {
                let kind = VmState::KIND.to_owned();
                let reason = format!("there is no interrupt controller {}", irqchip.chip_id);
                return Err(RestoreError::Invalid { kind, reason }.into());
            }
            vm.fd()
                .set_irqchip(irqchip)
                .map_err(failed("interrupt controllers"))?;
        }
        let Some(interval_timer) = &self.interval_timer else {
            return Ok(());
        };
        vm.create_interval_timer()?;
        vm.set_interval_timer(interval_timer)
    }
}

fn failed(part: &'static str) -> impl Fn(kvm_ioctls::Error) -> RestoreError {
    move |source| RestoreError::Host {
        part: part.to_owned(),
        source: source.into(),
    }
}
