//! The entropy device (section 5.4): fills the driver's buffers with random bytes of the host.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{
    Activation, COMMON_FEATURES, Chain, ConfigSpace, QueueError, VirtQueue, VirtioDevice,
    VirtioInterrupt, device_id,
};
use crate::event_loop::Subscriber;

const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one buffer. A larger buffer is filled in part, as the standard allows, so
/// that a guest cannot hold the event loop for as long as it likes.
const MAX_BYTES_PER_BUFFER: usize = 64 << 10;

/// The front of the entropy device.
pub struct Rng {
    source: Arc<File>,
    config: ConfigSpace,
}

impl Rng {
    /// A device that draws from the host kernel's generator.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be opened.
    pub fn new() -> io::Result<Rng> {
        Ok(Rng {
            source: Arc::new(File::open("/dev/urandom")?),
            config: ConfigSpace::new(Vec::new()),
        })
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

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, String> {
        let Ok([queue]) = <[VirtQueue; 1]>::try_from(activation.queues) else {
            return Err("an entropy device has one queue".to_string());
        };
        Ok(Box::new(Worker {
            source: self.source.clone(),
            chain: Chain::new(&activation.memory),
            queue,
            interrupt: activation.interrupt,
        }))
    }
}

struct Worker {
    source: Arc<File>,
    chain: Chain,
    queue: VirtQueue,
    interrupt: Arc<VirtioInterrupt>,
}

/// Fills the chain's buffers; gives how many bytes.
fn fill(source: &File, chain: &mut Chain, interrupt: &VirtioInterrupt) -> u32 {
    chain.writable.truncate(MAX_BYTES_PER_BUFFER);
    let mut filled = 0;
    while !chain.writable.is_empty() {
        match chain.writable.read_from(source.as_fd(), None) {
            Ok(0) => break,
            Ok(count) => filled += count as u32,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                interrupt.warn(format_args!("cannot draw entropy: {error}"));
                break;
            }
        }
    }
    filled
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        if let Err(error) = operations.add(Events::new(&self.queue, EventSet::IN)) {
            self.interrupt.need_reset(&error);
        }
    }

    fn process(&mut self, _events: Events, _operations: &mut EventOps<'_>) {
        self.queue.clear_doorbell();
        if self.interrupt.needs_reset() {
            return;
        }
        let (source, interrupt) = (&self.source, &*self.interrupt);
        let served: Result<(), QueueError> =
            self.queue.serve(&mut self.chain, interrupt, |chain| {
                Ok(fill(source, chain, interrupt))
            });
        if let Err(error) = served {
            self.interrupt.need_reset(&error);
        }
    }
}
