//! The queue of buffers for events (section 5.10.6.7).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bantam_memory::GuestMemory;

use super::DriverError;
use crate::virtio::{Chain, DriverLink, QueueError, VirtQueue};
use crate::worker::QueueProgress;

/// Tells the driver that connections have ended without a packet.
const TRANSPORT_RESET: u32 = 0;
/// Size of an event in bytes.
const EVENT_SIZE: usize = size_of::<u32>();

/// Whether the driver knows that all connections have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reset {
    /// It has been told, or there is nothing to tell.
    Done,
    /// It has yet to offer a buffer for the event.
    Due,
    /// It has the event, and had offered `buffers` more buffers by then.
    Told { buffers: u16 },
}

/// Tells the driver, after the state of a device was taken to another process, that all connections
/// have ended.
pub(super) struct EventQueue {
    queue: VirtQueue,
    chain: Chain,
    reset: Reset,
}

impl AsRawFd for EventQueue {
    /// Returns the doorbell.
    fn as_raw_fd(&self) -> RawFd {
        self.queue.as_raw_fd()
    }
}

impl EventQueue {
    pub(super) fn new(queue: VirtQueue, memory: &Arc<GuestMemory>) -> EventQueue {
        EventQueue {
            queue,
            chain: Chain::new(memory),
            reset: Reset::Done,
        }
    }

    /// Tells the driver to end all its connections, as soon as it offers a buffer. `false` if it does not use
    /// the queue.
    pub(super) fn begin_reset(&mut self) -> bool {
        if self.queue.is_set_up() {
            self.reset = Reset::Due;
        }
        self.queue.is_set_up()
    }

    pub(super) fn progress(&self) -> QueueProgress {
        self.queue.progress()
    }

    /// Serves the queue. Returns `true` if the driver has ended its connections by now: a driver offers the
    /// buffer of an event again when it has handled the event.
    pub(super) fn serve(&mut self, link: &DriverLink) -> Result<bool, DriverError> {
        if self.reset == Reset::Due {
            self.tell_reset(link)?;
        }
        let Reset::Told { buffers } = self.reset else {
            return Ok(false);
        };
        let has_more = self.queue.enable_doorbell_behind(buffers)?;
        if has_more {
            self.reset = Reset::Done;
        }
        Ok(has_more)
    }

    fn tell_reset(&mut self, link: &DriverLink) -> Result<(), DriverError> {
        if !self.take_buffer()? {
            return Ok(());
        }
        // Counted before the driver can see the event.
        let buffers = self.queue.available_count()?;
        let Chain {
            head,
            readable,
            writable,
            ..
        } = &mut self.chain;
        if !readable.is_empty() || writable.len() < EVENT_SIZE {
            return Err(DriverError::EventBuffer {
                head: *head,
                readable: readable.len(),
                writable: writable.len(),
            });
        }
        writable.write(&TRANSPORT_RESET.to_le_bytes());
        self.queue.add_used(*head, EVENT_SIZE as u32);
        self.reset = Reset::Told { buffers };
        self.queue.notify_driver(link);
        Ok(())
    }

    /// Takes the next buffer. If there is none, the doorbell is rung for it.
    fn take_buffer(&mut self) -> Result<bool, QueueError> {
        while !self.queue.pop(&mut self.chain)? {
            if !self.queue.enable_doorbell()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
