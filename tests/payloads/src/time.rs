//! Time, measured by the processor's time stamp counter.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

pub use core::time::Duration;

use crate::interrupts;

/// How long the counter is compared with the local APIC's timer.
const CALIBRATION: Duration = Duration::from_millis(2);

/// The time stamp counter.
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and ring 3 may use it while CR4.TSD is
    // clear, as `assembly/entry.s` leaves it.
    unsafe { _rdtsc() }
}

/// Returns the ticks of the time stamp counter a second, measured against the local APIC's timer on
/// first use.
pub fn ticks_per_second() -> u64 {
    static FREQUENCY: AtomicU64 = AtomicU64::new(0);
    let mut frequency = FREQUENCY.load(Ordering::Relaxed);
    if frequency == 0 {
        interrupts::start_free_running_timer();
        let (start, timer_start) = both_clocks();
        let (end, timer_end) = loop {
            let (end, timer_end) = both_clocks();
            if timer_end - timer_start >= CALIBRATION {
                break (end, timer_end);
            }
        };
        let counted =
            u128::from(end - start) * 1_000_000_000 / (timer_end - timer_start).as_nanos();
        frequency = counted as u64;
        FREQUENCY.store(frequency, Ordering::Relaxed);
    }
    frequency
}

/// The time stamp counter and the timer at one moment, as closely as the slow access to the timer
/// allows: the fastest of some tries.
fn both_clocks() -> (u64, Duration) {
    let mut best = (u64::MAX, 0, Duration::ZERO);
    for _ in 0..8 {
        let before = ticks();
        let timer = interrupts::free_running_timer_elapsed();
        let taken = ticks() - before;
        if taken < best.0 {
            best = (taken, before + taken / 2, timer);
        }
    }
    (best.1, best.2)
}

/// Time between two values of the time stamp counter.
pub fn duration(start: u64, end: u64) -> Duration {
    let nanoseconds =
        u128::from(end.saturating_sub(start)) * 1_000_000_000 / u128::from(ticks_per_second());
    Duration::from_nanos(nanoseconds as u64)
}

/// Lets time pass, without halting.
pub fn delay(time: Duration) {
    let deadline = Deadline::after(time);
    while !deadline.passed() {
        core::hint::spin_loop();
    }
}

/// A deadline.
#[derive(Clone, Copy)]
pub struct Deadline(u64);

impl Deadline {
    /// Makes a deadline `time` from now.
    pub fn after(time: Duration) -> Self {
        let ticks_to_go = time.as_nanos() * u128::from(ticks_per_second()) / 1_000_000_000;
        Self(ticks() + ticks_to_go as u64)
    }

    /// Returns whether it has passed.
    pub fn passed(&self) -> bool {
        ticks() >= self.0
    }
}
