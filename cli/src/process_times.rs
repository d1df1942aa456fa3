//! The time when the process was started.

use std::time::Duration;

use bantam_api::StartupTimes;
use nix::time::{ClockId, clock_gettime};

/// The time when the process was started, in microseconds, as given on the command line.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessTimes {
    /// On the monotonic clock.
    pub start_us: Option<u64>,
    /// On the clock of the process's CPU time.
    pub start_cpu_us: Option<u64>,
    /// CPU time of the parent process up to then.
    pub parent_cpu_us: Option<u64>,
}

impl ProcessTimes {
    /// Returns how long the process took from its start until now, as far as that is known.
    pub fn until_now(&self) -> StartupTimes {
        let microseconds = |clock| {
            let now = clock_gettime(clock).map(Duration::from);
            now.map_or(0, |time| time.as_micros() as u64)
        };
        let wall = self
            .start_us
            .map(|start| microseconds(ClockId::CLOCK_MONOTONIC).saturating_sub(start));
        let cpu = self.start_cpu_us.map(|start| {
            microseconds(ClockId::CLOCK_PROCESS_CPUTIME_ID)
                .saturating_sub(start)
                .saturating_add(self.parent_cpu_us.unwrap_or(0))
        });
        StartupTimes {
            wall_us: wall.unwrap_or(0),
            cpu_us: cpu.unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_reported_if_it_is_known() {
        let times = ProcessTimes {
            start_us: Some(1),
            start_cpu_us: Some(u64::MAX),
            parent_cpu_us: Some(7),
        };
        let told = times.until_now();
        assert!(told.wall_us > 0);
        assert_eq!(told.cpu_us, 7);
        let told = ProcessTimes::default().until_now();
        assert_eq!(told.wall_us, 0);
        assert_eq!(told.cpu_us, 0);
    }
}
