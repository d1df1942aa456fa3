//! The event loop on which devices do their work.

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};

use crate::worker::VirtioWorker;

/// A part of a device that reacts to file descriptors becoming ready.
pub enum Subscriber {
    /// The worker of a virtio device, which can be taken back.
    Worker(Box<dyn VirtioWorker>),
    /// A part that stays as long as the loop.
    Resident(Box<dyn MutEventSubscriber + Send>),
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        match self {
            Subscriber::Worker(worker) => worker.init(operations),
            Subscriber::Resident(part) => part.init(operations),
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        match self {
            Subscriber::Worker(worker) => worker.process(events, operations),
            Subscriber::Resident(part) => part.process(events, operations),
        }
    }
}

/// A handle by which other threads give an event loop its work and take it back.
///
/// The thread that owns the [`EventManager`] runs it; every clone of a handle speaks to that one
/// thread.
#[derive(Clone)]
pub struct EventLoop {
    endpoint: RemoteEndpoint<Subscriber>,
}

impl EventLoop {
    /// A handle to the loop that `manager` runs.
    pub fn of(manager: &EventManager<Subscriber>) -> EventLoop {
        EventLoop {
            endpoint: manager.remote_endpoint(),
        }
    }

    /// Hands `worker` to the loop; on return it receives events.
    ///
    /// The loop must run, and this must not be called on its own thread.
    ///
    /// # Errors
    /// If the loop has ended.
    pub fn add_worker(
        &self,
        worker: Box<dyn VirtioWorker>,
    ) -> Result<WorkerId, event_manager::Error> {
        self.add_subscriber(Subscriber::Worker(worker))
            .map(WorkerId)
    }

    fn add_subscriber(&self, subscriber: Subscriber) -> Result<SubscriberId, event_manager::Error> {
        self.endpoint
            .call_blocking(move |loop_operations| Ok(loop_operations.add_subscriber(subscriber)))
    }

    /// Takes a worker back: on return it is no longer at work, and no event reaches it.
    ///
    /// The loop must run, and this must not be called on its own thread.
    ///
    /// # Errors
    /// If the loop has ended, or has no such worker.
    pub fn take_worker(&self, id: WorkerId) -> Result<Box<dyn VirtioWorker>, event_manager::Error> {
        let WorkerId(id) = id;
        let subscriber = self
            .endpoint
            .call_blocking(move |loop_operations| loop_operations.remove_subscriber(id))?;
        match subscriber {
            Subscriber::Worker(worker) => Ok(worker),
            Subscriber::Resident(_) => Err(event_manager::Error::InvalidId),
        }
    }

    /// Makes the loop take a turn, so that its thread can look whether to go on.
    ///
    /// # Errors
    /// If the host refuses to signal an event.
    pub fn wake(&self) -> Result<(), event_manager::Error> {
        self.endpoint.kick()
    }
}

/// Names a worker on an event loop.
#[derive(Debug)]
pub struct WorkerId(SubscriberId);
