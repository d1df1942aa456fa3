//! From the backend to the driver (section 5.1.6.4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bantam_memory::GuestMemory;

use super::backend::{NetQueue, is_gone};
use super::dropped::{DropReason, DroppedPackets};
use super::expected_size::ExpectedSize;
use super::flow::Flow;
use super::packet_ring::{MAX_BATCH, PacketRing};
use super::receive_slot::ReceiveSlot;
use super::state::ReceiverState;
use super::{DriverError, Halt, MAX_PACKET_SIZE, MAX_PACKETS_PER_TURN, PACKETS_PER_INTERRUPT};
use crate::tap::PACKET_HEADER_SIZE;
use crate::virtio::{DriverLink, VirtQueue};
use crate::worker::QueueProgress;

/// Delivers packets into the buffers of the receive queue.
///
/// The length of a packet is known only once it has been read. So buffers for a packet of the expected size
/// are taken from the queue beforehand, and those left over are kept for the next. If there were too few, the
/// end of the packet is in an overflow buffer, and is copied to further buffers that are taken then, or that
/// the driver adds.
///
/// With an io_uring, one system call reads as many packets as seem to be there: an unnecessary read costs as
/// much as is saved for two packets.
pub(super) struct Receiver {
    queue: VirtQueue,
    /// Most buffers that a packet may be spread over.
    max_buffers: usize,
    /// The packet size for which buffers are taken in advance.
    expected: ExpectedSize,
    /// Slots for packets, in order of arrival. Those at the front hold packets that have yet to be delivered;
    /// all others are empty.
    slots: VecDeque<ReceiveSlot>,
    ring: Option<PacketRing>,
    /// How many packets to read next time.
    batch: usize,
    results: Vec<i32>,
}

impl Receiver {
    /// Makes a receiver. With `ring`, it reads several packets together.
    ///
    /// # Errors
    /// If the host has no room for large packets.
    pub(super) fn new(
        queue: VirtQueue,
        memory: &Arc<GuestMemory>,
        merges_buffers: bool,
        expected: ExpectedSize,
        ring: Option<PacketRing>,
    ) -> Result<Receiver, String> {
        let slot_count = if ring.is_some() { MAX_BATCH } else { 1 };
        Ok(Receiver {
            max_buffers: if merges_buffers {
                usize::from(queue.size())
            } else {
                1
            },
            queue,
            expected,
            slots: (0..slot_count)
                .map(|_| ReceiveSlot::new(memory))
                .collect::<Result<_, _>>()?,
            ring,
            batch: 1,
            results: Vec::new(),
        })
    }

    pub(super) fn doorbell(&self) -> RawFd {
        self.queue.as_raw_fd()
    }

    /// The ring that packets are read by, for the next driver. From now on each is read by itself.
    pub(super) fn take_ring(&mut self) -> Option<PacketRing> {
        self.ring.take()
    }

    /// Replaces a ring that has failed.
    pub(super) fn renew_ring(&mut self, backend: &dyn NetQueue) {
        if let Some(ring) = &mut self.ring {
            ring.renew(backend);
        }
    }

    /// Puts the queue off to a later turn.
    pub(super) fn ring_doorbell(&self) {
        self.queue.ring_doorbell();
    }

    /// Puts all buffers back into the queue. Packets without enough buffers are kept, to be delivered first
    /// once there are some.
    pub(super) fn put_back_buffers(&mut self) {
        let mut heads = Vec::new();
        for slot in &mut self.slots {
            slot.give_up_buffers(&mut heads);
        }
        self.queue.put_back(heads);
    }

    /// Returns how far the queue has come, after [`Receiver::put_back_buffers`].
    pub(super) fn progress(&self) -> QueueProgress {
        self.queue.progress()
    }

    /// Returns the state that another receiver needs to go on after that.
    pub(super) fn state(&self) -> ReceiverState {
        let with_packet = |slot: &&ReceiveSlot| slot.packet_size().is_some();
        ReceiverState {
            substitutes: self.queue.substitutes().to_vec(),
            undelivered: self.slots.iter().filter(with_packet).count() as u64,
        }
    }

    /// Takes over the state of another receiver.
    ///
    /// # Errors
    /// If that one had more buffers than the queue can have.
    pub(super) fn restore(&mut self, state: ReceiverState) -> Result<(), String> {
        let (count, size) = (state.substitutes.len(), self.queue.size());
        if count > usize::from(size) {
            return Err(format!(
                "{count} buffers were put back in a queue of {size}"
            ));
        }
        self.queue.set_substitutes(state.substitutes);
        Ok(())
    }

    /// Receives packets from the backend, for one turn at most.
    pub(super) fn receive(
        &mut self,
        backend: &dyn NetQueue,
        flow: &mut Flow,
        link: &DriverLink,
        dropped: &mut DroppedPackets,
    ) -> Result<Halt, DriverError> {
        self.queue.disable_doorbell();
        let mut unreported = 0;
        let result = self.receive_turn(backend, flow, link, dropped, &mut unreported);
        // The driver is told of what was received, even if it broke the rules afterwards.
        self.report(&mut unreported, link);
        result
    }

    fn receive_turn(
        &mut self,
        backend: &dyn NetQueue,
        flow: &mut Flow,
        link: &DriverLink,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Halt, DriverError> {
        let mut packets = 0;
        while packets < MAX_PACKETS_PER_TURN {
            // Packets that were read before come first.
            let halt = match self.deliver_read(flow, dropped, unreported)? {
                Some(halt) => Some(halt),
                None => self.read(backend, flow, dropped, &mut packets)?,
            };
            if let Some(halt) = halt {
                // Packets that the same call has read are delivered all the same.
                return Ok(match self.deliver_read(flow, dropped, unreported)? {
                    Some(other) if halt == Halt::Backend => other,
                    _ => halt,
                });
            }
            if *unreported >= PACKETS_PER_INTERRUPT {
                self.report(unreported, link);
            }
        }
        Ok(match self.deliver_read(flow, dropped, unreported)? {
            Some(halt) => halt,
            // The backend is ready at once if it has more.
            None => Halt::Backend,
        })
    }

    /// Delivers a packet that does not come from the backend, header included. Returns `Some(false)` if it is
    /// larger than the driver's buffers, and `None` if the driver has too few; the driver then rings the
    /// doorbell when it has more.
    pub(super) fn insert(
        &mut self,
        packet: &[u8],
        flow: &mut Flow,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Option<bool>, DriverError> {
        match self.deliver_read(flow, dropped, unreported)? {
            None => {}
            // Packets of the backend that are left do not matter any more.
            Some(Halt::BackendGone) => self.slots.iter_mut().for_each(ReceiveSlot::forget),
            Some(_) => return Ok(None),
        }
        if !self.take_buffers(0, packet.len())? {
            return Ok(None);
        }
        let slot = &mut self.slots[0];
        if slot.room() < packet.len() {
            return Ok(Some(false));
        }
        slot.put(packet);
        slot.deliver(&mut self.queue);
        *unreported += 1;
        Ok(Some(true))
    }

    /// Notifies the driver of the packets delivered since the last time, if it wants an interrupt for them.
    pub(super) fn report(&mut self, unreported: &mut usize, link: &DriverLink) {
        if std::mem::take(unreported) > 0 {
            self.queue.notify_driver(link);
        }
    }

    /// Reads packets into the slots, all of which are empty, and returns their number; or the reason why
    /// there are none.
    fn read(
        &mut self,
        backend: &dyn NetQueue,
        flow: &mut Flow,
        dropped: &mut DroppedPackets,
        packets: &mut usize,
    ) -> Result<Option<Halt>, DriverError> {
        if !flow.allows_more()? {
            return Ok(Some(Halt::Limit));
        }
        if !self.take_buffers(0, 1)? {
            return Ok(Some(Halt::Driver));
        }
        let mut ready = 1;
        let batch = flow.batch(self.batch.min(self.slots.len()));
        while ready < batch && self.fill(ready, self.expected.guess())? {
            ready += 1;
        }
        self.results.clear();
        match &mut self.ring {
            Some(ring) if ready > 1 && ring.is_usable() => {
                let slots = &mut self.slots.make_contiguous()[..ready];
                if let Err(error) = ring.receive(slots, &mut self.results) {
                    dropped.record(&DropReason::Read(error));
                    self.batch = 1;
                }
            }
            _ => {
                let slot = &mut self.slots[0];
                self.results.push(slot.read(backend, self.max_buffers > 1));
            }
        }
        let mut halt = None;
        let mut received = 0;
        // Slots with packets move to the front in their order; there may be empty ones between them.
        for (index, &result) in self.results.iter().enumerate() {
            let error = match u32::try_from(result) {
                Ok(len) => {
                    flow.charge(len as usize);
                    self.expected.learn(len as usize);
                    self.slots[index].received(len as usize);
                    self.slots.swap(received, index);
                    received += 1;
                    continue;
                }
                Err(_) => io::Error::from_raw_os_error(result.wrapping_neg()),
            };
            self.slots[index].failed(&error);
            match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ECANCELED) => halt = halt.or(Some(Halt::Backend)),
                _ if is_gone(&error) => halt = Some(Halt::BackendGone),
                _ => {
                    *packets += 1;
                    dropped.record(&DropReason::Read(error));
                }
            }
        }
        *packets += received;
        if received > 0 {
            flow.called();
        }
        self.batch = if received == ready {
            (2 * ready).min(self.slots.len())
        } else {
            received.max(1)
        };
        Ok(halt)
    }

    /// Delivers the packets that have been read, or returns what prevents that.
    fn deliver_read(
        &mut self,
        flow: &mut Flow,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Option<Halt>, DriverError> {
        // A slot moves behind the others as soon as its packet is delivered.
        while let Some(len) = self.slots.front().and_then(ReceiveSlot::packet_size) {
            // A tap puts a header before each packet, so a shorter one means that it has ended.
            if len < PACKET_HEADER_SIZE {
                return Ok(Some(Halt::BackendGone));
            }
            if len <= MAX_PACKET_SIZE && !self.take_buffers(0, len)? {
                return Ok(Some(Halt::Driver));
            }
            let Some(mut slot) = self.slots.pop_front() else {
                break;
            };
            // A packet larger than any can be may have been truncated; its full length is not known.
            if len > MAX_PACKET_SIZE || len > slot.room() {
                slot.forget();
                dropped.record(&DropReason::NoRoom(len));
            } else {
                slot.deliver(&mut self.queue);
                flow.passed(len);
                *unreported += 1;
            }
            self.slots.push_back(slot);
        }
        Ok(None)
    }

    /// Takes buffers for a slot while the queue has any, until they have room for the expected size, or for
    /// `required` bytes if that is more. `true` if there is room for `required` bytes, or there are as many
    /// buffers as allowed; otherwise the driver is asked to ring the doorbell for the next one.
    fn take_buffers(&mut self, slot: usize, required: usize) -> Result<bool, DriverError> {
        let wanted = self.expected.guess().max(required);
        // A driver could make buffers available and take them back without end.
        for _ in 0..self.queue.size() {
            self.fill(slot, wanted)?;
            let place = &self.slots[slot];
            if place.room() >= required || place.buffer_count() >= self.max_buffers {
                return Ok(true);
            }
            // The driver has no more until some are returned, so buffers that other slots hold in advance are
            // used.
            if self.take_from_others(slot) {
                continue;
            }
            if !self.queue.enable_doorbell()? {
                return Ok(false);
            }
            self.queue.disable_doorbell();
        }
        self.queue.ring_doorbell();
        Ok(false)
    }

    /// Takes buffers for a slot while the queue has any, until they have room for `wanted` bytes, or there
    /// are as many as allowed. `true` if the slot has any buffers.
    fn fill(&mut self, slot: usize, wanted: usize) -> Result<bool, DriverError> {
        let place = &mut self.slots[slot];
        while place.room() < wanted
            && place.buffer_count() < self.max_buffers
            && place.take_buffer(&mut self.queue)?
        {}
        Ok(place.buffer_count() > 0)
    }

    /// Moves the buffers of the last empty slot that has any to `slot`, which is before it. `false` if there
    /// is no such slot.
    fn take_from_others(&mut self, slot: usize) -> bool {
        for other in (slot + 1..self.slots.len()).rev() {
            if self.slots[other].packet_size().is_none() && self.slots[other].buffer_count() > 0 {
                let (before, after) = self.slots.make_contiguous().split_at_mut(other);
                before[slot].take_buffers_of(&mut after[0]);
                return true;
            }
        }
        false
    }
}
