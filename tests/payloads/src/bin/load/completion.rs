//! Waiting for a device, polled or by interrupt.

use alloc::format;
use alloc::string::String;
use core::time::Duration;

use runtime::time::{self, Deadline};
use runtime::virtio::{Completion, SlotQueue, Transport};
use runtime::{interrupts, system_call};

/// Vector of the device's interrupt.
pub const DEVICE_VECTOR: u8 = 0x50;

/// How long a device may be silent while operations are under way.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// An interrupt of the timer ends a halt this often, so that a silent device is noticed.
const TIMER_PERIOD: Duration = Duration::from_millis(100);
/// Polls of the rings between readings of the clock.
const LOOKS: u32 = 1024;

/// The way in which one load waits.
pub struct Waiter<'a> {
    device: &'a dyn Transport,
    completion: Completion,
}

impl<'a> Waiter<'a> {
    /// Prepares the device's queues, and its interrupt if it is used.
    ///
    /// # Errors
    ///
    /// If the device's interrupt is not known.
    pub fn new(
        device: &'a dyn Transport,
        completion: Completion,
        queues: &mut [SlotQueue],
    ) -> Result<Self, String> {
        if completion == Completion::Interrupt {
            let gsi = device
                .gsi()
                .ok_or("its interrupt is not known: expected completion=polled")?;
            device.acknowledge_interrupt();
            interrupts::route(gsi, DEVICE_VECTOR);
            interrupts::start_periodic_timer(TIMER_PERIOD);
        }
        for queue in queues {
            queue.suppress_interrupts();
        }
        Ok(Self { device, completion })
    }

    /// Waits until one of `queues` has a used chain, or until `end`, a value of the time stamp
    /// counter. Returns the time.
    ///
    /// # Errors
    ///
    /// If the device is silent for too long.
    #[inline]
    pub fn wait(&self, queues: &mut [SlotQueue], end: u64) -> Result<u64, String> {
        for _ in 0..LOOKS {
            if queues.iter().any(SlotQueue::has_used) {
                return Ok(time::ticks());
            }
            if self.completion == Completion::Interrupt {
                break;
            }
            core::hint::spin_loop();
        }
        self.wait_long(queues, end)
    }

    #[cold]
    fn wait_long(&self, queues: &mut [SlotQueue], end: u64) -> Result<u64, String> {
        let deadline = Deadline::after(SILENCE_LIMIT);
        loop {
            if self.completion == Completion::Interrupt {
                let seen = interrupts::total();
                for queue in &mut *queues {
                    queue.request_interrupt();
                }
                if !queues.iter().any(SlotQueue::has_used) {
                    system_call::wait_for_interrupt(seen);
                    self.device.acknowledge_interrupt();
                }
            }
            let now = time::ticks();
            if now >= end || queues.iter().any(SlotQueue::has_used) {
                return Ok(now);
            }
            if deadline.passed() {
                let state = if self.device.needs_reset() {
                    ", and needs a reset"
                } else {
                    ""
                };
                return Err(format!(
                    "the device has done nothing for {SILENCE_LIMIT:?}{state}"
                ));
            }
            core::hint::spin_loop();
        }
    }
}
