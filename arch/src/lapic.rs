//! The local APIC of the boot vCPU.

use kvm_bindings::kvm_lapic_state;

/// Offset of the LINT0 entry of the local vector table (Intel SDM volume 3, "Local APIC
/// Register Address Map").
const LVT_LINT0: usize = 0x350;
/// Offset of the LINT1 entry.
const LVT_LINT1: usize = 0x360;

/// Delivery modes of a local vector table entry, unmasked (Intel SDM volume 3, "Local
/// Vector Table").
const DELIVER_NMI: u32 = 0b100 << 8;
const DELIVER_EXTINT: u32 = 0b111 << 8;

/// Wires the local interrupt pins as a PC's firmware leaves them: the 8259 pair on LINT0, the
/// non-maskable interrupt on LINT1 (Intel MP spec 1.4, section 3.6.2.2, virtual wire mode).
///
/// This is for the boot vCPU only: the INIT that starts the others resets theirs.
pub fn set_local_interrupt_pins(lapic: &mut kvm_lapic_state) {
    set_register(lapic, LVT_LINT0, DELIVER_EXTINT);
    set_register(lapic, LVT_LINT1, DELIVER_NMI);
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_two_pins_change() {
        let mut lapic = kvm_lapic_state { regs: [-1; 1024] };
        set_local_interrupt_pins(&mut lapic);
        for (offset, &byte) in lapic.regs.iter().enumerate() {
            let expected = match offset {
                0x351 => 0x07,
                0x361 => 0x04,
                0x350..0x354 | 0x360..0x364 => 0,
                _ => -1,
            };
            assert_eq!(byte, expected, "register byte {offset:#x}");
        }
    }
}
