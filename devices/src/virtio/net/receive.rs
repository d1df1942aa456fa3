//! From the tap to the driver (section 5.1.6.4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bantam_memory::GuestMemory;

use super::dropped::{DropReason, DroppedPackets};
use super::expected_size::ExpectedSize;
use super::flow::Flow;
use super::packet_ring::{MAX_BATCH, PacketRing};
use super::receive_slot::ReceiveSlot;
use super::state::ReceiverState;
use super::{DriverError, Halt, MAX_PACKET_SIZE, MAX_PACKETS_PER_TURN, PACKETS_PER_INTERRUPT};
use crate::tap::{PACKET_HEADER_SIZE, TapQueue, is_gone};
use crate::virtio::{DriverLink, VirtQueue};
use crate::worker::QueueProgress;

/// Puts packets into the buffers of the receive queue.
///
/// The length of a packet is known only once it has been read, so buffers for one as large as is
/// expected are taken from the queue beforehand and those that are left over kept for the next. A
/// packet for which there were too few ends in an overflow, from where it is copied to those that
/// are taken then, or that the driver adds.
///
/// Where there is an io_uring, several packets are read by one system call, as many as seem to be
/// there: a call more for nothing costs as much as it saves for two packets.
pub(super) struct Receiver {
    queue: VirtQueue,
    /// Most buffers that a packet may be spread over.
    max_buffers: usize,
    /// What buffers are taken for in advance.
    expected: ExpectedSize,
    /// Places for packets, in the order in which these come. Those at the front that hold one have
    /// yet to be delivered; all others are empty.
    slots: VecDeque<ReceiveSlot>,
    ring: Option<PacketRing>,
    /// How many packets to read next time.
    batch: usize,
    results: Vec<i32>,
}

impl Receiver {
    /// With `ring`, several packets are read together.
    pub(super) fn new(
        queue: VirtQueue,
        memory: &Arc<GuestMemory>,
        merges_buffers: bool,
        expected: ExpectedSize,
        ring: Option<PacketRing>,
    ) -> Receiver {
        let slot_count = if ring.is_some() { MAX_BATCH } else { 1 };
        Receiver {
            max_buffers: if merges_buffers {
                usize::from(queue.size())
            } else {
                1
            },
            queue,
            expected,
            slots: (0..slot_count).map(|_| ReceiveSlot::new(memory)).collect(),
            ring,
            batch: 1,
            results: Vec::new(),
        }
    }

    pub(super) fn doorbell(&self) -> RawFd {
        self.queue.as_raw_fd()
    }

    /// The ring that packets are read by, for the next driver. From now on each is read by itself.
    pub(super) fn take_ring(&mut self) -> Option<PacketRing> {
        self.ring.take()
    }

    /// Replaces a ring that has failed.
    pub(super) fn renew_ring(&mut self, tap: &TapQueue) {
        if let Some(ring) = &mut self.ring {
            ring.renew(tap);
        }
    }

    /// Puts the queue off to a later turn.
    pub(super) fn ring_doorbell(&self) {
        self.queue.ring_doorbell();
    }

    /// Puts all buffers back into the queue. Packets that lack buffers are kept, to be delivered first
    /// when they have some.
    pub(super) fn put_back_buffers(&mut self) {
        let mut heads = Vec::new();
        for slot in &mut self.slots {
            slot.give_up_buffers(&mut heads);
        }
        self.queue.put_back(heads);
    }

    /// How far the queue has come, after [`Receiver::put_back_buffers`].
    pub(super) fn progress(&self) -> QueueProgress {
        self.queue.progress()
    }

    /// What another receiver must know to go on after that.
    pub(super) fn state(&self) -> ReceiverState {
        let with_packet = |slot: &&ReceiveSlot| slot.packet_size().is_some();
        ReceiverState {
            substitutes: self.queue.substitutes().to_vec(),
            undelivered: self.slots.iter().filter(with_packet).count() as u64,
        }
    }

    /// Goes on as another did.
    ///
    /// # Errors
    /// If that had more buffers than the queue can have.
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

    /// Receives what the tap has, for one turn at most.
    pub(super) fn receive(
        &mut self,
        tap: &TapQueue,
        flow: &mut Flow,
        link: &DriverLink,
        dropped: &mut DroppedPackets,
    ) -> Result<Halt, DriverError> {
        self.queue.disable_doorbell();
        let mut unreported = 0;
        let result = self.receive_turn(tap, flow, link, dropped, &mut unreported);
        // The driver hears of what was received, even when it has broken the rules after that.
        self.report(&mut unreported, link);
        result
    }

    fn receive_turn(
        &mut self,
        tap: &TapQueue,
        flow: &mut Flow,
        link: &DriverLink,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Halt, DriverError> {
        let mut packets = 0;
        while packets < MAX_PACKETS_PER_TURN {
            // Those that were read before come first.
            let halt = match self.deliver_read(flow, dropped, unreported)? {
                Some(halt) => Some(halt),
                None => self.read(tap, flow, dropped, &mut packets)?,
            };
            if let Some(halt) = halt {
                // What was read along with that is delivered all the same.
                return Ok(match self.deliver_read(flow, dropped, unreported)? {
                    Some(other) if halt == Halt::Tap => other,
                    _ => halt,
                });
            }
            if *unreported >= PACKETS_PER_INTERRUPT {
                self.report(unreported, link);
            }
        }
        Ok(match self.deliver_read(flow, dropped, unreported)? {
            Some(halt) => halt,
            // The tap is ready at once if it has more.
            None => Halt::Tap,
        })
    }

    /// Delivers a packet that does not come from the tap, header included. `Some(false)` where it is
    /// larger than the driver's buffers, and `None` while it has too few; then it rings the doorbell
    /// when it has more.
    pub(super) fn insert(
        &mut self,
        packet: &[u8],
        flow: &mut Flow,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Option<bool>, DriverError> {
        match self.deliver_read(flow, dropped, unreported)? {
            None => {}
            // What the tap has left is none of its packets.
            Some(Halt::TapGone) => self.slots.iter_mut().for_each(ReceiveSlot::forget),
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

    /// Tells the driver of the packets delivered since the last time, if it wants to know.
    pub(super) fn report(&mut self, unreported: &mut usize, link: &DriverLink) {
        if std::mem::take(unreported) > 0 {
            self.queue.notify_driver(link);
        }
    }

    /// Reads packets into empty slots, all of which are, and counts them; or says why there are none.
    fn read(
        &mut self,
        tap: &TapQueue,
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
                self.results.push(slot.read(tap));
            }
        }
        let mut halt = None;
        let mut received = 0;
        // The slots of packets come to the front, in their order; there may be others between them.
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
                Some(libc::EAGAIN | libc::ECANCELED) => halt = halt.or(Some(Halt::Tap)),
                _ if is_gone(&error) => halt = Some(Halt::TapGone),
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

    /// Delivers the packets that have been read, or says what keeps them.
    fn deliver_read(
        &mut self,
        flow: &mut Flow,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Option<Halt>, DriverError> {
        // An empty slot goes behind the others as soon as its packet is delivered.
        while let Some(len) = self.slots.front().and_then(ReceiveSlot::packet_size) {
            // A tap puts a header before each packet: it can only have ended.
            if len < PACKET_HEADER_SIZE {
                return Ok(Some(Halt::TapGone));
            }
            if len <= MAX_PACKET_SIZE && !self.take_buffers(0, len)? {
                return Ok(Some(Halt::Driver));
            }
            let Some(mut slot) = self.slots.pop_front() else {
                break;
            };
            // One larger than all may have been cut short; its full length is not known.
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

    /// Takes buffers for a slot until there are as many bytes as expected, or as `required` if that is
    /// more, while the queue has any. `true` when there are `required` bytes, or as many buffers as
    /// there may be; else the doorbell is rung for the next.
    fn take_buffers(&mut self, slot: usize, required: usize) -> Result<bool, DriverError> {
        let wanted = self.expected.guess().max(required);
        // A driver may make buffers available and take them back without end.
        for _ in 0..self.queue.size() {
            self.fill(slot, wanted)?;
            let place = &self.slots[slot];
            if place.room() >= required || place.buffer_count() >= self.max_buffers {
                return Ok(true);
            }
            // The driver has no more until some of them are returned, so those count that others have
            // in advance.
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

    /// Takes buffers for a slot until there are `wanted` bytes, or as many buffers as there may be,
    /// while the queue has any. `true` when there are any.
    fn fill(&mut self, slot: usize, wanted: usize) -> Result<bool, DriverError> {
        let place = &mut self.slots[slot];
        while place.room() < wanted
            && place.buffer_count() < self.max_buffers
            && place.take_buffer(&mut self.queue)?
        {}
        Ok(place.buffer_count() > 0)
    }

    /// Moves the buffers of the last empty slot that has any to one before it. `false` if there is
    /// none.
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
