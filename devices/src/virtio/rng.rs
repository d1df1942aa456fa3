//! The entropy device (section 5.4): fills the driver's buffers with random bytes of the host.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use bantam_metrics::Counter;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use serde::Serialize;

use super::{
    Activation, COMMON_FEATURES, Chain, ConfigSpace, DriverLink, QueueError, Throttle, VirtQueue,
    VirtioDevice, device_id,
};
use crate::rate_limiter::Limits;
use crate::worker::{QueueProgress, VirtioWorker};

/// The generator of the host's kernel.
pub const SOURCE: &str = "/dev/urandom";

const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one buffer. A larger buffer is filled in part, as the standard allows, so
/// that a guest cannot hold the event loop for as long as it likes.
const MAX_BYTES_PER_BUFFER: usize = 64 << 10;

/// What an event is told from others by.
const DOORBELL_EVENT: u32 = 0;
const TIMER_EVENT: u32 = 1;

/// The work of an entropy device since the machine was built.
#[derive(Debug, Default, Serialize)]
pub struct EntropyMetrics {
    /// Drivers that the device could not begin to work for.
    pub activate_fails: Counter,
    /// Events whose handling ended with the device asking for a reset.
    pub entropy_event_fails: Counter,
    /// Times that the worker was woken for the queue.
    pub entropy_event_count: Counter,
    /// Random bytes that the driver was given.
    pub entropy_bytes: Counter,
    /// Times that the host gave none.
    pub host_rng_fails: Counter,
    /// Times that buffers had to wait for a limit.
    pub entropy_rate_limiter_throttled: Counter,
    /// Times that the worker was woken as a limit allowed more, or was changed.
    pub rate_limiter_event_count: Counter,
}

/// The front of the entropy device.
pub struct Rng {
    source: Arc<File>,
    config: ConfigSpace,
    throttle: Arc<Throttle>,
    metrics: Arc<EntropyMetrics>,
}

impl Rng {
    /// A device that draws from [`SOURCE`]. Operations of its limits are buffers of the driver.
    ///
    /// # Errors
    /// If [`SOURCE`] cannot be opened, or the host has no timer for the limits.
    pub fn new(limits: &Limits) -> io::Result<Rng> {
        Rng::with_source(File::open(SOURCE)?, limits)
    }

    /// A device that draws from `source`, otherwise like [`Rng::new`].
    ///
    /// # Errors
    /// If the host has no timer for the limits.
    pub fn with_source(source: File, limits: &Limits) -> io::Result<Rng> {
        Ok(Rng {
            source: Arc::new(source),
            config: ConfigSpace::new(Vec::new()),
            throttle: Arc::new(Throttle::new(limits)?),
            metrics: Arc::default(),
        })
    }

    /// What the device counts.
    pub fn metrics(&self) -> Arc<EntropyMetrics> {
        self.metrics.clone()
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        device_id::ENTROPY
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        let Ok([queue]) = <[VirtQueue; 1]>::try_from(activation.queues) else {
            self.metrics.activate_fails.add(1);
            return Err("an entropy device has one queue".to_string());
        };
        Ok(Box::new(Worker {
            source: self.source.clone(),
            chain: Chain::new(&activation.memory),
            queue,
            link: activation.link,
            throttle: self.throttle.clone(),
            metrics: self.metrics.clone(),
        }))
    }
}

/// Why the device needs a reset.
#[derive(Debug, thiserror::Error)]
enum ServiceError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("cannot set the timer of its limits: {0}")]
    Timer(#[from] io::Error),
}

struct Worker {
    source: Arc<File>,
    chain: Chain,
    queue: VirtQueue,
    link: Arc<DriverLink>,
    throttle: Arc<Throttle>,
    metrics: Arc<EntropyMetrics>,
}

impl Worker {
    fn handle(&mut self, event: u32) -> Result<(), ServiceError> {
        if event == TIMER_EVENT {
            self.metrics.rate_limiter_event_count.add(1);
            self.throttle.clear()?;
        } else {
            self.metrics.entropy_event_count.add(1);
            self.queue.clear_doorbell();
        }
        let Worker {
            source,
            chain,
            queue,
            link,
            throttle,
            metrics,
        } = self;
        let mut throttled = false;
        queue.serve_while(
            chain,
            link,
            || {
                let allowed = throttle.allows_more()?;
                throttled = !allowed;
                Ok(allowed)
            },
            |chain| {
                let filled = fill(source, chain, link, metrics);
                throttle.count(1, filled.into());
                Ok::<_, ServiceError>(filled)
            },
        )?;
        if throttled && queue.has_available()? {
            metrics.entropy_rate_limiter_throttled.add(1);
        }
        Ok(())
    }
}

/// Fills the chain's buffers; gives how many bytes.
fn fill(source: &File, chain: &mut Chain, link: &DriverLink, metrics: &EntropyMetrics) -> u32 {
    chain.writable.truncate(MAX_BYTES_PER_BUFFER);
    let mut filled = 0;
    while !chain.writable.is_empty() {
        match chain.writable.read_from(source.as_fd(), None) {
            Ok(0) => break,
            Ok(count) => filled += count as u32,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                metrics.host_rng_fails.add(1);
                link.warn_of_host(format_args!("cannot draw entropy: {error}"));
                break;
            }
        }
    }
    metrics.entropy_bytes.add(filled.into());
    filled
}

impl VirtioWorker for Worker {
    /// Each chain is returned as soon as it is taken.
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn progress(&self) -> Vec<QueueProgress> {
        vec![self.queue.progress()]
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        for events in [
            Events::with_data(&self.queue, DOORBELL_EVENT, EventSet::IN),
            Events::with_data(&*self.throttle, TIMER_EVENT, EventSet::IN),
        ] {
            if let Err(error) = operations.add(events) {
                self.link.need_reset_by_host(&error);
            }
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if self.link.needs_reset() {
            // Nothing consumes what made it ready, so that it would be reported without end.
            if let Err(error) = operations.remove(events) {
                self.link
                    .warn_of_host(format_args!("cannot stop watching a file: {error}"));
            }
            return;
        }
        if let Err(error) = self.handle(events.data()) {
            self.metrics.entropy_event_fails.add(1);
            self.link.need_reset(&error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bantam_memory::GuestMemory;
    use event_manager::{EventManager, SubscriberOps};
    use vm_memory::GuestAddress;

    use super::*;
    use crate::event_loop::Subscriber;
    use crate::rate_limiter::RateLimit;
    use crate::suspend_test::suspend_tests;
    use crate::virtio::suspend_test::{Backend, Driver, FREE_MEMORY, VirtioGuest, writable};
    use crate::virtio::test_driver::{Buffer, InterruptCounter, TestDriver};

    const DATA: u64 = 0x1_0000;

    #[test]
    fn entropy_is_given_no_faster_than_a_limit_allows() {
        let operations = RateLimit::per_second(100, Some(4));
        let bytes = RateLimit::per_second(6400, Some(256));
        for limits in [
            Limits {
                operations: Some(operations),
                bytes: None,
            },
            Limits {
                operations: None,
                bytes: Some(bytes),
            },
        ] {
            let mut rng = Rng::new(&limits).unwrap();
            let regions = [(GuestAddress(0), 0x2_0000)];
            let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
            let mut driver = TestDriver::new(&memory, 0x1000, 64);
            let worker = rng.activate(Activation {
                memory: memory.clone(),
                features: 0,
                queues: vec![driver.queue(0, false)],
                link: InterruptCounter::default().link(),
                state: None,
            });
            let mut manager: EventManager<Subscriber> = EventManager::new().unwrap();
            manager.add_subscriber(Subscriber::Worker(worker.unwrap()));
            for _ in 0..20 {
                driver.offer(&[Buffer {
                    address: DATA,
                    len: 64,
                    writable: true,
                }]);
            }
            driver.ring_doorbell();
            let (start, mut done, mut turns) = (Instant::now(), 0, 0);
            while done < 20 {
                assert!(start.elapsed() < Duration::from_secs(20), "{done} are done");
                manager.run_with_timeout(1000).unwrap();
                done += driver.take_used().len();
                turns += 1;
            }
            // Four, and one that goes beyond, come at once.
            assert!(start.elapsed() >= Duration::from_millis(140));
            assert!(turns <= 40, "{turns} turns");
            let metrics = serde_json::to_value(&*rng.metrics()).unwrap();
            assert_eq!(metrics["entropy_bytes"], 20 * 64);
            assert_eq!(metrics["entropy_event_count"], 1);
            let waits = &metrics["entropy_rate_limiter_throttled"];
            assert!((1..=15).contains(&waits.as_u64().unwrap()), "{waits}");
            assert_eq!(waits, &metrics["rate_limiter_event_count"]);
        }
    }

    struct Entropy;

    impl Backend for Entropy {
        const QUEUES: u64 = 1;
        const FEATURES: u64 = COMMON_FEATURES;

        fn new() -> Entropy {
            Entropy
        }

        fn device(&mut self, _: &Arc<GuestMemory>, _: Arc<DriverLink>) -> Box<dyn VirtioDevice> {
            Box::new(Rng::new(&Limits::default()).unwrap())
        }

        fn work(&mut self, driver: &mut Driver) {
            driver.store(FREE_MEMORY, &[0; 64]);
            driver.offer(0, &[writable(FREE_MEMORY, 64)]);
            assert_eq!(driver.wait(0, 1), [64]);
            assert_ne!(driver.load(FREE_MEMORY, 64), [0; 64]);
        }

        fn begin(&mut self, driver: &mut Driver) {
            for _ in 0..20 {
                driver.offer(0, &[writable(FREE_MEMORY, 64)]);
            }
        }

        fn end(&mut self, driver: &mut Driver) {
            assert_eq!(driver.wait(0, 20), [64; 20]);
        }
    }

    suspend_tests!(VirtioGuest<Entropy>);
}
