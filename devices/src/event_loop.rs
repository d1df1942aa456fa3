//! The event loop on which devices do their work.

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};

/// A part of a device that reacts to file descriptors becoming ready.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

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

    /// Hands `subscriber` to the loop; on return it receives events.
    ///
    /// Must not be called on the loop's own thread.
    ///
    /// # Errors
    /// When the loop has ended.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, event_manager::Error> {
        self.endpoint
            .call_blocking(move |loop_operations| Ok(loop_operations.add_subscriber(subscriber)))
    }

    /// Takes a subscriber back: on return it is no longer at work, and no event reaches it.
    ///
    /// Must not be called on the loop's own thread.
    ///
    /// # Errors
    /// When the loop has ended, or has no such subscriber.
    pub fn remove(&self, id: SubscriberId) -> Result<Subscriber, event_manager::Error> {
        self.endpoint
            .call_blocking(move |loop_operations| loop_operations.remove_subscriber(id))
    }

    /// Makes the loop take a turn, so that its thread can look whether to go on.
    ///
    /// # Errors
    /// When the host refuses to signal an event.
    pub fn wake(&self) -> Result<(), event_manager::Error> {
        self.endpoint.kick()
    }
}
