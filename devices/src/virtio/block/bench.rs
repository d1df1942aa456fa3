//! The path of a request from its descriptor chain to a submission entry, for `benches`.

use std::io;
use std::sync::Arc;

use bantam_memory::GuestMemory;
use bantam_storage::DiskFile;

use super::worker::Worker;
use super::{Block, BlockOptions, Engine};
use crate::virtio::{Activation, DriverLink, VirtQueue};

/// A worker that is driven one step at a time.
pub struct SteppedWorker(Worker);

impl SteppedWorker {
    /// Makes a worker that serves `queue` from `disk` with io_uring only.
    ///
    /// # Errors
    /// If the host has no io_uring.
    pub fn new(
        disk: DiskFile,
        memory: Arc<GuestMemory>,
        link: Arc<DriverLink>,
        queue: VirtQueue,
    ) -> io::Result<SteppedWorker> {
        let options = BlockOptions {
            engine: Engine::IoUring,
            ..BlockOptions::default()
        };
        let mut activation = Activation {
            memory,
            features: 0,
            queues: vec![queue],
            link,
            state: None,
        };
        let worker = Block::new(disk, "", &options)
            .map_err(io::Error::other)?
            .blueprint
            .worker(&mut activation)?;
        Ok(SteppedWorker(worker))
    }

    /// Takes the next request from its queue and fills a submission entry for it; `false` if that fails.
    pub fn begin(&mut self) -> bool {
        matches!(self.0.begin_next(0), Ok(true))
    }

    /// Completes all requests that were begun and returns them to the driver; `false` if that fails.
    pub fn finish(&mut self) -> bool {
        self.0.finish_all().is_ok()
    }
}
