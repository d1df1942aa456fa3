//! The half of a device that serves its queues.

use std::io;

use bantam_state::{SaveError, Section};
use event_manager::MutEventSubscriber;
use serde::{Deserialize, Serialize};

/// What serves a device's queues, from the time that its driver is ready until a reset.
///
/// A worker lives on an event loop, which calls it when a descriptor is ready. A pause takes it off the
/// loop, and a resume puts it back: [`MutEventSubscriber::init`] is called each time that it comes to
/// a loop. Dropping it ends what is under way, in whatever state it is.
pub trait VirtioWorker: MutEventSubscriber + Send {
    /// Ends what is under way, puts back what it has taken and not done, and notifies the driver of
    /// what is done. It is off the loop already, and has no more events until it is back.
    ///
    /// When it returns, all chains that it has taken are back with the driver or in their queues, so
    /// the positions of its queues say all there is to know of them.
    ///
    /// # Errors
    /// If the host cannot end what is under way.
    fn pause(&mut self) -> io::Result<()>;

    /// How far each queue of the device has come, in their order. Called while it is paused.
    fn progress(&self) -> Vec<QueueProgress>;

    /// What it knows beside its queues and the device's configuration space, and what a worker in
    /// another process must know to go on. Called while it is paused.
    ///
    /// # Errors
    /// If that cannot leave the process.
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
