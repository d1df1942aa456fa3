//! The half of a device that serves its queues.

use std::io;

use bantam_state::{SaveError, Section};
use event_manager::MutEventSubscriber;
use serde::{Deserialize, Serialize};

/// Serves a device's queues, from the time that its driver is ready until a reset.
///
/// A worker lives on an event loop, which calls it when a descriptor is ready. A pause takes it off the loop,
/// and a resume puts it back: [`MutEventSubscriber::init`] is called each time that it is added to a loop.
/// Dropping it ends what is in progress, whatever state it is in.
pub trait VirtioWorker: MutEventSubscriber + Send {
    /// Ends what is in progress, puts back what it has taken but not done, and notifies the driver of what is
    /// done. The worker is already off the loop, and gets no events until it is back.
    ///
    /// On return all chains that it has taken are back with the driver or in their queues, so the positions
    /// of its queues are all there is to know about them.
    ///
    /// # Errors
    /// If the host cannot end what is in progress.
    fn pause(&mut self) -> io::Result<()>;

    /// Returns how far each queue of the device has come, in queue order. Called while it is paused.
    fn progress(&self) -> Vec<QueueProgress>;

    /// Returns the state beyond its queues and the device's configuration space that a worker in another
    /// process needs in order to go on. Called while it is paused.
    ///
    /// # Errors
    /// If that state cannot leave the process.
    fn save(&self) -> Result<Option<Section>, SaveError> {
        Ok(None)
    }
}

/// How far a device has come in a queue whose taken chains are all returned. Both positions wrap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueProgress {
    /// Number of chains taken from the available ring.
    pub next_available: u16,
    /// Number of chains returned by the used ring.
    pub next_used: u16,
}
