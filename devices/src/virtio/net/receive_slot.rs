//! A slot for one packet on its way to the driver.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bantam_memory::{GuestMemory, MAX_VECTORS_PER_CALL};
use libc::iovec;

use super::DriverError;
use super::backend::{NetQueue, PacketBuffer};
use super::dhcp_checksum::complete_dhcp_checksum;
use super::overflow::Overflow;
use crate::tap::PACKET_HEADER_SIZE;
use crate::virtio::{Chain, VirtQueue};

/// Offset of `num_buffers` in the header of a packet (section 5.1.6).
const BUFFER_COUNT_OFFSET: usize = 10;

/// A chain that was taken from the queue and has no packet in it yet.
struct EmptyBuffer {
    head: u16,
    size: usize,
}

/// Buffers for a packet, and the packet once it has been read.
pub(super) struct ReceiveSlot {
    /// All buffers, one after the other.
    chain: Chain,
    /// The single buffers in `chain`, in the same order.
    buffers: VecDeque<EmptyBuffer>,
    /// The part of a packet that does not fit into the buffers.
    overflow: Overflow,
    /// Size of the packet that has been read, if there is one.
    packet: Option<usize>,
    /// How many of its bytes are in the buffers; the rest is in the overflow.
    in_buffers: usize,
    /// Buffers and overflow in the form that a system call takes.
    vectors: Vec<iovec>,
    /// The buffers that a packet fills; the vector is kept for its allocation.
    filled: Vec<(u16, u32)>,
}

// SAFETY: the pointers in `vectors` are into guest memory, which `chain` keeps alive and which is
// shared between threads already, and into `overflow`, which this struct owns.
unsafe impl Send for ReceiveSlot {}

impl ReceiveSlot {
    /// # Errors
    /// If the host has no room for the overflow.
    pub(super) fn new(memory: &Arc<GuestMemory>) -> Result<ReceiveSlot, String> {
        let overflow = Overflow::new()
            .map_err(|error| format!("cannot map memory for large packets: {error}"))?;
        Ok(ReceiveSlot {
            chain: Chain::new(memory),
            buffers: VecDeque::new(),
            overflow,
            packet: None,
            in_buffers: 0,
            vectors: Vec::new(),
            filled: Vec::new(),
        })
    }

    /// Returns how many bytes the buffers have room for.
    pub(super) fn room(&self) -> usize {
        self.chain.writable.len()
    }

    /// Returns the number of buffers.
    pub(super) fn buffer_count(&self) -> usize {
        self.buffers.len()
    }

    /// Returns the size of the packet that has been read and not delivered yet, header included.
    pub(super) fn packet_size(&self) -> Option<usize> {
        self.packet
    }

    /// Takes one buffer from the queue; `false` if the queue has none.
    pub(super) fn take_buffer(&mut self, queue: &mut VirtQueue) -> Result<bool, DriverError> {
        let before = self.chain.writable.len();
        if !queue.pop_behind(&mut self.chain)? {
            return Ok(false);
        }
        let head = self.chain.head;
        let size = self.chain.writable.len() - before;
        // Each must hold at least a header (section 5.1.6.3.1).
        if size < PACKET_HEADER_SIZE {
            queue.undo_pop();
            return Err(DriverError::ReceiveBuffer {
                head,
                readable: self.chain.readable.len(),
                writable: size,
            });
        }
        self.chain.readable.clear();
        self.buffers.push_back(EmptyBuffer { head, size });
        Ok(true)
    }

    /// Takes the buffers of another slot, which has no packet.
    pub(super) fn take_buffers_of(&mut self, other: &mut ReceiveSlot) {
        self.chain.writable.append(&mut other.chain.writable);
        self.buffers.append(&mut other.buffers);
    }

    /// Returns the vectors to read a packet into. They are valid until the slot is changed or dropped.
    /// [`ReceiveSlot::received`] or [`ReceiveSlot::failed`] must be called next.
    pub(super) fn vectors_to_read_to(&mut self) -> &[iovec] {
        let buffers = self.chain.writable.vectors_to_fill();
        // A call takes a limited number of vectors, and the overflow is the last one.
        let buffers = &buffers[..buffers.len().min(MAX_VECTORS_PER_CALL - 1)];
        self.in_buffers = buffers.iter().map(|vector| vector.iov_len).sum();
        self.vectors.clear();
        self.vectors.extend_from_slice(buffers);
        self.vectors.push(iovec {
            iov_base: self.overflow.as_mut_ptr().cast(),
            iov_len: self.overflow.len(),
        });
        &self.vectors
    }

    /// Reads a packet from `queue`. Returns its size, or a negated error number. A packet can be larger than
    /// the buffers if the slot `can_grow`.
    pub(super) fn read(&mut self, queue: &dyn NetQueue, can_grow: bool) -> i32 {
        self.vectors_to_read_to();
        let size = if can_grow {
            usize::MAX
        } else {
            self.in_buffers
        };
        // SAFETY: the vectors cover guest memory and the overflow. Both outlive the call, and nothing refers to
        // either.
        let mut buffer = unsafe { PacketBuffer::new(&self.vectors, size) };
        match queue.read(&mut buffer).map(i32::try_from) {
            Ok(Ok(size)) => size,
            Ok(Err(_)) => -libc::EMSGSIZE,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => -libc::EAGAIN,
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    /// Takes note that a packet of `size` bytes has been read into the vectors.
    pub(super) fn received(&mut self, size: usize) {
        self.chain.writable.mark_filled(size.min(self.in_buffers));
        self.packet = Some(size);
    }

    /// Takes note that reading a packet failed with `error`.
    pub(super) fn failed(&mut self, error: &io::Error) {
        // After any other error it is not known how much the call has written.
        let filled = match error.kind() {
            io::ErrorKind::WouldBlock => 0,
            _ => self.in_buffers,
        };
        self.chain.writable.mark_filled(filled);
    }

    /// Puts a packet that does not come from a tap into the buffers, as far as they have room.
    pub(super) fn put(&mut self, packet: &[u8]) {
        self.in_buffers = self.chain.writable.write_at(0, packet);
        self.packet = Some(self.in_buffers);
    }

    /// Drops the packet.
    pub(super) fn forget(&mut self) {
        self.packet = None;
    }

    /// Gives up all buffers and appends their heads to `heads`. The packet, if there is one, is kept.
    pub(super) fn give_up_buffers(&mut self, heads: &mut Vec<u16>) {
        // A packet that is larger than the overflow will be dropped.
        if let Some(size) = self.packet.filter(|&size| size <= self.overflow.len()) {
            let in_buffers = self.in_buffers.min(size);
            self.overflow.copy_within(..size - in_buffers, in_buffers);
            let in_buffers = &mut self.overflow[..in_buffers];
            self.chain.writable.read_at(0, in_buffers);
        }
        self.in_buffers = 0;
        heads.extend(self.buffers.drain(..).map(|buffer| buffer.head));
        self.chain.writable.clear();
    }

    /// Completes the packet, for which the buffers have room, and returns the buffers that it fills to the
    /// driver.
    pub(super) fn deliver(&mut self, queue: &mut VirtQueue) {
        let Some(size) = self.packet.take() else {
            return;
        };
        let list = &mut self.chain.writable;
        let in_overflow = size.saturating_sub(self.in_buffers);
        list.write_at(self.in_buffers, &self.overflow[..in_overflow]);
        complete_dhcp_checksum(list, size);
        let mut left = size;
        let mut filled_size = 0;
        self.filled.clear();
        while left > 0
            && let Some(buffer) = self.buffers.pop_front()
        {
            let len = left.min(buffer.size);
            left -= len;
            filled_size += buffer.size;
            // No packet is larger than MAX_PACKET_SIZE, so neither number is truncated.
            self.filled.push((buffer.head, len as u32));
        }
        let buffer_count = self.filled.len() as u16;
        list.write_at(BUFFER_COUNT_OFFSET, &buffer_count.to_le_bytes());
        list.advance(filled_size);
        queue.add_used_together(&self.filled);
    }
}
