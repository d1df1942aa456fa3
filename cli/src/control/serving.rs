//! The control socket of a machine that this program runs.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use bantam_control::{ControlServer, PresentMachine};
use bantam_vmm::{Controller, ListeningSocket};

use crate::main_loop::EndedBy;
use crate::stopping;

/// How long the end may wait for clients to receive their replies.
const END_TIME: Duration = Duration::from_secs(1);

/// Listens at `path` for clients that control the machine.
pub fn listen(path: &Path) -> anyhow::Result<ListeningSocket> {
    ListeningSocket::bind_private(path)
        .with_context(|| format!("cannot listen on '{}' for --control", path.display()))
}

/// The control socket of the program, with the machine that it controls.
pub struct Control {
    server: ControlServer,
    machine: PresentMachine,
}

impl Control {
    /// Serves the clients of `socket`, who control the machine of `controller`.
    pub fn start(socket: ListeningSocket, controller: Controller) -> anyhow::Result<Control> {
        let machine = PresentMachine::new(controller).context("cannot create an event")?;
        let server = ControlServer::start(socket, machine.clone())
            .context("cannot start the thread of the control socket")?;
        Ok(Control { server, machine })
    }

    /// Lets clients control the machine of `controller` from now on. Returns `false` if one has asked for the end
    /// of the machine before: then this one must not be started.
    pub fn replace(&self, controller: &Controller) -> bool {
        self.machine.replace(controller.clone());
        !self.is_end_asked()
    }

    /// Returns whether a client has asked for the end of the machine.
    pub fn is_end_asked(&self) -> bool {
        self.machine.is_end_asked()
    }

    /// Returns a descriptor that is readable once a client has asked for the end of the machine.
    pub fn end_event(&self) -> BorrowedFd<'_> {
        self.machine.end_event()
    }

    /// Returns who has ended a machine that seems to have been ended by `by`: its user if a client has asked for
    /// that. Then the process ends soon.
    pub fn ended_by(&self, by: EndedBy) -> EndedBy {
        if !self.is_end_asked() {
            return by;
        }
        tracing::info!("a client of the control socket has asked for the end of the machine");
        stopping::ask();
        EndedBy::User
    }

    /// Ends the server, and removes the socket.
    pub fn end(self) {
        self.server.end(stopping::time_left(END_TIME));
    }
}
