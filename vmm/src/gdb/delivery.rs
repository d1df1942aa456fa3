//! Exceptions of the guest's programs that KVM delivers to the guest, although they are the debugger's.
//!
//! A KVM without hardware virtualization lets programs (ring 3) run natively. What a breakpoint instruction or a
//! single step raises there goes to the guest's kernel, which KVM emulates. An instruction of the kernel whose
//! address is in a debug register does stop the vCPU. So the debugger puts the first instruction of the kernel's
//! handler there, and takes the delivery back when the vCPU arrives at it.

use super::registers::{CpuRegisters, RegisterError};
use crate::vcpu::ParkedVcpu;

/// Size of a gate of the interrupt descriptor table in 64-bit mode.
const GATE_SIZE: u64 = 16;

/// Bit of RFLAGS that raises an exception after each instruction (TF).
const RFLAGS_TRAP: u64 = 1 << 8;

/// Bits of EFER that say that the processor is in 64-bit or compatibility mode (LMA).
const EFER_LONG_MODE: u64 = 1 << 10;

/// Returns the address of the guest's handler of exception `vector`; `None` if it has none, or is not in 64-bit
/// mode. `read` reads guest memory by virtual address, and returns how many bytes there are.
pub(super) fn handler(
    vcpu: &ParkedVcpu<'_>,
    vector: u8,
    read: impl Fn(u64, &mut [u8]) -> usize,
) -> Option<u64> {
    let sregs = vcpu.fd.get_sregs().ok()?;
    let place = u64::from(vector) * GATE_SIZE;
    if sregs.efer & EFER_LONG_MODE == 0 || place + GATE_SIZE - 1 > sregs.idt.limit.into() {
        return None;
    }
    let mut gate = [0; GATE_SIZE as usize];
    let len = read(sregs.idt.base.wrapping_add(place), &mut gate);
    (len == gate.len()).then_some(gate).and_then(handler_of)
}

/// Returns the address in a gate that is present (Intel SDM, volume 3A, "64-Bit Mode IDT").
fn handler_of(gate: [u8; 16]) -> Option<u64> {
    let bytes = [
        gate[0], gate[1], gate[6], gate[7], gate[8], gate[9], gate[10], gate[11],
    ];
    (gate[5] & 0x80 != 0).then_some(u64::from_le_bytes(bytes))
}

/// What an exception has put on the stack of its handler, which has not executed any instruction yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Delivery {
    /// Where the program was.
    pub(super) rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl Delivery {
    /// Reads the delivery at whose handler `vcpu` is, of an exception without an error code; `None` if it was not
    /// a program that raised it.
    pub(super) fn read(
        vcpu: &ParkedVcpu<'_>,
        read: impl Fn(u64, &mut [u8]) -> usize,
    ) -> Option<Delivery> {
        let mut bytes = [0; 40];
        let stack = vcpu.fd.get_regs().ok()?.rsp;
        (read(stack, &mut bytes) == bytes.len()).then_some(())?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
        let delivery = Delivery {
            rip: words.next()?,
            cs: words.next()?,
            rflags: words.next()?,
            rsp: words.next()?,
            ss: words.next()?,
        };
        (delivery.cs & 0b11 == 0b11).then_some(delivery)
    }

    /// Takes the delivery back: the vCPU is in the program again, at `rip`.
    pub(super) fn take_back(
        &self,
        vcpu: &ParkedVcpu<'_>,
        rip: u64,
        read: impl Fn(u64, &mut [u8]) -> usize,
    ) -> Result<(), RegisterError> {
        let mut registers = CpuRegisters::read(vcpu.fd)?;
        registers.return_to(
            [self.cs as u16, self.ss as u16],
            [rip, self.rsp, self.rflags & !RFLAGS_TRAP],
            |address| {
                let mut descriptor = [0; 8];
                let len = read(address, &mut descriptor);
                (len == descriptor.len()).then_some(descriptor)
            },
        )?;
        Ok(registers.write(vcpu.fd)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_has_the_address_of_the_handler_in_three_parts() {
        let mut gate = [0_u8; 16];
        gate[..2].copy_from_slice(&0x4321_u16.to_le_bytes());
        gate[2] = 0x10;
        gate[6..8].copy_from_slice(&0x8765_u16.to_le_bytes());
        gate[8..12].copy_from_slice(&0xffff_fff1_u32.to_le_bytes());
        gate[5] = 0x0e;
        assert_eq!(handler_of(gate), None);
        gate[5] = 0xee;
        assert_eq!(handler_of(gate), Some(0xffff_fff1_8765_4321));
    }
}
