//! The way of a request from its descriptor chain to a submission entry, for `benches`.

use std::io;
use std::sync::Arc;

use super::request::RequestHandler;
use super::ring::Ring;
use super::worker::Worker;
use super::{BlockOptions, Engine, ID_SIZE};
use crate::GuestMemory;
use crate::disk::DiskFile;
use crate::virtio::{VirtQueue, VirtioInterrupt};

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
        interrupt: Arc<VirtioInterrupt>,
        queue: VirtQueue,
    ) -> io::Result<SteppedWorker> {
        let disk = Arc::new(disk);
        let ring = Ring::new(&disk)?;
        let options = BlockOptions {
            engine: Engine::IoUring,
            ..BlockOptions::default()
        };
        let id = [0; ID_SIZE];
        let handler = RequestHandler::new(disk.clone(), id, 0, memory.clone(), interrupt.clone());
        let queues = vec![queue];
        let worker = Worker::new(
            disk,
            handler,
            memory,
            interrupt,
            queues,
            &options,
            Some(ring),
        )?;
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
