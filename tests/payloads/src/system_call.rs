//! The system calls of ring 3 to ring 0, whose side is `assembly/traps.s`, which numbers the calls.

use core::arch::asm;

#[derive(Clone, Copy)]
#[repr(u64)]
enum Call {
    ReadPort8,
    ReadPort16,
    ReadPort32,
    WritePort8,
    WritePort16,
    WritePort32,
    WriteSerial,
    ReadMsr,
    WriteMsr,
    ReadCr3,
    WriteCr3,
    EnableInterrupts,
    DisableInterrupts,
    WaitForInterrupt,
    Halt,
    TripleFault,
    UnknownInstruction,
}

/// Number of system calls.
pub(crate) const COUNT: u64 = Call::UnknownInstruction as u64 + 1;

fn call(call: Call, first: u64, second: u64, third: u64) -> u64 {
    let result;
    // SAFETY: the handler changes only the registers declared here. What a call does to the
    // machine is the business of the function below that makes it.
    unsafe {
        asm!("call system_call", inlateout("rax") call as u64 => result,
             inlateout("rdi") first => _, inlateout("rsi") second => _,
             inlateout("rdx") third => _, lateout("rcx") _);
    }
    result
}

/// Reads a byte from an I/O port.
pub fn read_port_8(port: u16) -> u8 {
    call(Call::ReadPort8, u64::from(port), 0, 0) as u8
}

/// Reads two bytes from an I/O port.
pub fn read_port_16(port: u16) -> u16 {
    call(Call::ReadPort16, u64::from(port), 0, 0) as u16
}

/// Reads four bytes from an I/O port.
pub fn read_port_32(port: u16) -> u32 {
    call(Call::ReadPort32, u64::from(port), 0, 0) as u32
}

/// Writes a byte to an I/O port.
pub fn write_port_8(port: u16, value: u8) {
    call(Call::WritePort8, u64::from(port), u64::from(value), 0);
}

/// Writes two bytes to an I/O port.
pub fn write_port_16(port: u16, value: u16) {
    call(Call::WritePort16, u64::from(port), u64::from(value), 0);
}

/// Writes four bytes to an I/O port.
pub fn write_port_32(port: u16, value: u32) {
    call(Call::WritePort32, u64::from(port), u64::from(value), 0);
}

/// Writes `bytes` to the 16550 at `port` when its transmitter is empty: no more than it can hold.
pub fn write_serial(port: u16, bytes: &[u8]) {
    call(
        Call::WriteSerial,
        u64::from(port),
        bytes.as_ptr() as u64,
        bytes.len() as u64,
    );
}

/// Reads a model-specific register.
pub fn read_msr(index: u32) -> u64 {
    call(Call::ReadMsr, u64::from(index), 0, 0)
}

/// Writes a model-specific register.
///
/// # Safety
///
/// The value must leave the processor able to run this program: paging, the local APIC's address
/// and the segments stay what they are.
pub unsafe fn write_msr(index: u32, value: u64) {
    call(Call::WriteMsr, u64::from(index), value, 0);
}

/// Drops this processor's cached translations by loading CR3 with its own value.
pub fn flush_translations() {
    let root = call(Call::ReadCr3, 0, 0, 0);
    call(Call::WriteCr3, root, 0, 0);
}

/// Enables interrupts while this processor runs in ring 3.
pub fn enable_interrupts() {
    call(Call::EnableInterrupts, 0, 0, 0);
}

/// Keeps interrupts pending while this processor runs in ring 3: the state it starts in.
pub fn disable_interrupts() {
    call(Call::DisableInterrupts, 0, 0, 0);
}

/// Halts this processor until all processors together have taken a number of interrupts other than
/// `seen`. Interrupts come during this call whether or not they are enabled.
pub fn wait_for_interrupt(seen: u64) {
    call(Call::WaitForInterrupt, seen, 0, 0);
}

/// Halts this processor for ever, with interrupts off.
pub fn halt() -> ! {
    call(Call::Halt, 0, 0, 0);
    unreachable!("the halt system call returned")
}

/// Resets the machine by an exception that no handler can handle.
pub fn triple_fault() -> ! {
    call(Call::TripleFault, 0, 0, 0);
    unreachable!("the triple fault system call returned")
}

/// Executes in ring 0 an instruction that KVM has to emulate and cannot: KVM_RUN fails with an
/// internal error. `address` is a mapped guest-physical address with neither memory nor a device.
/// Returns only if something other than KVM emulated the instruction.
pub fn execute_unknown_instruction(address: u64) {
    call(Call::UnknownInstruction, address, 0, 0);
}
