//! The host's end of a serial port.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;

use super::Serial;
use super::socket::SocketWorker;
use super::worker::SerialWorker;
use crate::ListeningSocket;

/// Where the bytes of a serial port come from and go to.
pub enum SerialEndpoint {
    /// Descriptors of the host. They must be non-blocking, or regular files: the event loop reads and writes
    /// them.
    Descriptors {
        /// Source of input.
        input: Option<OwnedFd>,
        /// Sink of output.
        output: Option<OwnedFd>,
    },
    /// A socket with up to 16 clients. Each first gets the last 256 KiB of output, and then what the guest
    /// sends; the inputs of all are merged into one stream.
    Listener(ListeningSocket),
}

impl SerialEndpoint {
    /// Makes the worker that moves bytes between `port` and this endpoint on an event loop. The port keeps
    /// its output for it from now on.
    ///
    /// # Errors
    /// If the host cannot create a timer.
    pub fn serve(self, port: Arc<Mutex<Serial>>) -> io::Result<Box<dyn MutEventSubscriber + Send>> {
        Ok(match self {
            SerialEndpoint::Descriptors { input, output } => {
                Box::new(SerialWorker::new(port, input, output))
            }
            SerialEndpoint::Listener(listener) => Box::new(SocketWorker::new(port, listener)?),
        })
    }
}
