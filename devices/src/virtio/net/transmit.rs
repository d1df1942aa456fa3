//! From the driver to the backend (section 5.1.6.2).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use bantam_memory::GuestMemory;

use super::backend::{NetQueue, is_gone};
use super::dropped::{DropReason, DroppedPackets};
use super::flow::Flow;
use super::local_port::LocalPort;
use super::packet_ring::{MAX_BATCH, PacketRing};
use super::{DriverError, Halt, MAX_PACKET_SIZE, MAX_PACKETS_PER_TURN, PACKETS_PER_INTERRUPT};
use crate::tap::PACKET_HEADER_SIZE;
use crate::virtio::{Chain, DriverLink, VirtQueue};
use crate::worker::QueueProgress;

/// Fewest packets that are sent together.
const MIN_BATCH: usize = 2;

/// Sends the packets of the transmit queue.
pub(super) struct Transmitter {
    queue: VirtQueue,
    /// Packets that are sent together. The first is used when there is only one.
    chains: Vec<Chain>,
    ring: Option<PacketRing>,
    results: Vec<i32>,
}

impl Transmitter {
    /// Makes a transmitter. With `ring`, it sends several packets together.
    pub(super) fn new(
        queue: VirtQueue,
        memory: &Arc<GuestMemory>,
        ring: Option<PacketRing>,
    ) -> Transmitter {
        let count = if ring.is_some() { MAX_BATCH } else { 1 };
        Transmitter {
            queue,
            chains: (0..count).map(|_| Chain::new(memory)).collect(),
            ring,
            results: Vec::new(),
        }
    }

    pub(super) fn doorbell(&self) -> RawFd {
        self.queue.as_raw_fd()
    }

    /// The ring that packets are sent by, for the next driver. From now on each is sent by itself.
    pub(super) fn take_ring(&mut self) -> Option<PacketRing> {
        self.ring.take()
    }

    /// Replaces a ring that has failed.
    pub(super) fn renew_ring(&mut self, backend: &dyn NetQueue) {
        if let Some(ring) = &mut self.ring {
            ring.renew(backend);
        }
    }

    /// How many packets are in the queue.
    pub(super) fn waiting(&mut self) -> Result<u16, DriverError> {
        Ok(self.queue.available_count()?)
    }

    /// Returns how far the queue has come. No packet is kept from one turn to the next, so all that were
    /// taken have been returned.
    pub(super) fn progress(&self) -> QueueProgress {
        self.queue.progress()
    }

    /// Leaves the queue to a later turn.
    pub(super) fn ring_doorbell(&self) {
        self.queue.ring_doorbell();
    }

    /// Sends the packets that the driver has made available, or drops them if there is no backend; for one turn
    /// at most, with the doorbell rung again for the rest. Packets for the local endpoint, if there is one,
    /// go there.
    pub(super) fn transmit(
        &mut self,
        backend: Option<&dyn NetQueue>,
        flow: &mut Flow,
        local_port: &mut Option<LocalPort>,
        link: &DriverLink,
        dropped: &mut DroppedPackets,
    ) -> Result<Halt, DriverError> {
        self.queue.disable_doorbell();
        let mut unreported = 0;
        let result = self.transmit_turn(backend, flow, local_port, link, dropped, &mut unreported);
        // The driver is told of what was sent, even if it broke the rules afterwards.
        self.report(&mut unreported, link);
        result
    }

    fn transmit_turn(
        &mut self,
        backend: Option<&dyn NetQueue>,
        flow: &mut Flow,
        local_port: &mut Option<LocalPort>,
        link: &DriverLink,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<Halt, DriverError> {
        let mut steps = 0;
        let mut since = Instant::now();
        while steps < MAX_PACKETS_PER_TURN {
            let waiting = usize::from(self.queue.available_count()?);
            if waiting == 0 {
                steps += 1;
                if !self.queue.enable_doorbell()? {
                    return Ok(Halt::Driver);
                }
                self.queue.disable_doorbell();
                since = Instant::now();
                continue;
            }
            if backend.is_some() && !flow.allows_more()? {
                return Ok(Halt::Limit);
            }
            // Half of them: while the driver takes these, there is more to do here.
            let batch = flow.batch((waiting / 2).min(self.chains.len()));
            match (backend, &self.ring) {
                (Some(_), Some(ring)) if batch >= MIN_BATCH && ring.is_usable() => {
                    steps += batch;
                    *unreported += batch;
                    if let Some(halt) =
                        self.send_together(batch, flow, local_port, &mut since, dropped)?
                    {
                        return Ok(halt);
                    }
                }
                _ => {
                    steps += 1;
                    if let Some(halt) =
                        self.send_one(backend, flow, local_port, &mut since, dropped)?
                    {
                        return Ok(halt);
                    }
                    *unreported += 1;
                }
            }
            if *unreported >= PACKETS_PER_INTERRUPT {
                self.report(unreported, link);
                since = Instant::now();
            }
        }
        self.queue.ring_doorbell();
        Ok(Halt::Driver)
    }

    /// Takes the next packet and sends it, if there is a backend. If that cannot take it now, puts it back and
    /// returns why.
    fn send_one(
        &mut self,
        backend: Option<&dyn NetQueue>,
        flow: &mut Flow,
        local_port: &mut Option<LocalPort>,
        since: &mut Instant,
        dropped: &mut DroppedPackets,
    ) -> Result<Option<Halt>, DriverError> {
        let Some(chain) = self.chains.first_mut() else {
            return Ok(None);
        };
        if !self.queue.pop(chain)? {
            return Ok(None);
        }
        if !is_taken(local_port, chain)
            && let Some(backend) = backend
            && let Err(halt) = send(backend, chain, flow, since, dropped)
        {
            self.queue.undo_pop();
            return Ok(Some(halt));
        }
        self.queue.add_used(chain.head, 0);
        Ok(None)
    }

    /// Takes the next `count` packets and sends them with one system call. Packets that cannot be
    /// taken are dropped: a tap takes as many as the host has memory for.
    fn send_together(
        &mut self,
        count: usize,
        flow: &mut Flow,
        local_port: &mut Option<LocalPort>,
        since: &mut Instant,
        dropped: &mut DroppedPackets,
    ) -> Result<Option<Halt>, DriverError> {
        let (mut packets, mut broken) = (0, Ok(()));
        for _ in 0..count {
            let chain = &mut self.chains[packets];
            match self.queue.pop(chain) {
                Ok(true) => {}
                Ok(false) => break,
                // The packets before it are sent first.
                Err(error) => {
                    broken = Err(error.into());
                    break;
                }
            }
            if is_taken(local_port, chain) {
                self.queue.add_used(chain.head, 0);
            } else if !is_packet(chain, dropped) {
                flow.charge(0);
                self.queue.add_used(chain.head, 0);
            } else {
                packets += 1;
            }
        }
        let sent = &self.chains[..packets];
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.send(sent, &mut self.results)
        {
            dropped.record(&DropReason::Write(error));
        }
        let (mut halt, mut any_sent) = (None, false);
        for (chain, &result) in sent.iter().zip(&self.results) {
            if result < 0 {
                let error = io::Error::from_raw_os_error(-result);
                if is_gone(&error) {
                    halt = Some(Halt::BackendGone);
                } else {
                    flow.charge(0);
                    dropped.record(&DropReason::Write(error));
                }
            } else {
                any_sent = true;
                flow.charge(chain.readable.len());
                flow.passed(chain.readable.len());
            }
            self.queue.add_used(chain.head, 0);
        }
        if any_sent {
            flow.called_since(since);
        }
        broken.map(|()| halt)
    }

    /// Notifies the driver of the packets taken since the last time, if it wants an interrupt for them.
    fn report(&mut self, unreported: &mut usize, link: &DriverLink) {
        if std::mem::take(unreported) > 0 {
            self.queue.notify_driver(link);
        }
    }
}

/// Whether the local endpoint has taken the packet in `chain`.
fn is_taken(local_port: &mut Option<LocalPort>, chain: &Chain) -> bool {
    local_port
        .as_mut()
        .is_some_and(|local_port| local_port.take(&chain.readable))
}

/// Whether `chain` holds a packet; otherwise that is recorded.
fn is_packet(chain: &Chain, dropped: &mut DroppedPackets) -> bool {
    let len = chain.readable.len();
    let is_packet = (PACKET_HEADER_SIZE..=MAX_PACKET_SIZE).contains(&len);
    if !is_packet {
        dropped.record(&DropReason::NoPacket(len));
    }
    is_packet
}

/// Sends the packet in `chain`, or drops it if it can be sent neither now nor later.
fn send(
    backend: &dyn NetQueue,
    chain: &mut Chain,
    flow: &mut Flow,
    since: &mut Instant,
    dropped: &mut DroppedPackets,
) -> Result<(), Halt> {
    if !is_packet(chain, dropped) {
        flow.charge(0);
        return Ok(());
    }
    let size = chain.readable.len();
    match backend.write(&mut chain.readable) {
        Ok(()) => {
            flow.charge(size);
            flow.passed(size);
            flow.called_since(since);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Halt::Backend),
        Err(error) if is_gone(&error) => Err(Halt::BackendGone),
        Err(error) => {
            // A driver could otherwise exceed the limits with packets that are refused.
            flow.charge(0);
            dropped.record(&DropReason::Write(error));
            Ok(())
        }
    }
}
