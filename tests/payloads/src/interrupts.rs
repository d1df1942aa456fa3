//! Interrupts: the descriptor table, the local APIC and the I/O APIC (Intel SDM volume 3 chapters
//! 6 and 11, 82093AA data sheet). The handler of every vector is in `assembly/traps.s`: it counts
//! the interrupt and acknowledges it.

use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use core::time::Duration;

use crate::mmio::{read_32, write_32};
use crate::system_call::{disable_interrupts, enable_interrupts, wait_for_interrupt};
use crate::time::Deadline;

const RING_0_CODE: u64 = 0x08;
const INTERRUPT_GATE: u64 = 0x8e00;
const STUB_SIZE: u64 = 16;

const LOCAL_APIC: u64 = 0xfee0_0000;
const LOCAL_APIC_ID: u64 = LOCAL_APIC + 0x20;
const SPURIOUS_INTERRUPT: u64 = LOCAL_APIC + 0xf0;
const INTERRUPT_COMMAND_LOW: u64 = LOCAL_APIC + 0x300;
const INTERRUPT_COMMAND_HIGH: u64 = LOCAL_APIC + 0x310;
const TIMER: u64 = LOCAL_APIC + 0x320;
const TIMER_INITIAL_COUNT: u64 = LOCAL_APIC + 0x380;
const TIMER_CURRENT_COUNT: u64 = LOCAL_APIC + 0x390;
const TIMER_DIVIDE: u64 = LOCAL_APIC + 0x3e0;

const SOFTWARE_ENABLE: u32 = 0x100;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;
const DELIVERY_PENDING: u32 = 1 << 12;
const DIVIDE_BY_1: u32 = 0b1011;
const ASSERT: u32 = 1 << 14;
const INIT: u32 = 5 << 8;
const START_UP: u32 = 6 << 8;

const IO_APIC_SELECT: u64 = 0xfec0_0000;
const IO_APIC_WINDOW: u64 = 0xfec0_0010;
const IO_APIC_VERSION: u32 = 1;
const IO_APIC_FIRST_REDIRECTION: u32 = 0x10;

/// Vector of the local APIC's timer, which ends a wait that takes too long.
pub const TIMER_VECTOR: u8 = 0xf0;
const SPURIOUS_VECTOR: u32 = 0xff;

/// First vector that is not an exception.
pub const FIRST_VECTOR: u8 = 32;

unsafe extern "C" {
    static vector_stubs: u8;
    static mut interrupt_descriptor_table: [[u64; 2]; 256];
    static interrupt_counts: [AtomicU64; 256];
    static interrupt_total: AtomicU64;
}

/// Points every gate of the interrupt descriptor table at its stub.
pub(crate) fn fill_descriptor_table() {
    // SAFETY: one processor runs, and no exception happens here that would use the table.
    let table = unsafe { (&raw mut interrupt_descriptor_table).as_mut_unchecked() };
    let mut handler = &raw const vector_stubs as u64;
    for gate in table {
        let low = (handler & 0xffff)
            | RING_0_CODE << 16
            | INTERRUPT_GATE << 32
            | (handler >> 16 & 0xffff) << 48;
        *gate = [low, handler >> 32];
        handler += STUB_SIZE;
    }
    // The processor reads the table behind the compiler's back.
    compiler_fence(Ordering::SeqCst);
}

/// How many interrupts of this vector all processors have taken.
pub fn count(vector: u8) -> u64 {
    // SAFETY: counters that the assembly only increments, atomically.
    unsafe { interrupt_counts[usize::from(vector)].load(Ordering::Acquire) }
}

/// How many interrupts all processors have taken.
pub fn total() -> u64 {
    // SAFETY: a counter that the assembly only increments, atomically.
    unsafe { interrupt_total.load(Ordering::Acquire) }
}

/// Halts this processor until `done` holds, which is asked again after every interrupt, or until
/// `timeout` has passed. Returns whether it held.
pub fn wait_until(timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
    if done() {
        return true;
    }
    let deadline = Deadline::after(timeout);
    start_periodic_timer(timeout + Duration::from_millis(1));
    let held = loop {
        let seen = total();
        if done() {
            break true;
        }
        if deadline.passed() {
            break false;
        }
        wait_for_interrupt(seen);
    };
    stop_timer();
    held
}

/// Takes the interrupts that are pending on this processor.
pub fn take_pending() {
    enable_interrupts();
    disable_interrupts();
}

/// Accesses to the local APIC, whose page is mapped and belongs to nothing else.
fn read_local_apic(register: u64) -> u32 {
    // SAFETY: a register of the local APIC, which reaches no memory.
    unsafe { read_32(register) }
}

fn write_local_apic(register: u64, value: u32) {
    // SAFETY: a register of the local APIC, which reaches no memory of Rust's; the interrupts it
    // causes are taken by `assembly/traps.s`.
    unsafe { write_32(register, value) }
}

/// Enables this processor's local APIC. The boot processor must do this before it takes
/// interrupts; application processors have done it.
pub fn enable_local_apic() {
    write_local_apic(SPURIOUS_INTERRUPT, SOFTWARE_ENABLE | SPURIOUS_VECTOR);
}

/// This processor's local APIC id.
pub fn local_apic_id() -> u8 {
    (read_local_apic(LOCAL_APIC_ID) >> 24) as u8
}

/// Starts the timer of this processor's local APIC: an interrupt of [`TIMER_VECTOR`] every
/// `period`, at most every four seconds. KVM counts it in nanoseconds on every host.
pub fn start_periodic_timer(period: Duration) {
    enable_local_apic();
    write_local_apic(TIMER_DIVIDE, DIVIDE_BY_1);
    write_local_apic(TIMER, u32::from(TIMER_VECTOR) | PERIODIC);
    write_local_apic(
        TIMER_INITIAL_COUNT,
        u32::try_from(period.as_nanos()).unwrap_or(u32::MAX),
    );
}

/// Makes the timer of this processor's local APIC interrupt by [`TIMER_VECTOR`] when the time stamp
/// counter reaches the MSR IA32_TSC_DEADLINE.
pub fn select_deadline_timer() {
    enable_local_apic();
    write_local_apic(TIMER, u32::from(TIMER_VECTOR) | TSC_DEADLINE);
}

/// Stops the timer of this processor's local APIC.
pub fn stop_timer() {
    write_local_apic(TIMER_INITIAL_COUNT, 0);
}

/// Starts the timer of this processor's local APIC without an interrupt.
pub(crate) fn start_free_running_timer() {
    enable_local_apic();
    write_local_apic(TIMER_DIVIDE, DIVIDE_BY_1);
    write_local_apic(TIMER, u32::from(TIMER_VECTOR) | MASKED);
    write_local_apic(TIMER_INITIAL_COUNT, u32::MAX);
}

/// Time since [`start_free_running_timer`], at most four seconds.
pub(crate) fn free_running_timer_elapsed() -> Duration {
    Duration::from_nanos(u64::from(u32::MAX - read_local_apic(TIMER_CURRENT_COUNT)))
}

fn send_command(destination: u8, command: u32) {
    write_local_apic(INTERRUPT_COMMAND_HIGH, u32::from(destination) << 24);
    write_local_apic(INTERRUPT_COMMAND_LOW, command);
    while read_local_apic(INTERRUPT_COMMAND_LOW) & DELIVERY_PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Sends an interrupt to the processor with this local APIC id.
pub fn send(destination: u8, vector: u8) {
    send_command(destination, u32::from(vector) | ASSERT);
}

/// Sends INIT to the processor with this local APIC id.
pub fn send_init(destination: u8) {
    send_command(destination, INIT | ASSERT);
}

/// Sends the start-up interrupt: the processor begins in real mode at `page` times 4096.
pub(crate) fn send_start_up(destination: u8, page: u8) {
    send_command(destination, START_UP | ASSERT | u32::from(page));
}

fn read_io_apic(register: u32) -> u32 {
    // SAFETY: the I/O APIC's registers reach no memory.
    unsafe {
        write_32(IO_APIC_SELECT, register);
        read_32(IO_APIC_WINDOW)
    }
}

fn write_io_apic(register: u32, value: u32) {
    // SAFETY: the I/O APIC's registers reach no memory; the interrupts it lets through are taken
    // by `assembly/traps.s`.
    unsafe {
        write_32(IO_APIC_SELECT, register);
        write_32(IO_APIC_WINDOW, value);
    }
}

/// Returns the number of inputs of the I/O APIC.
pub fn io_apic_input_count() -> u32 {
    (read_io_apic(IO_APIC_VERSION) >> 16 & 0xff) + 1
}

/// Routes an input of the I/O APIC, edge-triggered and active high, to `vector` of this processor,
/// and enables this processor's local APIC.
pub fn route(gsi: u32, vector: u8) {
    enable_local_apic();
    let register = IO_APIC_FIRST_REDIRECTION + 2 * gsi;
    write_io_apic(register + 1, u32::from(local_apic_id()) << 24);
    write_io_apic(register, u32::from(vector));
}

/// Masks an input of the I/O APIC.
pub fn mask(gsi: u32) {
    write_io_apic(IO_APIC_FIRST_REDIRECTION + 2 * gsi, MASKED);
}
