//! Application processors: each is started as the MP specification 1.4 appendix B.4 says, and runs
//! a function in ring 3 on its own stack.

use alloc::boxed::Box;
use core::fmt;
use core::ptr;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;

use crate::interrupts;
use crate::system_call;
use crate::time::{self, Deadline};

/// Most processors a payload can use, the boot processor included.
pub const MAX_PROCESSORS: usize = 32;

/// The page for the start-up code of application processors: conventional memory that no longer
/// holds information from the monitor.
const TRAMPOLINE_PAGE: u8 = 8;
const RING_0_STACK_SIZE: usize = 1 << 10;
const RING_3_STACK_SIZE: usize = 32 << 10;
const FIRST_TASK_STATE: u32 = 0x28;
const TASK_STATE_SIZE: u64 = 104;
const RSP0_OFFSET: u64 = 4;
const START_TIMEOUT: Duration = Duration::from_secs(5);

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static mut gdt_task_states: [[u64; 2]; MAX_PROCESSORS];
    static mut task_states: [u8; MAX_PROCESSORS * TASK_STATE_SIZE as usize];
    static mut application_processor_task_state: u32;
    static mut application_processor_ring_0_stack_top: u32;
    static mut application_processor_ring_3_stack_top: u64;
    static mut application_processor_index: u32;
}

/// Number of processors in Rust code, including the boot processor.
static RUNNING: AtomicUsize = AtomicUsize::new(1);
/// What the processor that starts next will run: a `fn(usize)`.
static NEXT_MAIN: AtomicUsize = AtomicUsize::new(0);

/// Why a processor did not start.
#[derive(Debug)]
pub enum StartError {
    /// [`MAX_PROCESSORS`] are running.
    TooMany,
    /// It did not arrive in ring 3 in half a second.
    Silent {
        /// Its local APIC id.
        local_apic_id: u8,
    },
}

impl fmt::Display for StartError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(formatter, "{MAX_PROCESSORS} processors are running already"),
            Self::Silent { local_apic_id } => write!(
                formatter,
                "the processor with local APIC id {local_apic_id} did not come up within \
                 {START_TIMEOUT:?}"
            ),
        }
    }
}

#[repr(C, align(16))]
struct Stack<const SIZE: usize>([u8; SIZE]);

impl<const SIZE: usize> Stack<SIZE> {
    fn allocate_top() -> u64 {
        Box::into_raw(Box::<Self>::new_uninit()) as u64 + SIZE as u64
    }
}

/// Starts the processor with this local APIC id and waits until it is in ring 3. There it runs
/// `main` with its index, which counts processors from 1 as they are started (the boot processor
/// is 0), and halts for ever when that returns. Only the boot processor may call this.
///
/// # Errors
///
/// If the processor does not start, or too many have.
pub fn start(local_apic_id: u8, main: fn(usize)) -> Result<usize, StartError> {
    let index = RUNNING.load(Ordering::Acquire);
    if index >= MAX_PROCESSORS {
        return Err(StartError::TooMany);
    }
    let ring_0_stack_top = Stack::<RING_0_STACK_SIZE>::allocate_top();
    // As a call would leave it: the stack pointer is 8 less than a multiple of 16.
    let ring_3_stack_top = Stack::<RING_3_STACK_SIZE>::allocate_top() - 8;
    NEXT_MAIN.store(main as usize, Ordering::Release);
    // SAFETY: the tables and variables of `assembly/entry.s` for a processor that is not running;
    // the trampoline's page is memory that neither the image nor the heap contains.
    unsafe {
        let task_state = &raw mut task_states as u64 + index as u64 * TASK_STATE_SIZE;
        ((task_state + RSP0_OFFSET) as *mut u64).write_unaligned(ring_0_stack_top);
        let descriptor = &raw mut gdt_task_states[index];
        descriptor.write_volatile([
            (TASK_STATE_SIZE - 1)
                | (task_state & 0xff_ffff) << 16
                | 0x89 << 40
                | (task_state >> 24 & 0xff) << 56,
            0,
        ]);
        (&raw mut application_processor_task_state)
            .write_volatile(FIRST_TASK_STATE + 16 * index as u32);
        (&raw mut application_processor_ring_0_stack_top).write_volatile(ring_0_stack_top as u32);
        (&raw mut application_processor_ring_3_stack_top).write_volatile(ring_3_stack_top);
        (&raw mut application_processor_index).write_volatile(index as u32);
        let size = &raw const trampoline_end as usize - &raw const trampoline as usize;
        ptr::copy_nonoverlapping(
            &raw const trampoline,
            (usize::from(TRAMPOLINE_PAGE) << 12) as *mut u8,
            size,
        );
    }
    interrupts::enable_local_apic();
    interrupts::send_init(local_apic_id);
    time::delay(Duration::from_micros(200));
    interrupts::send_start_up(local_apic_id, TRAMPOLINE_PAGE);
    let deadline = Deadline::after(START_TIMEOUT);
    while RUNNING.load(Ordering::Acquire) == index {
        if deadline.passed() {
            return Err(StartError::Silent { local_apic_id });
        }
        core::hint::spin_loop();
    }
    Ok(index)
}

#[unsafe(no_mangle)]
extern "C" fn ring_3_application_processor(index: usize) -> ! {
    let main = NEXT_MAIN.load(Ordering::Acquire) as *const ();
    // SAFETY: `start` stored it, and stores the next only after this processor is counted.
    let main = unsafe { core::mem::transmute::<*const (), fn(usize)>(main) };
    interrupts::enable_local_apic();
    RUNNING.fetch_add(1, Ordering::AcqRel);
    main(index);
    system_call::halt()
}
