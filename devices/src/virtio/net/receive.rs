//! From the tap to the driver (section 5.1.6.4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use super::dropped::{DropReason, DroppedPackets};
use super::expected_size::ExpectedSize;
use super::{DriverError, Halt, MAX_PACKET_SIZE, MAX_PACKETS_PER_TURN, PACKETS_PER_INTERRUPT};
use crate::GuestMemory;
use crate::tap::{PACKET_HEADER_SIZE, TapQueue, is_gone};
use crate::virtio::{Chain, PacketRead, VirtQueue, VirtioInterrupt};

/// Offset of `num_buffers` in the header of a packet (section 5.1.6).
const BUFFER_COUNT_OFFSET: usize = 10;

/// A chain that was taken from the queue and has no packet in it yet.
struct EmptyBuffer {
    head: u16,
    size: usize,
}

/// Puts packets into the buffers of the receive queue.
///
/// The length of a packet is known only once it has been read, so buffers for one as large as is
/// expected are taken from the queue beforehand and those that are left over kept for the next. A
/// packet for which there were too few ends in `overflow`, from where it is copied to those that
/// are taken then, or that the driver adds.
pub(super) struct Receiver {
    queue: VirtQueue,
    /// Most buffers that a packet may be spread over.
    max_buffers: usize,
    /// What buffers are taken for in advance.
    expected: ExpectedSize,
    /// Every buffer taken from the queue, one behind the other.
    chain: Chain,
    /// What the buffers in `chain` are, in the same order.
    buffers: VecDeque<EmptyBuffer>,
    overflow: Box<[u8]>,
    /// A packet that has been read and waits for buffers.
    waiting: Option<PacketRead>,
    /// The buffers that the present packet fills, kept for its allocation.
    filled: Vec<(u16, u32)>,
}

impl Receiver {
    pub(super) fn new(
        queue: VirtQueue,
        memory: &Arc<GuestMemory>,
        merges_buffers: bool,
        expected: ExpectedSize,
    ) -> Receiver {
        Receiver {
            max_buffers: if merges_buffers {
                usize::from(queue.size())
            } else {
                1
            },
            queue,
            expected,
            chain: Chain::new(memory),
            buffers: VecDeque::new(),
            overflow: vec![0; MAX_PACKET_SIZE].into_boxed_slice(),
            waiting: None,
            filled: Vec::new(),
        }
    }

    pub(super) fn doorbell(&self) -> RawFd {
        self.queue.as_raw_fd()
    }

    /// Puts the queue off to a later turn.
    pub(super) fn ring_doorbell(&self) {
        self.queue.ring_doorbell();
    }

    /// Receives what the tap has, for one turn at most.
    pub(super) fn receive(
        &mut self,
        tap: &TapQueue,
        interrupt: &VirtioInterrupt,
        dropped: &mut DroppedPackets,
    ) -> Result<Halt, DriverError> {
        self.queue.disable_doorbell();
        let mut unreported = 0;
        let result = self.receive_turn(tap, interrupt, dropped, &mut unreported);
        // The driver hears of what was received, even when it has broken the rules after that.
        self.report(&mut unreported, interrupt);
        result
    }

    fn receive_turn(
        &mut self,
        tap: &TapQueue,
        interrupt: &VirtioInterrupt,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Halt, DriverError> {
        for _ in 0..MAX_PACKETS_PER_TURN {
            match self.receive_packet(tap, dropped)? {
                Outcome::Delivered => *unreported += 1,
                Outcome::Dropped => {}
                Outcome::Halted(halt) => return Ok(halt),
            }
            if *unreported == PACKETS_PER_INTERRUPT {
                self.report(unreported, interrupt);
            }
        }
        // The tap is ready at once if it has more.
        Ok(Halt::Tap)
    }

    /// Tells the driver of the packets delivered since the last time, if it wants to know.
    fn report(&mut self, unreported: &mut usize, interrupt: &VirtioInterrupt) {
        if std::mem::take(unreported) > 0 && self.queue.needs_interrupt() {
            interrupt.notify_used_buffer();
        }
    }

    fn receive_packet(
        &mut self,
        tap: &TapQueue,
        dropped: &mut DroppedPackets,
    ) -> Result<Outcome, DriverError> {
        let packet = match self.waiting.take() {
            Some(packet) => packet,
            None => {
                if !self.take_buffers(self.expected.guess(), 1)? {
                    return Ok(Outcome::Halted(Halt::Driver));
                }
                let buffers = &mut self.chain.writable;
                match buffers.read_packet(tap.as_fd(), &mut self.overflow) {
                    Ok(packet) => packet,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Outcome::Halted(Halt::Tap));
                    }
                    Err(error) if is_gone(&error) => return Ok(Outcome::Halted(Halt::TapGone)),
                    Err(error) => {
                        dropped.record(&DropReason::Tap(error));
                        return Ok(Outcome::Dropped);
                    }
                }
            }
        };
        let len = packet.in_list + packet.in_overflow;
        self.expected.learn(len);
        // A tap puts a header before each packet: it can only have ended.
        if len < PACKET_HEADER_SIZE {
            return Ok(Outcome::Halted(Halt::TapGone));
        }
        if len <= MAX_PACKET_SIZE && !self.take_buffers(len, len)? {
            self.waiting = Some(packet);
            return Ok(Outcome::Halted(Halt::Driver));
        }
        // One larger than all may have been cut short; its full length is not known.
        if len > MAX_PACKET_SIZE || len > self.chain.writable.len() {
            dropped.record(&DropReason::NoRoom(len));
            return Ok(Outcome::Dropped);
        }
        self.deliver(packet)?;
        Ok(Outcome::Delivered)
    }

    /// Takes buffers from the queue until there are `wanted` bytes, while it has any. `true` when
    /// there are `required` bytes, or as many buffers as there may be; else the doorbell is rung
    /// for the next.
    fn take_buffers(&mut self, wanted: usize, required: usize) -> Result<bool, DriverError> {
        // A driver may make buffers available and take them back without end.
        for _ in 0..self.queue.size() {
            while self.chain.writable.len() < wanted
                && self.buffers.len() < self.max_buffers
                && self.take_buffer()?
            {}
            if self.chain.writable.len() >= required || self.buffers.len() >= self.max_buffers {
                return Ok(true);
            }
            if !self.queue.enable_doorbell()? {
                return Ok(false);
            }
            self.queue.disable_doorbell();
        }
        self.queue.ring_doorbell();
        Ok(false)
    }

    /// Takes one buffer from the queue; `false` where it has none.
    fn take_buffer(&mut self) -> Result<bool, DriverError> {
        let before = self.chain.writable.len();
        if !self.queue.pop_behind(&mut self.chain)? {
            return Ok(false);
        }
        let head = self.chain.head;
        let size = self.chain.writable.len() - before;
        // Each holds a header at least (section 5.1.6.3.1).
        if size < PACKET_HEADER_SIZE {
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

    /// Completes a packet, which the buffers have room for, and returns those that it fills.
    fn deliver(&mut self, packet: PacketRead) -> Result<(), DriverError> {
        let list = &mut self.chain.writable;
        list.write_at(packet.in_list, &self.overflow[..packet.in_overflow]);
        let mut left = packet.in_list + packet.in_overflow;
        let mut filled_size = 0;
        self.filled.clear();
        while left > 0
            && let Some(buffer) = self.buffers.pop_front()
        {
            let len = left.min(buffer.size);
            left -= len;
            filled_size += buffer.size;
            // No packet is larger than MAX_PACKET_SIZE, so neither number is cut.
            self.filled.push((buffer.head, len as u32));
        }
        let buffer_count = self.filled.len() as u16;
        list.write_at(BUFFER_COUNT_OFFSET, &buffer_count.to_le_bytes());
        list.advance(filled_size);
        self.queue.add_used_together(&self.filled);
        Ok(())
    }
}

/// What became of an attempt to receive one packet.
enum Outcome {
    Delivered,
    Dropped,
    Halted(Halt),
}
