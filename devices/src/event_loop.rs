//! The event loop on which devices do their work.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};

use crate::worker::VirtioWorker;

/// A part of a device that reacts to file descriptors becoming ready.
pub enum Subscriber {
    /// The worker of a virtio device, which can be taken back.
    Worker(Box<dyn VirtioWorker>),
    /// A part that stays for as long as the loop exists.
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

/// A handle with which other threads give an event loop its work and take it back.
///
/// The thread that owns the [`EventManager`] runs it; every clone of a handle speaks to that one
/// thread.
#[derive(Clone)]
pub struct EventLoop {
    endpoint: RemoteEndpoint<Subscriber>,
}

impl EventLoop {
    /// Makes a handle to the loop that `manager` runs.
    pub fn of(manager: &EventManager<Subscriber>) -> EventLoop {
        EventLoop {
            endpoint: manager.remote_endpoint(),
        }
    }

    /// Hands `worker` to the loop, which gives it events from its next turn on. This does not wait for the
    /// loop, whose thread another device may hold up.
    ///
    /// # Errors
    /// If the loop has ended.
    pub fn add_worker(
        &self,
        worker: Box<dyn VirtioWorker>,
    ) -> Result<WorkerId, event_manager::Error> {
        let id = Arc::new(OnceLock::new());
        let cell = id.clone();
        self.endpoint.fire(move |loop_operations| {
            // It is set nowhere else.
            let _ = cell.set(loop_operations.add_subscriber(Subscriber::Worker(worker)));
        })?;
        Ok(WorkerId(id))
    }

    /// Takes a worker back: on return it no longer runs, and no event reaches it. Waits for the loop until
    /// `deadline`, or for as long as it takes.
    ///
    /// The loop must run, and this must not be called on its own thread.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if something holds up the loop's thread until `deadline`: the worker then
    /// stays on the loop. Otherwise if the loop has ended, or has no such worker.
    pub fn take_worker(
        &self,
        id: &WorkerId,
        deadline: Option<Instant>,
    ) -> io::Result<Box<dyn VirtioWorker>> {
        let id = id.0.clone();
        // Whichever of the two threads sets it first decides whether the worker is taken.
        let decided = Arc::new(AtomicBool::new(false));
        let (answer, answered) = mpsc::channel();
        let decided_here = decided.clone();
        let asked = self.endpoint.fire(move |loop_operations| {
            if decided.swap(true, Ordering::SeqCst) {
                return;
            }
            // The loop takes what it is sent in order, so the worker has been added.
            let id = id.get().copied().ok_or(event_manager::Error::InvalidId);
            let taken = id.and_then(|id| loop_operations.remove_subscriber(id));
            // The other thread waits for it.
            let _ = answer.send(taken);
        });
        asked.map_err(ended)?;
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let taken = match left.map(|left| answered.recv_timeout(left)) {
            Some(Err(RecvTimeoutError::Timeout)) if !decided_here.swap(true, Ordering::SeqCst) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the thread of the device does not answer",
                ));
            }
            Some(Ok(taken)) => taken,
            None | Some(Err(_)) => answered
                .recv()
                .map_err(|_| ended(event_manager::Error::ChannelRecv))?,
        }
        .map_err(ended)?;
        match taken {
            Subscriber::Worker(worker) => Ok(worker),
            Subscriber::Resident(_) => Err(ended(event_manager::Error::InvalidId)),
        }
    }

    /// Makes the loop take a turn, so that its thread can check whether to go on.
    ///
    /// # Errors
    /// If the host refuses to signal an event.
    pub fn wake(&self) -> Result<(), event_manager::Error> {
        self.endpoint.kick()
    }
}

/// Identifies a worker on an event loop. It is set when the loop has taken the worker.
#[derive(Debug)]
pub struct WorkerId(Arc<OnceLock<SubscriberId>>);

fn ended(error: event_manager::Error) -> io::Error {
    io::Error::other(error.to_string())
}
