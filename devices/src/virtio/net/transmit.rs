//! From the driver to the tap (section 5.1.6.2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use super::dropped::{DropReason, DroppedPackets};
use super::{Halt, MAX_PACKET_SIZE, MAX_PACKETS_PER_TURN, PACKETS_PER_INTERRUPT};
use crate::GuestMemory;
use crate::tap::{PACKET_HEADER_SIZE, TapQueue, is_gone};
use crate::virtio::{Chain, QueueError, VirtQueue, VirtioInterrupt};

/// Sends the packets of the transmit queue.
pub(super) struct Transmitter {
    queue: VirtQueue,
    chain: Chain,
}

impl Transmitter {
    pub(super) fn new(queue: VirtQueue, memory: &Arc<GuestMemory>) -> Transmitter {
        Transmitter {
            queue,
            chain: Chain::new(memory),
        }
    }

    pub(super) fn doorbell(&self) -> RawFd {
        self.queue.as_raw_fd()
    }

    /// Puts the queue off to a later turn.
    pub(super) fn ring_doorbell(&self) {
        self.queue.ring_doorbell();
    }

    /// Sends what the driver has made available, or takes it from the queue all the same where
    /// there is no tap; for one turn at most, with the doorbell rung again for the rest.
    pub(super) fn transmit(
        &mut self,
        tap: Option<&TapQueue>,
        interrupt: &VirtioInterrupt,
        dropped: &mut DroppedPackets,
    ) -> Result<Halt, QueueError> {
        self.queue.disable_doorbell();
        let mut unreported = 0;
        let result = self.transmit_turn(tap, interrupt, dropped, &mut unreported);
        // The driver hears of what was sent, even when it has broken the rules after that.
        self.report(&mut unreported, interrupt);
        result
    }

    fn transmit_turn(
        &mut self,
        tap: Option<&TapQueue>,
        interrupt: &VirtioInterrupt,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Halt, QueueError> {
        for _ in 0..MAX_PACKETS_PER_TURN {
            if !self.queue.pop(&mut self.chain)? {
                if !self.queue.enable_doorbell()? {
                    return Ok(Halt::Driver);
                }
                self.queue.disable_doorbell();
                continue;
            }
            if let Some(tap) = tap
                && let Err(halt) = self.send(tap, dropped)
            {
                self.queue.undo_pop();
                return Ok(halt);
            }
            self.queue.add_used(self.chain.head, 0);
            *unreported += 1;
            if *unreported == PACKETS_PER_INTERRUPT {
                self.report(unreported, interrupt);
            }
        }
        self.queue.ring_doorbell();
        Ok(Halt::Driver)
    }

    /// Tells the driver of the packets that were taken from it since the last time, if it wants to
    /// know.
    fn report(&mut self, unreported: &mut usize, interrupt: &VirtioInterrupt) {
        if std::mem::take(unreported) > 0 && self.queue.needs_interrupt() {
            interrupt.notify_used_buffer();
        }
    }

    /// Sends one packet, or drops it where that cannot be done, now or later.
    fn send(&mut self, tap: &TapQueue, dropped: &mut DroppedPackets) -> Result<(), Halt> {
        let len = self.chain.readable.len();
        if !(PACKET_HEADER_SIZE..=MAX_PACKET_SIZE).contains(&len) {
            dropped.record(&DropReason::NoPacket(len));
            return Ok(());
        }
        match self.chain.readable.write_to(tap.as_fd(), None) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Halt::Tap),
            Err(error) if is_gone(&error) => Err(Halt::TapGone),
            Err(error) => {
                dropped.record(&DropReason::Tap(error));
                Ok(())
            }
        }
    }
}
