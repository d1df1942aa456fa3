//! The handle with which the owner of a machine controls and observes its balloon while the guest runs.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::options::PAGES_PER_MIB;
use super::{
    BalloonError, BalloonMetrics, BalloonOptions, GuestStatistics, HintingCommand, HintingStatus,
    Shared, config, lock, target_pages,
};
use crate::virtio::DriverLink;

/// The shortest time that a timer can be set to.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// A handle to a balloon.
pub struct BalloonHandle {
    pub(super) options: BalloonOptions,
    pub(super) memory_mib: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) link: Arc<DriverLink>,
}

/// The size of a balloon, and the driver's statistics on the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatistics {
    /// How many pages of 4096 bytes the guest is to give up.
    pub target_pages: u32,
    /// How many pages are in the balloon, as reported by the driver.
    pub actual_pages: u32,
    /// [`BalloonStatistics::target_pages`] in MiB.
    pub target_mib: u32,
    /// [`BalloonStatistics::actual_pages`] in whole MiB.
    pub actual_mib: u32,
    /// The latest statistics; empty if there are none.
    pub guest: GuestStatistics,
    /// Whether the guest has a driver at work.
    pub has_driver: bool,
    /// The progress of free page hinting; `None` if it is off.
    pub hinting: Option<HintingStatus>,
}

impl BalloonHandle {
    /// Returns the present settings of the balloon.
    pub fn options(&self) -> BalloonOptions {
        let schedule = self.shared.schedule.as_ref();
        BalloonOptions {
            target_mib: self.page_count(config::NUM_PAGES) / PAGES_PER_MIB,
            statistics_interval: schedule.map(|schedule| lock(schedule).interval),
            ..self.options
        }
    }

    /// Asks the guest to give up `mib` MiB in all. It does so over time and as far as it can.
    ///
    /// # Errors
    /// If that is more than its memory.
    pub fn set_target(&self, mib: u32) -> Result<(), BalloonError> {
        let pages = target_pages(mib, self.memory_mib)?;
        if self.page_count(config::NUM_PAGES) != pages {
            let bytes = pages.to_le_bytes();
            self.shared.config.write(config::NUM_PAGES, &bytes);
            self.link.notify_configuration_change();
        }
        Ok(())
    }

    /// Changes how often the guest is asked for statistics, and asks it at once.
    ///
    /// # Errors
    /// [`BalloonError::NoStatistics`] if they were off at the start.
    pub fn set_statistics_interval(&self, interval: NonZeroU32) -> Result<(), BalloonError> {
        let Some(schedule) = &self.shared.schedule else {
            return Err(BalloonError::NoStatistics);
        };
        let mut schedule = lock(schedule);
        schedule.interval = interval;
        schedule.set_timer(AT_ONCE).map_err(BalloonError::Timer)
    }

    /// Returns the size of the balloon, and the guest's latest statistics.
    pub fn statistics(&self) -> BalloonStatistics {
        let target_pages = self.page_count(config::NUM_PAGES);
        let actual_pages = self.page_count(config::ACTUAL);
        BalloonStatistics {
            target_pages,
            actual_pages,
            target_mib: target_pages / PAGES_PER_MIB,
            actual_mib: actual_pages / PAGES_PER_MIB,
            guest: *lock(&self.shared.statistics),
            has_driver: self.shared.has_driver.load(Ordering::Acquire),
            hinting: match self.options.free_page_hinting {
                true => Some(lock(&self.shared.hinting).status()),
                false => None,
            },
        }
    }

    /// Asks the guest which memory it does not use, or lets it use all of it again.
    ///
    /// # Errors
    /// [`BalloonError::NoHinting`] if hinting was off at the start.
    pub fn hint(&self, command: HintingCommand) -> Result<(), BalloonError> {
        if !self.options.free_page_hinting {
            return Err(BalloonError::NoHinting);
        }
        self.shared
            .change_hinting(&self.link, |hinting| Some(hinting.command(command)));
        Ok(())
    }

    /// Returns the balloon's counters.
    pub fn metrics(&self) -> &Arc<BalloonMetrics> {
        &self.shared.metrics
    }

    /// Reads a field of the configuration space.
    fn page_count(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.shared.config.array(offset as u64))
    }
}
