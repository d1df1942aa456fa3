//! The state of a virtual machine besides its vCPUs: interrupt controllers, interval timer and clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bantam_state::{RestoreError, SaveError, SavedState};
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::vm::Vm;

/// The interrupt controllers, in the order in which their states are saved.
const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// All state that KVM keeps of a virtual machine besides its memory and vCPUs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VmState {
    irqchips: [kvm_irqchip; IRQCHIPS.len()],
    /// `None` if the guest has not used it yet.
    interval_timer: Option<kvm_pit_state2>,
    /// Includes the host's time and time stamp counter at the time of reading, if KVM returns them.
    clock: kvm_clock_data,
}

impl SavedState for VmState {
    const KIND: &'static str = "vm";
    const VERSION: u16 = 1;
}

impl VmState {
    /// Saves the state of a machine whose vCPUs are all out of the guest. It has to be saved before theirs:
    /// an interrupt that moves on to a local APIC in between is then in both, rather than in neither.
    ///
    /// # Errors
    /// If KVM does not return a part of it.
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
                // The machine has no timer.
                Err(error) if error.errno() == libc::ENXIO => None,
                Err(error) => return Err(failed("interval timer")(error)),
            },
            clock: vm.fd().get_clock().map_err(failed("clock"))?,
        })
    }

    /// Lets the clock (kvm-clock) go on as if the machine had run since it was saved, at `saved_at` since 1970. If KVM has
    /// said when that was, it is more exact.
    pub(crate) fn catch_up_clock(&mut self, saved_at: Duration) {
        let saved_at = match self.clock.flags & KVM_CLOCK_REALTIME {
            0 => saved_at,
            _ => Duration::from_nanos(self.clock.realtime),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let passed = now.unwrap_or_default().saturating_sub(saved_at);
        let passed = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
        self.clock.clock = self.clock.clock.saturating_add(passed);
    }

    /// Sets the clock (kvm-clock), which goes on from where it was. By this clock, as by the time stamp
    /// counter, a guest sees nothing of the time in between.
    ///
    /// The clock has to be set before the state of vCPUs: from it KVM computes the time of the guest's start,
    /// which it writes to guest memory when the MSRs of a vCPU are set.
    ///
    /// # Errors
    /// If KVM refuses.
    pub(crate) fn restore_clock(&self, vm: &Vm) -> Result<(), RestoreError> {
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.fd().set_clock(&clock).map_err(failed("clock"))
    }

    /// Sets the interrupt controllers and the interval timer. The timer is created if there was one, and
    /// starts its counts anew.
    ///
    /// The state of all vCPUs has to be set before: a pending interrupt is delivered at once, to local APICs
    /// whose state would otherwise be replaced afterwards.
    ///
    /// # Errors
    /// If the state cannot be that of a machine, or KVM refuses.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bantam_memory::GuestMemory;
    use bantam_state::Section;
    use kvm_ioctls::Kvm;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::host::open_kvm;

    /// A masked entry of the I/O APIC's redirection table, with vector 0x31.
    const MASKED_ENTRY: u64 = 0x1_0031;

    fn vm(kvm: &Kvm) -> Vm {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        Vm::new(kvm, Arc::new(memory), false).unwrap()
    }

    fn io_apic(state: &VmState) -> kvm_bindings::kvm_ioapic_state {
        // SAFETY: the third chip is the I/O APIC, whose state consists of integers only.
        unsafe { state.irqchips[2].chip.ioapic }
    }

    #[test]
    fn a_machine_gets_the_state_of_another() {
        let Ok(kvm) = open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return;
        };
        let first = vm(&kvm);
        first.create_interval_timer().unwrap();
        let mut timer = first.interval_timer().unwrap();
        timer.channels[0].mode = 2;
        timer.channels[0].count = 1193;
        first.set_interval_timer(&timer).unwrap();
        let mut state = VmState::save(&first).unwrap();
        let mut chip = io_apic(&state);
        chip.redirtbl[5].bits = MASKED_ENTRY;
        state.irqchips[2].chip.ioapic = chip;
        state.clock.clock = 1 << 50;
        let state: VmState = Section::of(&state).unwrap().decode().unwrap();

        let second = vm(&kvm);
        state.restore_clock(&second).unwrap();
        state.restore_interrupt_sources(&second).unwrap();
        let restored = VmState::save(&second).unwrap();
        // SAFETY: both members of the union are 64 bits wide, and any bits are valid.
        let entry = unsafe { io_apic(&restored).redirtbl[5].bits };
        assert_eq!(entry, MASKED_ENTRY);
        assert!((1 << 50..1 << 51).contains(&restored.clock.clock));
        let timer = restored.interval_timer.unwrap();
        assert_eq!((timer.channels[0].mode, timer.channels[0].count), (2, 1193));
    }

    #[test]
    fn a_clock_catches_up_from_the_moment_that_is_known_best() {
        let Ok(kvm) = open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return;
        };
        const DAY: u64 = 24 * 60 * 60 * 1_000_000_000;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut state = VmState::save(&vm(&kvm)).unwrap();
        state.clock.clock = 1;
        state.clock.flags = 0;
        state.catch_up_clock(now - Duration::from_nanos(DAY));
        assert!((DAY..DAY + DAY / 24).contains(&state.clock.clock));
        state.clock.flags = KVM_CLOCK_REALTIME;
        state.clock.realtime = now.as_nanos() as u64 - 2 * DAY;
        state.clock.clock = 1;
        state.catch_up_clock(now);
        assert!((2 * DAY..2 * DAY + DAY / 24).contains(&state.clock.clock));
        // The host's clock may have been set back.
        state.clock.flags = 0;
        state.clock.clock = 1;
        state.catch_up_clock(now + Duration::from_nanos(DAY));
        assert_eq!(state.clock.clock, 1);
    }

    #[test]
    fn a_timer_that_the_guest_has_not_used_is_not_created() {
        let Ok(kvm) = open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return;
        };
        let state = VmState::save(&vm(&kvm)).unwrap();
        let second = vm(&kvm);
        state.restore_interrupt_sources(&second).unwrap();
        assert!(second.interval_timer().is_err());
    }

    #[test]
    fn damaged_state_is_set_or_refused() {
        let Ok(kvm) = open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return;
        };
        let first = vm(&kvm);
        first.create_interval_timer().unwrap();
        let bytes = postcard::to_stdvec(&VmState::save(&first).unwrap()).unwrap();
        // Each iteration takes 15 ms, because it takes a timer down.
        bolero::check!()
            .with_iterations(50)
            .with_type::<Vec<(u16, u8)>>()
            .for_each(|changes| {
                let mut bytes = bytes.clone();
                for &(place, change) in changes {
                    let place = usize::from(place) % bytes.len();
                    bytes[place] ^= change;
                }
                if let Ok(state) = postcard::from_bytes::<VmState>(&bytes) {
                    let vm = vm(&kvm);
                    let _ = state.restore_clock(&vm);
                    let _ = state.restore_interrupt_sources(&vm);
                }
            });
    }
}
