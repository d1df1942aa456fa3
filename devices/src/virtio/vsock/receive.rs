//! The queue of buffers for packets to the guest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bantam_memory::{GuestBuffers, GuestMemory};

use super::DriverError;
use super::packet::{HEADER_SIZE, Header};
use crate::virtio::{Chain, DriverLink, QueueError, VirtQueue};
use crate::worker::QueueProgress;

/// Most buffers that are filled by one system call.
const MAX_BUFFERS: usize = 32;

/// Puts packets into the driver's buffers. The data of several packets is read at once, directly into the
/// buffers.
pub(super) struct ReceiveQueue {
    queue: VirtQueue,
    chain: Chain,
    buffers: Vec<Buffer>,
    /// The data parts of the buffers that are being filled.
    data: GuestBuffers,
    used: Vec<(u16, u32)>,
    /// Whether there are packets that the driver has not been told of.
    unreported: bool,
}

/// A buffer of the driver.
struct Buffer {
    head: u16,
    header: GuestBuffers,
    /// Most bytes of data to put into it.
    room: usize,
}

impl AsRawFd for ReceiveQueue {
    /// Returns the doorbell.
    fn as_raw_fd(&self) -> RawFd {
        self.queue.as_raw_fd()
    }
}

impl ReceiveQueue {
    pub(super) fn new(queue: VirtQueue, memory: &Arc<GuestMemory>) -> ReceiveQueue {
        ReceiveQueue {
            queue,
            chain: Chain::new(memory),
            buffers: (0..MAX_BUFFERS)
                .map(|_| Buffer {
                    head: 0,
                    header: GuestBuffers::new(memory.clone()),
                    room: 0,
                })
                .collect(),
            data: GuestBuffers::new(memory.clone()),
            used: Vec::new(),
            unreported: false,
        }
    }

    pub(super) fn progress(&self) -> QueueProgress {
        self.queue.progress()
    }

    /// Returns the queue's size in descriptors.
    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Leaves the queue to a later turn.
    pub(super) fn ring_doorbell(&self) {
        self.queue.ring_doorbell();
    }

    /// Whether there is a buffer. If not, the driver is asked to ring the doorbell for the next one.
    pub(super) fn has_buffer(&mut self) -> Result<bool, QueueError> {
        if !self.queue.has_available()? && !self.queue.enable_doorbell()? {
            return Ok(false);
        }
        self.queue.disable_doorbell();
        Ok(true)
    }

    /// Puts a packet without data into the next buffer. `false` if there is none.
    pub(super) fn put(&mut self, header: &Header) -> Result<bool, DriverError> {
        let taken = self.take_buffers(1)?;
        let Some(buffer) = self.buffers[..taken].first_mut() else {
            return Ok(false);
        };
        buffer.header.write(&header.to_bytes());
        self.queue.add_used(buffer.head, HEADER_SIZE as u32);
        self.unreported = true;
        Ok(true)
    }

    /// Has `read` fill the next buffers with at most `limit` bytes, which is not zero, and sends them as
    /// packets with this header. Returns the result of `read`, which is not called if there are no buffers.
    pub(super) fn put_data(
        &mut self,
        mut header: Header,
        limit: usize,
        read: impl FnOnce(&mut GuestBuffers) -> io::Result<usize>,
    ) -> Result<Option<io::Result<Packets>>, DriverError> {
        let taken = self.take_buffers(limit)?;
        if taken == 0 {
            return Ok(None);
        }
        let result = read(&mut self.data);
        let bytes = *result.as_ref().unwrap_or(&0);
        let mut left = bytes;
        self.used.clear();
        for buffer in &mut self.buffers[..taken] {
            if left == 0 {
                break;
            }
            let len = buffer.room.min(left);
            left -= len;
            header.len = len as u32;
            buffer.header.write(&header.to_bytes());
            self.used.push((buffer.head, (HEADER_SIZE + len) as u32));
        }
        let packets = self.used.len();
        self.queue.add_used_together(&self.used);
        self.unreported |= packets > 0;
        for _ in packets..taken {
            self.queue.undo_pop();
        }
        Ok(Some(result.map(|_| Packets { bytes, packets })))
    }

    /// Takes buffers for up to `limit` bytes, and returns how many buffers.
    fn take_buffers(&mut self, limit: usize) -> Result<usize, DriverError> {
        self.data.clear();
        let mut taken = 0;
        while self.data.len() < limit && taken < MAX_BUFFERS && self.queue.pop(&mut self.chain)? {
            let Chain {
                head,
                readable,
                writable,
                ..
            } = &mut self.chain;
            if !readable.is_empty() || writable.len() <= HEADER_SIZE {
                return Err(DriverError::ReceiveBuffer {
                    head: *head,
                    readable: readable.len(),
                    writable: writable.len(),
                });
            }
            let buffer = &mut self.buffers[taken];
            buffer.head = *head;
            buffer.header.clear();
            writable.move_front(HEADER_SIZE, &mut buffer.header);
            writable.truncate(limit - self.data.len());
            buffer.room = writable.len();
            self.data.append(writable);
            taken += 1;
        }
        Ok(taken)
    }

    /// Notifies the driver of the packets, if it wants an interrupt for them.
    pub(super) fn report(&mut self, link: &DriverLink) {
        if std::mem::take(&mut self.unreported) {
            self.queue.notify_driver(link);
        }
    }
}

/// What was sent to the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packets {
    pub(super) bytes: usize,
    pub(super) packets: usize,
}
