//! The events that a client has subscribed to, of one machine after another.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use bantam_vmm::{Event, Events};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::present_machine::{Follower, PresentMachine};
use crate::protocol::Refusal;

/// The events of the present machine and of those that replace it.
pub(super) struct Subscription {
    events: AsyncFd<Source>,
    follower: Arc<Follower>,
}

/// Events, by the descriptor that is readable while there are some.
struct Source(Events);

impl AsRawFd for Source {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Subscription {
    /// Subscribes to the events of `machine` from now on.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub(super) fn new(machine: &PresentMachine) -> Result<Subscription, Refusal> {
        let (events, follower) = machine.follow()?;
        let events = watch(events).map_err(|source| bantam_vmm::Error::Resource {
            what: "a subscription to events",
            source,
        })?;
        Ok(Subscription { events, follower })
    }

    /// Returns the next event, if there is one.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub(super) fn try_next(&mut self) -> io::Result<Option<Event>> {
        loop {
            if let Some(event) = self.events.get_ref().0.try_next() {
                return Ok(Some(event));
            }
            match self.follower.next() {
                Some(events) => self.events = watch(events)?,
                None => return Ok(None),
            }
        }
    }

    /// Waits until there may be events. The caller then takes all that there are.
    ///
    /// # Errors
    /// If the descriptor cannot be watched any more.
    pub(super) async fn ready(&self) -> io::Result<()> {
        tokio::select! {
            ready = self.events.readable() => ready?.clear_ready(),
            () = self.follower.replaced() => {}
        }
        Ok(())
    }
}

#[expect(unsafe_code)]
fn watch(events: Events) -> io::Result<AsyncFd<Source>> {
    // SAFETY: `Events` owns one descriptor from its creation until it is dropped, and has no method that closes or
    // replaces it. The result owns the events and nothing takes them out of it, so the descriptor stays open and
    // the same for as long as it is watched.
    let watched = unsafe { AsyncFd::register_with_interest(Source(events), Interest::READABLE) };
    Ok(watched?)
}
