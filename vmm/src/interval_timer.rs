//! The interval timer (8254), which KVM emulates from the guest's first access on.
//!
//! Few guests use it, and a machine with one takes 15 ms longer to end, because KVM waits for two grace
//! periods while it takes the timer down. The first access finds no timer and so reaches the device in
//! this module, which creates one; all later accesses stay in KVM.

use std::sync::Arc;

use bantam_arch::layout;
use bantam_devices::bus::BusDevice;
use kvm_bindings::{KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_state2};

use crate::vm::Vm;

/// Offset, from the first port of the timer, of the port that takes control words.
const CONTROL_PORT: u64 = 3;

/// A control word (82C54 data sheet, "Control Word Format").
mod control_word {
    pub(super) const COUNTER_SHIFT: u8 = 6;
    pub(super) const ACCESS_SHIFT: u8 = 4;
    pub(super) const ACCESS_MASK: u8 = 0b11;
    pub(super) const MODE_SHIFT: u8 = 1;
    pub(super) const MODE_MASK: u8 = 0b111;
    /// The highest mode. Higher numbers have a bit that is not decoded.
    pub(super) const LAST_MODE: u8 = 5;
    pub(super) const UNDECODED_MODE_BIT: u8 = 0b100;
    pub(super) const BCD: u8 = 1;
}

/// Bits of system control port B that concern counter 2.
mod system_control {
    /// The counter counts.
    pub(super) const GATE: u8 = 1 << 0;
    /// The speaker follows the counter.
    pub(super) const SPEAKER: u8 = 1 << 1;
}

/// Serves the ports of the timer until KVM has one.
pub(crate) struct IntervalTimer {
    vm: Arc<Vm>,
    /// Whether KVM has created a timer; `None` before the first access. KVM is asked only once, so that a
    /// guest cannot fill the log.
    exists: Option<bool>,
}

impl IntervalTimer {
    /// Creates the device. KVM's timer is created when the guest first needs it.
    pub(crate) fn new(vm: Arc<Vm>) -> IntervalTimer {
        IntervalTimer { vm, exists: None }
    }

    /// Returns the timer's state; `None` if KVM cannot create the timer.
    fn state(&mut self) -> Option<kvm_pit_state2> {
        let exists = *self.exists.get_or_insert_with(|| {
            let created = self.vm.create_interval_timer();
            created
                .inspect_err(|error| tracing::warn!("the guest has no interval timer: {error}"))
                .is_ok()
        });
        if !exists {
            return None;
        }
        let state = self.vm.interval_timer();
        state.inspect_err(|error| tracing::warn!("{error}")).ok()
    }
}

impl BusDevice for IntervalTimer {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (Some(state), Some(value)) = (self.state(), data.first_mut()) else {
            return;
        };
        if offset == SYSTEM_CONTROL {
            *value = read_system_control(&state);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Some(mut state), Some(&value)) = (self.state(), data.first()) else {
            return;
        };
        match offset {
            CONTROL_PORT => write_control_word(&mut state, value),
            SYSTEM_CONTROL => write_system_control(&mut state, value),
            // The behaviour of a counter without a mode is undefined (82C54 data sheet, "Programming the
            // 82C54").
            _ => return,
        }
        if let Err(error) = self.vm.set_interval_timer(&state) {
            tracing::warn!("{error}");
        }
    }
}

/// Offset, from the first port of the timer, of system control port B.
pub(crate) const SYSTEM_CONTROL: u64 =
    (layout::SYSTEM_CONTROL_PORT - layout::INTERVAL_TIMER_PORT) as u64;

fn read_system_control(state: &kvm_pit_state2) -> u8 {
    let mut value = 0;
    if state.channels[2].gate != 0 {
        value |= system_control::GATE;
    }
    if state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0 {
        value |= system_control::SPEAKER;
    }
    value
}

fn write_system_control(state: &mut kvm_pit_state2, value: u8) {
    state.channels[2].gate = u8::from(value & system_control::GATE != 0);
    if value & system_control::SPEAKER != 0 {
        state.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    } else {
        state.flags &= !KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    }
}

fn write_control_word(state: &mut kvm_pit_state2, word: u8) {
    let counter = usize::from(word >> control_word::COUNTER_SHIFT);
    let access = (word >> control_word::ACCESS_SHIFT) & control_word::ACCESS_MASK;
    // All others latch a count or a status, which no counter has yet.
    let (Some(counter), 1..) = (state.channels.get_mut(counter), access) else {
        return;
    };
    counter.rw_mode = access;
    counter.read_state = access;
    counter.write_state = access;
    counter.mode = (word >> control_word::MODE_SHIFT) & control_word::MODE_MASK;
    if counter.mode > control_word::LAST_MODE {
        counter.mode &= !control_word::UNDECODED_MODE_BIT;
    }
    counter.bcd = word & control_word::BCD;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_word_sets_the_mode_of_one_counter() {
        let mut state = kvm_pit_state2::default();
        // Counter 2, low byte and then high byte, in BCD. Mode 6 is decoded as mode 2.
        write_control_word(&mut state, 0xbd);
        let counter = state.channels[2];
        assert_eq!((counter.rw_mode, counter.mode, counter.bcd), (3, 2, 1));
        assert_eq!((counter.read_state, counter.write_state), (3, 3));
        assert_eq!(state.channels[0].rw_mode, 0);
        assert_eq!(state.channels[1].rw_mode, 0);
    }

    #[test]
    fn a_latch_sets_nothing() {
        let mut state = kvm_pit_state2::default();
        for word in [0x00, 0x80, 0xce, 0xff] {
            write_control_word(&mut state, word);
            assert!(state.channels.iter().all(|counter| counter.rw_mode == 0));
        }
    }

    #[test]
    fn system_control_gives_what_was_written() {
        let mut state = kvm_pit_state2::default();
        for value in [0, 1, 2, 3, 0xff, 0] {
            write_system_control(&mut state, value);
            assert_eq!(read_system_control(&state), value & 3);
        }
    }
}
