//! The machine that commands go to, which may be replaced while clients are connected.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, Weak};

use bantam_serving::lock;
use bantam_vmm::{Answer, Command, Controller, DeviceHandle, Error, Events, ShutDown};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::Notify;

/// The machine that a control socket is for. A program that starts its machine again replaces the controller,
/// and clients go on with the next machine. Clones are the same.
#[derive(Clone)]
pub struct PresentMachine(Arc<Inner>);

struct Inner {
    present: Mutex<Present>,
    /// Readable once a client has asked for the machine's end.
    end: EventFd,
}

struct Present {
    controller: Controller,
    followers: Vec<Weak<Follower>>,
    is_end_asked: bool,
}

/// Passes the events of each next machine to a subscriber.
#[derive(Default)]
pub(crate) struct Follower {
    /// Those of machines that the subscriber has not come to yet.
    next: Mutex<Vec<Events>>,
    replaced: Notify,
}

impl PresentMachine {
    /// Makes `controller`'s machine the present one.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn new(controller: Controller) -> io::Result<PresentMachine> {
        Ok(PresentMachine(Arc::new(Inner {
            present: Mutex::new(Present {
                controller,
                followers: Vec::new(),
                is_end_asked: false,
            }),
            end: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })))
    }

    /// Makes the machine of `controller`, which has not been started yet, the present one after another that has
    /// ended. Subscribers get its events after all those of the machine before.
    ///
    /// If [`PresentMachine::is_end_asked`] then, the machine must not be started: the request has come too early
    /// to end it.
    pub fn replace(&self, controller: Controller) {
        let mut present = lock(&self.0.present);
        let followers = present.followers.iter().filter_map(Weak::upgrade);
        for follower in followers {
            match controller.subscribe() {
                Ok(events) => lock(&follower.next).push(events),
                Err(error) => {
                    tracing::warn!("a client gets no events of the next machine: {error}");
                }
            }
            follower.replaced.notify_one();
        }
        present.controller = controller;
    }

    /// Returns whether a client has asked for the end of the machine, by [`Command::Stop`] or
    /// [`Command::ShutDown`]. A program does not start it again then.
    pub fn is_end_asked(&self) -> bool {
        lock(&self.0.present).is_end_asked
    }

    /// Returns a descriptor that is readable once a client has asked for the end of the machine.
    pub fn end_event(&self) -> BorrowedFd<'_> {
        self.0.end.as_fd()
    }

    /// Executes `command` on the present machine.
    ///
    /// # Errors
    /// Those of [`Controller::execute`].
    pub(crate) fn execute(&self, command: Command) -> Result<Answer, Error> {
        let controller = {
            let mut present = lock(&self.0.present);
            match command {
                Command::Stop => self.ask_for_end(&mut present),
                // It waits for nothing. A guest that cannot be asked is started again as before.
                Command::ShutDown { timeout } => {
                    let how = present.controller.shut_down(timeout);
                    if how != ShutDown::Unheard {
                        self.ask_for_end(&mut present);
                    }
                    return Ok(Answer::ShutDown(how));
                }
                _ => {}
            }
            present.controller.clone()
        };
        controller.execute(command)
    }

    fn ask_for_end(&self, present: &mut Present) {
        present.is_end_asked = true;
        // The counter has room: it fails only after 2^64 requests.
        let _ = self.0.end.write(1);
    }

    /// Returns the events of the present machine from now on, and what brings those of the next ones.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub(crate) fn follow(&self) -> Result<(Events, Arc<Follower>), Error> {
        let mut present = lock(&self.0.present);
        let events = present.controller.subscribe()?;
        let follower = Arc::<Follower>::default();
        present.followers.retain(|it| it.strong_count() > 0);
        present.followers.push(Arc::downgrade(&follower));
        Ok((events, follower))
    }
}

impl Follower {
    /// Returns the events of the machine after the last one, if there is one.
    pub(crate) fn next(&self) -> Option<Events> {
        let mut next = lock(&self.next);
        (!next.is_empty()).then(|| next.remove(0))
    }

    /// Waits until there is a next machine.
    pub(crate) async fn replaced(&self) {
        self.replaced.notified().await;
    }
}

/// Whether `command` waits for nothing, so that it is executed at once, whatever else is under way. An end of the
/// machine, above all, must not wait for a command that takes long.
pub(crate) fn is_quick(command: &Command) -> bool {
    match command {
        Command::Query
        | Command::Configuration
        | Command::Metadata
        | Command::Metrics
        | Command::CancelMigration
        | Command::MigrationProgress
        | Command::ShutDown { .. }
        | Command::Stop => true,
        Command::Device { command, .. } => DeviceHandle::is_question(command),
        _ => false,
    }
}
