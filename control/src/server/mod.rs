//! Serves clients of the control socket on a thread of its own.

mod connection;
mod output;
mod subscription;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use bantam_serving::{Clients, accept_clients, runtime};
use bantam_vmm::{BoundedLog, ListeningSocket};
use tokio::net::UnixListener;
use tokio::sync::{Notify, Semaphore};
use tokio::time;

use self::connection::Connection;
use crate::present_machine::PresentMachine;

/// Maximum number of clients at a time. Another one takes the place of the one that the server has waited for
/// longest; if all of them wait for the server, for an answer or for events, it is refused.
const MAX_CLIENTS: usize = 16;
/// Maximum number of commands, of all clients, that are under way or wait for that.
const MAX_COMMANDS: usize = 16;
/// How long clients may take at the end to receive their replies and the last events.
const LAST_REPLIES_TIME: Duration = Duration::from_millis(500);
/// What a client gets if there is no place for it.
const TOO_MANY_CLIENTS: &[u8] =
    b"{\"error\":{\"kind\":\"busy\",\"message\":\"there are too many clients; try again later\"}}\n";

/// Serves the control socket of a machine on a thread of its own, until it is dropped.
///
/// A second thread executes commands that may take long, one after the other; it ends a second after the last.
pub struct ControlServer {
    /// Removed from the file system with this.
    _socket: ListeningSocket,
    ending: Arc<Notify>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

/// What all connections have in common.
#[derive(Clone)]
struct Shared {
    machine: PresentMachine,
    commands: Arc<Semaphore>,
}

impl ControlServer {
    /// Serves the clients that connect to `socket`, and executes their commands on `machine`.
    ///
    /// # Errors
    /// If the host is out of threads or descriptors.
    pub fn start(socket: ListeningSocket, machine: PresentMachine) -> io::Result<ControlServer> {
        let runtime = runtime("bantam-control-work", 1)?;
        let listener = {
            let _context = runtime.enter();
            UnixListener::from_std(socket.try_clone_listener()?)?
        };
        let ending = Arc::new(Notify::new());
        let (running, ended) = mpsc::channel();
        let shared = Shared {
            machine,
            commands: Arc::new(Semaphore::new(MAX_COMMANDS)),
        };
        thread::Builder::new()
            .name("bantam-control".into())
            .spawn({
                let ending = ending.clone();
                move || {
                    runtime.block_on(serve(listener, shared, &ending));
                    // A command that is stuck is not waited for.
                    runtime.shutdown_background();
                    drop(running);
                }
            })?;
        Ok(ControlServer {
            _socket: socket,
            ending,
            ended,
        })
    }

    /// Ends the server. Clients get their replies and the last events before their connections are closed, as far
    /// as they take them within half a second, and the caller waits for that up to `limit`.
    pub fn end(self, limit: Duration) {
        self.ending.notify_one();
        // Nothing is ever sent: this ends when the thread does.
        let _ = self.ended.recv_timeout(limit);
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.ending.notify_one();
    }
}

/// Serves clients until `ending` is notified.
async fn serve(listener: UnixListener, shared: Shared, ending: &Notify) {
    let failures = BoundedLog::new("control socket");
    let clients = Clients::new(MAX_CLIENTS);
    let serve = |stream, place| {
        let shared = shared.clone();
        async move {
            if let Err(error) = Connection::serve(stream, place, shared).await {
                tracing::debug!("a client of the control socket: {error}");
            }
        }
    };
    tokio::select! {
        never = accept_clients(&listener, &clients, &failures, TOO_MANY_CLIENTS, serve) => match never {},
        () = ending.notified() => {}
    }
    let _ = time::timeout(LAST_REPLIES_TIME, clients.leave()).await;
}
