//! A register by which a guest says that it has booted.

use std::io;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;

/// What the guest writes when it has booted.
const HAS_BOOTED: u8 = 123;

/// Logs how long it took from its creation until the guest has booted.
pub struct BootTimer {
    started: Instant,
    /// CPU time of the process by then.
    started_cpu: Duration,
    /// A guest may say it without end; the log hears of the first.
    has_booted: bool,
}

impl BootTimer {
    /// A timer that starts now.
    ///
    /// # Errors
    /// When the host does not tell the time.
    pub fn start() -> io::Result<BootTimer> {
        Ok(BootTimer {
            started: Instant::now(),
            started_cpu: process_cpu_time()?,
            has_booted: false,
        })
    }
}

fn process_cpu_time() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset != 0 || data != [HAS_BOOTED] || std::mem::replace(&mut self.has_booted, true) {
            return;
        }
        let time = self.started.elapsed();
        let cpu_time = process_cpu_time().unwrap_or_default();
        let cpu_time = cpu_time.saturating_sub(self.started_cpu);
        tracing::info!(
            "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
            time.as_micros(),
            time.as_millis(),
            cpu_time.as_micros(),
            cpu_time.as_millis()
        );
    }
}
