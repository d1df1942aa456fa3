//! From the driver to the tap (section 5.1.6.2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use super::dropped::{DropReason, DroppedPackets};
use super::{Halt, MAX_PACKET_SIZE};
use crate::GuestMemory;
use crate::tap::{PACKET_HEADER_SIZE, Tap, is_gone};
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

    pub(super) fn clear_doorbell(&self) {
        self.queue.clear_doorbell();
    }

    /// Sends what the driver has made available, or takes it from the queue all the same where
    /// there is no tap. No more packets are sent than the queue holds; for the rest the doorbell
    /// is rung again.
    pub(super) fn transmit(
        &mut self,
        tap: Option<&Tap>,
        interrupt: &VirtioInterrupt,
        dropped: &mut DroppedPackets,
    ) -> Result<Halt, QueueError> {
        self.queue.disable_doorbell();
        let mut halt = Halt::Driver;
        let mut used = false;
        for _ in 0..self.queue.size() {
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            if let Some(tap) = tap
                && let Err(reason) = self.send(tap, dropped)
            {
                self.queue.undo_pop();
                halt = reason;
                break;
            }
            self.queue.add_used(self.chain.head, 0);
            used = true;
        }
        if halt == Halt::Driver && self.queue.enable_doorbell()? {
            self.queue.ring_doorbell();
        }
        if used && self.queue.needs_interrupt() {
            interrupt.notify_used_buffer();
        }
        Ok(halt)
    }

    /// Sends one packet, or drops it where that cannot be done, now or later.
    fn send(&mut self, tap: &Tap, dropped: &mut DroppedPackets) -> Result<(), Halt> {
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
