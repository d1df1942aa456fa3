//! The worker of a block device as its transport sees it: at work on a disk, or paused without one.

use std::io;
use std::time::Instant;

use bantam_state::{SaveError, Section};
use event_manager::{EventOps, Events, MutEventSubscriber};

use super::Blueprint;
use super::worker::Worker;
use crate::lifecycle::PAUSE_TIME;
use crate::virtio::{Activation, VirtQueue};
use crate::worker::{QueueProgress, VirtioWorker};

/// A worker that lets go of its disk when it is paused, so that the owner of the machine can put another
/// one into its place then, and takes up the disk that is there when it is resumed.
pub(super) struct PausableWorker {
    blueprint: Blueprint,
    /// What a worker begins with. It has the queues while there is none.
    activation: Activation,
    /// None if it is paused, or has yet to come to an event loop.
    worker: Option<Worker>,
}

impl PausableWorker {
    /// A worker that takes up the disk when it comes to an event loop. If the disk needs another ring,
    /// it is made there: the thread that activates the device runs a vCPU, and may not be allowed to.
    pub(super) fn new(blueprint: Blueprint, activation: Activation) -> PausableWorker {
        PausableWorker {
            blueprint,
            activation,
            worker: None,
        }
    }

    /// Pauses the worker like [`VirtioWorker::pause`].
    ///
    /// # Errors
    /// If requests are still in progress at `deadline`. The worker stays at work on them.
    pub(super) fn pause_by(&mut self, deadline: Instant) -> io::Result<()> {
        if let Some(worker) = &mut self.worker {
            worker.end_requests(deadline)?;
        }
        if let Some(worker) = self.worker.take() {
            self.activation.queues = worker.into_queues();
        }
        Ok(())
    }
}

impl VirtioWorker for PausableWorker {
    fn pause(&mut self) -> io::Result<()> {
        self.pause_by(Instant::now() + PAUSE_TIME)
    }

    fn progress(&self) -> Vec<QueueProgress> {
        match &self.worker {
            Some(worker) => worker.progress(),
            None => {
                let queues = self.activation.queues.iter();
                queues.map(VirtQueue::progress).collect()
            }
        }
    }

    fn save(&self) -> Result<Option<Section>, SaveError> {
        if self.worker.is_some() {
            return Err(SaveError::NotSupported {
                part: self.activation.link.name().to_owned(),
                reason: "requests to its disk are under way".to_owned(),
            });
        }
        Ok(None)
    }
}

impl MutEventSubscriber for PausableWorker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        if self.worker.is_none() {
            match self.blueprint.worker(&mut self.activation) {
                Ok(worker) => self.worker = Some(worker),
                Err(error) => {
                    self.blueprint.slot.metrics.activate_fails.add(1);
                    let reason = format!("cannot set up io_uring: {error}");
                    self.activation.link.need_reset_by_host(&reason);
                }
            }
        }
        if let Some(worker) = &mut self.worker {
            worker.init(operations);
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if let Some(worker) = &mut self.worker {
            worker.process(events, operations);
        }
    }
}
