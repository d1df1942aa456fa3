//! The memory balloon (section 5.5): takes memory from the guest and gives it back to the host.
//!
//! The guest's driver hands over as many pages as the owner of the machine asks for (it inflates the
//! balloon) and may have them again later (it deflates it). With free page reporting it also says
//! which pages it does not use at the moment. Either way the pages are discarded: the host has their
//! memory for itself until the guest touches them again, and then they are zero.

mod discard;
mod handle;
mod hinting;
mod statistics;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bantam_metrics::Counter;
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::timerfd::TimerFd;

use super::{
    Activation, BufferError, COMMON_FEATURES, ConfigSpace, QueueError, VirtioDevice,
    VirtioInterrupt, device_id,
};
use crate::GuestMemory;
use crate::event_loop::Subscriber;
use hinting::Hinting;
use worker::Worker;

pub use handle::{BalloonHandle, BalloonStatistics};
pub use hinting::{HintingCommand, HintingStatus};
pub use statistics::GuestStatistics;

const QUEUE_SIZE: u16 = 256;
/// Number of the balloon's pages in a mebibyte.
const PAGES_PER_MIB: u32 = 256;

/// Feature bits (section 5.5.3).
mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    pub const REPORTING: u64 = 1 << 5;
}

/// Offsets in the configuration space (section 5.5.4).
mod config {
    pub const NUM_PAGES: usize = 0;
    pub const ACTUAL: usize = 4;
    pub const SIZE: usize = 8;
    /// There with free page hinting only.
    pub const HINTING_COMMAND: usize = 8;
    pub const SIZE_WITH_HINTING: usize = 12;
}

/// Queues up to `deflateq`, which a device always has.
const QUEUES: usize = 2;
/// Queues up to `statsq`.
const QUEUES_WITH_STATISTICS: usize = 3;
/// Queues up to the number that the standard has for `free_page_vq`.
const QUEUES_WITH_HINTING: usize = 4;
/// Queues up to the number that the standard has for `reporting_vq`.
const QUEUES_WITH_REPORTING: usize = 5;

/// How a balloon works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BalloonOptions {
    /// How much memory the guest is to give up, in MiB.
    pub target_mib: u32,
    /// Whether the guest may take memory back when it would otherwise have to end processes.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics of its memory, in seconds; never where there is
    /// none.
    pub statistics_interval: Option<NonZeroU32>,
    /// Whether the guest says by itself which memory it does not use.
    pub free_page_reporting: bool,
    /// Whether the guest can be asked which memory it does not use.
    pub free_page_hinting: bool,
}

/// What a balloon has done.
#[derive(Debug, Default, Serialize)]
pub struct BalloonMetrics {
    /// Requests to inflate.
    pub inflate_count: Counter,
    /// Requests to deflate.
    pub deflate_count: Counter,
    /// Times that the driver gave statistics.
    pub stats_updates_count: Counter,
    /// Statistics with a part that is none.
    pub stats_update_fails: Counter,
    /// Failures of the driver to follow the rules, and of the host to take back memory that the
    /// balloon holds.
    pub event_fails: Counter,
    /// Reports of free pages.
    pub free_page_report_count: Counter,
    /// Bytes that were given back to the host because they were reported free.
    pub free_page_report_freed: Counter,
    /// Reported ranges that the host did not take back.
    pub free_page_report_fails: Counter,
    /// Hints of free pages.
    pub free_page_hint_count: Counter,
    /// Bytes that were given back to the host because of hints.
    pub free_page_hint_freed: Counter,
    /// Hinted ranges that the host did not take back.
    pub free_page_hint_fails: Counter,
    /// Failures to begin to work when the driver was ready.
    pub activate_fails: Counter,
}

/// Why a balloon cannot be as it is wanted.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The guest has less memory.
    #[error(
        "a balloon of {mib} MiB does not fit into the guest's memory of {memory_mib} MiB: choose a \
         smaller size"
    )]
    TooLarge {
        /// Wanted size in MiB.
        mib: u32,
        /// Guest memory in MiB.
        memory_mib: u64,
    },
    /// There are no statistics whose interval could be changed.
    #[error(
        "the balloon has no statistics: an interval for them has to be given before the machine starts"
    )]
    NoStatistics,
    /// The guest cannot be asked for hints.
    #[error(
        "the balloon has no free page hinting: that has to be turned on before the machine starts"
    )]
    NoHinting,
    /// The timer of the statistics failed.
    #[error("cannot set the timer of the balloon's statistics: {0}")]
    Timer(#[source] io::Error),
}

/// What makes the device unusable until its driver resets it, most of it the driver's own doing.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(
        "the request at {head} is no list of page numbers: it has {readable} bytes to read and \
         {writable} to write"
    )]
    PageNumbers {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("of the pages that the request at {head} puts into the balloon, {source}")]
    Page { head: u16, source: BufferError },
    #[error(
        "the request at {head} is no report of free pages: it has {readable} bytes to read and \
         {writable} to write"
    )]
    Report {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error(
        "the request at {head} is neither a command nor a hint of free pages: it has {readable} bytes \
         to read and {writable} to write"
    )]
    Hint {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("the buffer of statistics at {head} has {writable} bytes to write")]
    Statistics { head: u16, writable: usize },
    #[error("there is a buffer of statistics at {head} before the one at {held} was returned")]
    SecondStatistics { head: u16, held: u16 },
    #[error("cannot set the timer of the statistics: {0}")]
    Timer(io::Error),
}

/// When the driver is asked for statistics.
struct Schedule {
    /// Ends when it is time to ask. It is never read: setting it anew is enough.
    timer: TimerFd,
    interval: NonZeroU32,
}

impl Schedule {
    /// Ends the timer at `time` from now.
    fn set_timer(&mut self, time: Duration) -> io::Result<()> {
        Ok(self.timer.reset(time, None)?)
    }

    /// Ends the timer when the interval from now on is over.
    fn restart(&mut self) -> io::Result<()> {
        self.set_timer(Duration::from_secs(self.interval.get().into()))
    }
}

/// What front, worker and control have in common.
struct Shared {
    config: ConfigSpace,
    /// What the driver said last.
    statistics: Mutex<GuestStatistics>,
    /// None without statistics.
    schedule: Option<Mutex<Schedule>>,
    hinting: Mutex<Hinting>,
    /// Whether a driver has accepted the device and not reset it since.
    has_driver: AtomicBool,
    metrics: Arc<BalloonMetrics>,
}

/// Locks what no change leaves half done, even one that panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The front of a balloon.
pub struct Balloon {
    options: BalloonOptions,
    memory_mib: u64,
    shared: Arc<Shared>,
}

impl Balloon {
    /// A balloon in `memory`.
    ///
    /// # Errors
    /// When it is to be larger than `memory`, or the host gives no timer for the statistics.
    pub fn new(options: &BalloonOptions, memory: &GuestMemory) -> Result<Balloon, BalloonError> {
        let memory_size: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        let memory_mib = memory_size >> 20;
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

    /// A handle to the device for the owner of the machine. `interrupt` is the device's.
    pub fn handle(&self, interrupt: Arc<VirtioInterrupt>) -> BalloonHandle {
        BalloonHandle::new(self, interrupt)
    }
}

/// A size in pages, if it is no more than guest memory.
fn target_pages(mib: u32, memory_mib: u64) -> Result<u32, BalloonError> {
    let too_large = BalloonError::TooLarge { mib, memory_mib };
    if u64::from(mib) > memory_mib {
        return Err(too_large);
    }
    mib.checked_mul(PAGES_PER_MIB).ok_or(too_large)
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

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, String> {
        *lock(&self.shared.statistics) = GuestStatistics::default();
        self.shared.reset_hinting();
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
}
