//! The way of a request from its descriptor chain to a submission entry, for `benches`.

use std::io;
use std::sync::Arc;

use bantam_memory::GuestMemory;

use super::worker::Worker;
use super::{Block, BlockOptions, Engine};
use crate::disk::DiskFile;
use crate::virtio::{Activation, DriverLink, VirtQueue};

/// A worker that goes one step at a time.
pub struct SteppedWorker(Worker);

impl SteppedWorker {
    /// A worker that serves `queue` from `disk` by io_uring alone.
    ///
    /// # Errors
    /// When the host has no io_uring.
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

    /// Takes the next request from its queue and fills a submission entry for it; `false` where that
    /// cannot be.
    pub fn begin(&mut self) -> bool {
        matches!(self.0.begin_next(0), Ok(true))
    }

    /// Has all that was begun done and returned to the driver; `false` where that cannot be.
    pub fn finish(&mut self) -> bool {
        self.0.finish_all().is_ok()
    }
}
