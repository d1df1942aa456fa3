//! Counts in memory and in registers at the same time, with a timer that interrupts it, until it is
//! told to stop: after a restore from any moment, both counts must still agree.
//!
//! It prints the address of [`COUNTERS`], which the test reads and writes. Arguments:
//! `timer=local|deadline|interval`, the local APIC's periodic timer, its TSC deadline, or the 8254
//! by the I/O APIC. `second=at-once|told|reset`: a second processor counts as well, from the start,
//! when it is told, or when it is told after it has got its INIT at the start. `others=N`: so do N
//! processors, at most three, and not one. `pages=N`: each also counts in N pages, at most 256: in a copy
//! of memory that is not of one moment, some of them have another number than the others.

#![no_std]
#![no_main]

use core::arch::asm;
use core::ptr;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use core::time::Duration;

use runtime::system_call::{enable_interrupts, read_port_8, write_msr, write_port_8};
use runtime::time::Deadline;
use runtime::{arguments, interrupts, payload, port, println, processors, report, time};

/// Most processors that count.
const MAX_PROCESSORS: usize = 4;

/// The state of a processor that counts.
#[repr(C)]
struct Processor {
    count: AtomicU64,
    /// Failed comparisons.
    faults: AtomicU64,
    /// Accesses to a device.
    accesses: AtomicU64,
    /// Interrupts: of the timer for the boot processor, from the boot processor for the others.
    interrupts: AtomicU64,
}

/// The memory that the test reads and writes.
#[repr(C, align(64))]
struct Counters {
    processors: [Processor; MAX_PROCESSORS],
    /// Not zero if the other processors have to start.
    start_second: AtomicU64,
    /// Not zero if all have to stop.
    stop: AtomicU64,
}

static COUNTERS: Counters = Counters {
    processors: [const {
        Processor {
            count: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            accesses: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
        }
    }; MAX_PROCESSORS],
    start_second: AtomicU64::new(0),
    stop: AtomicU64::new(0),
};

/// Most pages in which a processor counts.
const MAX_PAGES: usize = 256;

/// A page with a count in it.
#[repr(C, align(4096))]
struct Page(AtomicU64);

static PAGES: [[Page; MAX_PAGES]; MAX_PROCESSORS] =
    [const { [const { Page(AtomicU64::new(0)) }; MAX_PAGES] }; MAX_PROCESSORS];
/// Number of pages in which each processor counts.
static PAGE_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Number of processors that have stopped counting.
static STOPPED: AtomicU64 = AtomicU64::new(0);

const PERIOD: Duration = Duration::from_millis(1);
const INTERVAL_TIMER_GSI: u32 = 0;
const INTERVAL_TIMER_VECTOR: u8 = 0x40;
/// Vector for the second processor; the others have those after it.
const PING_VECTOR: u8 = 0x41;

const IA32_TSC_DEADLINE: u32 = 0x6e0;
const INTERVAL_TIMER_COUNTER_0: u16 = 0x40;
const INTERVAL_TIMER_CONTROL: u16 = 0x43;
/// Counter 0, low byte before high byte, mode 2 (rate generator).
const COUNT_IN_MODE_2: u8 = 0x34;
/// A millisecond at 1,193,182 Hz.
const INTERVAL_TIMER_COUNT: u16 = 1193;

/// How far it counts between two checks of the rest.
const STRIDE: u64 = 3000;

payload!(count);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Timer {
    Local,
    Deadline,
    Interval,
}

impl Timer {
    fn vector(self) -> u8 {
        match self {
            Self::Local | Self::Deadline => interrupts::TIMER_VECTOR,
            Self::Interval => INTERVAL_TIMER_VECTOR,
        }
    }

    fn start(self) {
        match self {
            Self::Local => interrupts::start_periodic_timer(PERIOD),
            Self::Deadline => {
                interrupts::select_deadline_timer();
                set_deadline();
            }
            Self::Interval => {
                interrupts::route(INTERVAL_TIMER_GSI, INTERVAL_TIMER_VECTOR);
                write_port_8(INTERVAL_TIMER_CONTROL, COUNT_IN_MODE_2);
                for byte in INTERVAL_TIMER_COUNT.to_le_bytes() {
                    write_port_8(INTERVAL_TIMER_COUNTER_0, byte);
                }
            }
        }
    }
}

fn set_deadline() {
    let ticks = time::ticks() + time::ticks_per_second() / 1000;
    // SAFETY: it changes nothing but when the next interrupt comes.
    unsafe { write_msr(IA32_TSC_DEADLINE, ticks) };
}

fn count() {
    let timer = match arguments::value("timer") {
        Some("deadline") => Timer::Deadline,
        Some("interval") => Timer::Interval,
        _ => Timer::Local,
    };
    let second = arguments::value("second");
    let others = arguments::value("others").and_then(|others| others.parse().ok());
    // Their local APIC ids.
    let others = 1..=others.unwrap_or(1).min(MAX_PROCESSORS as u8 - 1);
    let pages = arguments::value("pages").and_then(|pages| pages.parse().ok());
    PAGE_COUNT.store(pages.unwrap_or(0), Ordering::Release);
    let mut round = 0;
    // Measuring the clock uses the timer that is used differently below.
    time::ticks_per_second();
    interrupts::enable_local_apic();
    match second {
        Some("at-once") => COUNTERS.start_second.store(1, Ordering::Release),
        Some("reset") => others.clone().for_each(interrupts::send_init),
        _ => {}
    }
    let mut second_runs = false;
    let mut ticks_seen = 0;
    let mut pings_sent = [0; MAX_PROCESSORS];
    timer.start();
    enable_interrupts();
    println!("counting at {:#x}", ptr::from_ref(&COUNTERS) as usize);
    while COUNTERS.stop.load(Ordering::Acquire) == 0 {
        count_a_stride(0);
        count_in_pages(0, &mut round);
        let ticks = interrupts::count(timer.vector());
        COUNTERS.processors[0]
            .interrupts
            .store(ticks, Ordering::Release);
        if timer == Timer::Deadline && ticks != ticks_seen {
            ticks_seen = ticks;
            set_deadline();
        }
        if !second_runs && second.is_some() && COUNTERS.start_second.load(Ordering::Acquire) != 0 {
            second_runs = true;
            for id in others.clone() {
                if let Err(reason) = processors::start(id, count_beside) {
                    report::fail(format_args!("processor {id} starts"), reason);
                }
            }
        }
        if second_runs {
            others
                .clone()
                .for_each(|id| ping(id, &mut pings_sent[usize::from(id)]));
        }
    }
    if second_runs {
        let count = others.len() as u64;
        let deadline = Deadline::after(Duration::from_secs(5));
        while STOPPED.load(Ordering::Acquire) < count && !deadline.passed() {
            core::hint::spin_loop();
        }
        let stopped = STOPPED.load(Ordering::Acquire) == count;
        report::check(
            "the other processors stop",
            stopped.then_some(()).ok_or("they do not"),
        );
    }
    for (index, processor) in COUNTERS.processors.iter().enumerate() {
        let faults = processor.faults.load(Ordering::Acquire);
        let checked = if faults == 0 { Ok(()) } else { Err(faults) };
        report::check(format_args!("processor {index} counts right"), checked);
    }
}

/// Interrupts a processor if it has taken the interrupt before. If one is lost, there is never another.
fn ping(id: u8, sent: &mut u64) {
    let vector = PING_VECTOR - 1 + id;
    if interrupts::count(vector) == *sent {
        COUNTERS.processors[usize::from(id)]
            .interrupts
            .store(*sent, Ordering::Release);
        *sent += 1;
        interrupts::send(id, vector);
    }
}

fn count_beside(index: usize) {
    enable_interrupts();
    let mut round = 0;
    while COUNTERS.stop.load(Ordering::Acquire) == 0 {
        count_a_stride(index);
        count_in_pages(index, &mut round);
    }
    STOPPED.fetch_add(1, Ordering::AcqRel);
}

/// Counts in each page of the processor, and checks that it had the same count as the others.
fn count_in_pages(index: usize, round: &mut u64) {
    let count = PAGE_COUNT.load(Ordering::Acquire);
    let faults = PAGES[index].iter().take(count).filter(|page| {
        let before = page.0.fetch_add(1, Ordering::AcqRel);
        before != *round
    });
    let faults = faults.count() as u64;
    *round += 1;
    let total = &COUNTERS.processors[index].faults;
    total.fetch_add(faults, Ordering::AcqRel);
}

/// Counts in memory, in R8 and in XMM0, and compares them after each step; compares the time stamp counter with
/// the one before; and lets all other registers that the compiler spares keep what they have. Then accesses
/// a device.
fn count_a_stride(index: usize) {
    let processor = &COUNTERS.processors[index];
    let faults: u64;
    // SAFETY: memory is only accessed at `count`, which is shared by atomics, and only this
    // processor writes to it. All changed registers are declared.
    unsafe {
        asm!(
            "mov r8, [rdi]",
            "mov r11, r8",
            // All others get a distinct value.
            ".irp k, 10, 12, 13, 14, 15",
            "lea r\\k, [r11 + \\k]",
            ".endr",
            ".irp k, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "lea rax, [r11 + 100 + \\k]",
            "movq xmm\\k, rax",
            ".endr",
            "mov eax, 1",
            "movq xmm1, rax",
            "movq xmm0, r8",
            "xor r9, r9",
            "2:",
            "inc r8",
            "paddq xmm0, xmm1",
            "inc qword ptr [rdi]",
            "cmp r8, [rdi]",
            "jne 3f",
            "movq rax, xmm0",
            "cmp rax, r8",
            "jne 3f",
            "rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "cmp rax, r9",
            "jb 3f",
            "mov r9, rax",
            "dec rcx",
            "jnz 2b",
            ".irp k, 10, 12, 13, 14, 15",
            "lea rax, [r11 + \\k]",
            "cmp rax, r\\k",
            "jne 3f",
            ".endr",
            ".irp k, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "lea rax, [r11 + 100 + \\k]",
            "movq rdx, xmm\\k",
            "cmp rax, rdx",
            "jne 3f",
            ".endr",
            "xor esi, esi",
            "jmp 4f",
            "3:",
            "mov esi, 1",
            "4:",
            in("rdi") processor.count.as_ptr(),
            inlateout("rcx") STRIDE => _,
            lateout("rsi") faults,
            out("rax") _, out("rdx") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        );
    }
    processor.faults.fetch_add(faults, Ordering::AcqRel);
    read_port_8(port::I8042_COMMAND);
    processor.accesses.fetch_add(1, Ordering::AcqRel);
}
