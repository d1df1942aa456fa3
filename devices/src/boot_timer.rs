//! A register through which a guest reports that it has booted.

use std::io;
use std::time::{Duration, Instant};

use bantam_state::{RestoreError, SaveError, SavedState, Section};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::lifecycle::{Device, at_work};

/// The value that the guest writes when it has booted.
const HAS_BOOTED: u8 = 123;

/// Logs how long the machine ran from its creation until the guest had booted. Time spent paused does not
/// count.
pub struct BootTimer {
    /// The time that it ran up to the last pause.
    before: Elapsed,
    /// When the machine last started or resumed, and the CPU time of the process at that moment. `None` while
    /// it is paused.
    running: Option<(Instant, Duration)>,
    /// A guest may report it over and over; only the first report is logged.
    has_booted: bool,
}

/// How long a machine has run.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Elapsed {
    time: Duration,
    cpu_time: Duration,
}

impl BootTimer {
    /// Starts a timer.
    ///
    /// # Errors
    /// If the host's clocks cannot be read.
    pub fn start() -> io::Result<BootTimer> {
        Ok(BootTimer {
            before: Elapsed::default(),
            running: Some((Instant::now(), process_cpu_time()?)),
            has_booted: false,
        })
    }

    fn elapsed(&self) -> Elapsed {
        let mut elapsed = self.before;
        if let Some((since, cpu_before)) = self.running {
            let cpu_time = process_cpu_time().unwrap_or_default();
            elapsed.time = elapsed.time.saturating_add(since.elapsed());
            elapsed.cpu_time = elapsed
                .cpu_time
                .saturating_add(cpu_time.saturating_sub(cpu_before));
        }
        elapsed
    }
}

/// The saved state of a timer.
#[derive(Debug, Serialize, Deserialize)]
struct BootTimerState {
    elapsed: Elapsed,
    has_booted: bool,
}

impl SavedState for BootTimerState {
    const KIND: &'static str = "boot-timer";
    const VERSION: u16 = 1;
}

impl Device for BootTimer {
    fn pause(&mut self) -> io::Result<()> {
        self.before = self.elapsed();
        self.running = None;
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        if self.running.is_none() {
            self.running = Some((Instant::now(), process_cpu_time()?));
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.before = Elapsed::default();
        self.running = None;
        self.has_booted = false;
    }

    fn save(&self) -> Result<Section, SaveError> {
        if self.running.is_some() {
            return Err(at_work::<BootTimerState>());
        }
        Section::of(&BootTimerState {
            elapsed: self.before,
            has_booted: self.has_booted,
        })
    }

    fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.reset();
        let BootTimerState {
            elapsed,
            has_booted,
        } = section.decode()?;
        self.before = elapsed;
        self.has_booted = has_booted;
        Ok(())
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
        let Elapsed { time, cpu_time } = self.elapsed();
        tracing::info!(
            "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
            time.as_micros(),
            time.as_millis(),
            cpu_time.as_micros(),
            cpu_time.as_millis()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suspend_test::{SuspendCase, suspend_tests};

    impl SuspendCase for BootTimer {
        fn new() -> BootTimer {
            BootTimer::start().unwrap()
        }

        fn work(&mut self) {
            self.write(0, &[HAS_BOOTED]);
            assert!(self.has_booted);
        }

        fn begin(&mut self) {
            self.write(0, &[HAS_BOOTED]);
        }

        fn end(&mut self) {
            assert!(self.has_booted);
        }

        fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
            act(self)
        }

        fn replace(&mut self) {
            *self = BootTimer::start().unwrap();
        }

        fn visible_state(&mut self) -> Vec<u8> {
            vec![u8::from(self.has_booted)]
        }
    }

    suspend_tests!(BootTimer);

    #[test]
    fn pauses_do_not_count() {
        const TIME: Duration = Duration::from_millis(30);
        let mut timer = BootTimer::start().unwrap();
        std::thread::sleep(TIME);
        timer.pause().unwrap();
        let before = timer.elapsed().time;
        assert!(before >= TIME);
        let section = timer.save().unwrap();
        std::thread::sleep(TIME);
        assert_eq!(timer.elapsed().time, before);

        let mut other = BootTimer::start().unwrap();
        other.restore(&section).unwrap();
        assert_eq!(other.elapsed().time, before);
        other.resume().unwrap();
        std::thread::sleep(TIME);
        assert!(other.elapsed().time >= before + TIME);
    }
}
