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
    /// A socket with up to 16 clients. Each gets the last 256 KiB of output first, and then what the guest
    /// sends; the input of all is one stream.
    Listener(ListeningSocket),
}

impl SerialEndpoint {
    /// What moves bytes between `port` and this on an event loop. Output is kept for it from now on.
    ///
    /// # Errors
    /// When the host gives no timer.
    pub fn serve(self, port: Arc<Mutex<Serial>>) -> io::Result<Box<dyn MutEventSubscriber + Send>> {
        Ok(match self {
            SerialEndpoint::Descriptors { input, output } => {
                Box::new(SerialWorker::new(port, input, output))
            }
            SerialEndpoint::Listener(listener) => Box::new(SocketWorker::new(port, listener)?),
        })
    }
}
