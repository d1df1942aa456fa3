//! The memory balloon (section 5.5): takes memory from the guest and gives it back to the host.
//!
//! The guest's driver hands over the number of pages that the owner of the machine asks for (it inflates the
//! balloon) and may take them back later (it deflates it). With free page reporting it also reports pages
//! that it does not use at present. Either way the pages are discarded: the host has their memory until the
//! guest touches them again, and then they are zero.

mod config;
mod discard;
mod error;
mod handle;
mod hinting;
mod metrics;
mod options;
mod shared;
mod statistics;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bantam_memory::GuestMemory;
use bantam_state::{RestoreError, SavedState, Section};
use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use super::{Activation, COMMON_FEATURES, ConfigSpace, DriverLink, VirtioDevice, device_id};
use crate::lock::lock;
use crate::notice::DeviceNotice;
use crate::worker::VirtioWorker;
use error::WorkerError;
use hinting::Hinting;
use options::{PAGES_PER_MIB, target_pages};
use shared::{Schedule, Shared};
use worker::Worker;

pub use error::BalloonError;
pub use handle::{BalloonHandle, BalloonStatistics};
pub use hinting::{HintingCommand, HintingStatus};
pub use metrics::BalloonMetrics;
pub use options::BalloonOptions;
pub use statistics::GuestStatistics;

const QUEUE_SIZE: u16 = 256;
/// Feature bits (section 5.5.3).
mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    pub const REPORTING: u64 = 1 << 5;
}

/// Queues up to `deflateq`, which a device always has.
const QUEUES: usize = 2;
/// Queues up to `statsq`.
const QUEUES_WITH_STATISTICS: usize = 3;
/// Queues up to the number that the standard gives `free_page_vq`.
const QUEUES_WITH_HINTING: usize = 4;
/// Queues up to the number that the standard gives `reporting_vq`.
const QUEUES_WITH_REPORTING: usize = 5;

/// The front of a balloon.
pub struct Balloon {
    options: BalloonOptions,
    memory_mib: u64,
    /// The size in MiB that the owner was last told.
    told_mib: u32,
    shared: Arc<Shared>,
}

impl Balloon {
    /// Makes a balloon in `memory`.
    ///
    /// # Errors
    /// If it is to be larger than `memory`, or the host cannot create a timer for the statistics.
    pub fn new(options: &BalloonOptions, memory: &GuestMemory) -> Result<Balloon, BalloonError> {
        let memory_mib = memory.size() >> 20;
        let schedule = options.statistics_interval.map(|interval| {
            let timer = TimerFd::new().map_err(|errno| BalloonError::Timer(errno.into()))?;
            Ok(Mutex::new(Schedule { timer, interval }))
        });
        let mut space = match options.free_page_hinting {
            true => vec![0; config::SIZE_WITH_HINTING],
            false => vec![0; config::SIZE],
        };
        let pages = target_pages(options.target_mib, memory_mib)?;
        space[config::NUM_PAGES..][..4].copy_from_slice(&pages.to_le_bytes());
        let actual = config::ACTUAL..config::ACTUAL + 4;
        Ok(Balloon {
            options: *options,
            memory_mib,
            told_mib: 0,
            shared: Arc::new(Shared {
                config: ConfigSpace::with_driver_field(space, actual),
                statistics: Mutex::default(),
                schedule: schedule.transpose()?,
                hinting: Mutex::new(Hinting::new()),
                has_driver: AtomicBool::new(false),
                metrics: Arc::default(),
            }),
        })
    }

    /// Makes a handle to the device for the owner of the machine. `link` is the device's.
    pub fn handle(&self, link: Arc<DriverLink>) -> BalloonHandle {
        BalloonHandle {
            options: self.options,
            memory_mib: self.memory_mib,
            shared: self.shared.clone(),
            link,
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        device_id::BALLOON
    }

    fn features(&self) -> u64 {
        let options = &self.options;
        let mut features = COMMON_FEATURES;
        for (offered, bit) in [
            (options.statistics_interval.is_some(), feature::STATS_VQ),
            (options.deflate_on_oom, feature::DEFLATE_ON_OOM),
            (options.free_page_hinting, feature::FREE_PAGE_HINT),
            (options.free_page_reporting, feature::REPORTING),
        ] {
            if offered {
                features |= bit;
            }
        }
        features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        const SIZES: [u16; QUEUES_WITH_REPORTING] = [QUEUE_SIZE; QUEUES_WITH_REPORTING];
        if self.options.free_page_reporting {
            &SIZES
        } else if self.options.free_page_hinting {
            &SIZES[..QUEUES_WITH_HINTING]
        } else if self.options.statistics_interval.is_some() {
            &SIZES[..QUEUES_WITH_STATISTICS]
        } else {
            &SIZES[..QUEUES]
        }
    }

    fn config(&self) -> &ConfigSpace {
        &self.shared.config
    }

    fn driver_wrote_config(&mut self, _offset: u64, _data: &[u8]) -> Option<DeviceNotice<'static>> {
        let pages = u32::from_le_bytes(self.shared.config.array(config::ACTUAL as u64));
        let mib = pages / PAGES_PER_MIB;
        let is_other = std::mem::replace(&mut self.told_mib, mib) != mib;
        is_other.then_some(DeviceNotice::MemoryReturned { mib })
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        *lock(&self.shared.statistics) = GuestStatistics::default();
        match &activation.state {
            Some(state) => {
                let state = state.decode::<BalloonState>();
                let BalloonState { hinting } = state.map_err(|error| error.to_string())?;
                self.shared.restore_hinting(hinting);
            }
            None => self.shared.reset_hinting(),
        }
        match Worker::new(self.shared.clone(), activation) {
            Ok(worker) => {
                self.shared.has_driver.store(true, Ordering::Release);
                Ok(Box::new(worker))
            }
            Err(reason) => {
                self.shared.metrics.activate_fails.add(1);
                Err(reason)
            }
        }
    }

    fn restore(&mut self, config: &[u8], _state: Option<&Section>) -> Result<(), RestoreError> {
        let saved = config
            .get(config::NUM_PAGES..)
            .and_then(|it| it.first_chunk());
        let pages = saved.map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let size_mib = pages.div_ceil(PAGES_PER_MIB);
        if u64::from(size_mib) > self.memory_mib {
            return Err(RestoreError::Invalid {
                kind: "balloon".to_owned(),
                reason: format!(
                    "it is to be {size_mib} MiB large, and the guest has {} MiB",
                    self.memory_mib
                ),
            });
        }
        Ok(())
    }
}

/// The state that a worker needs to take the place of another.
#[derive(Serialize, Deserialize)]
struct BalloonState {
    hinting: Hinting,
}

impl SavedState for BalloonState {
    const KIND: &'static str = "balloon";
    const VERSION: u16 = 1;
}
