//! The network device (section 5.1) over a tap.
//!
//! A tap that speaks of packets as virtio does, header included, lets the host's kernel copy each
//! between its own memory and the guest's: the bytes never pass through the monitor's.

mod dropped;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::os::fd::RawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use super::{
    Activation, COMMON_FEATURES, QueueError, VirtQueue, VirtioDevice, VirtioInterrupt, device_id,
};
use crate::event_loop::Subscriber;
use crate::tap::{Offloads, PACKET_HEADER_SIZE, Tap};
use dropped::DroppedPackets;
use receive::Receiver;
use transmit::Transmitter;

const QUEUE_SIZE: u16 = 256;

/// Most bytes before the payload of a frame: an Ethernet header with a VLAN tag.
const MAX_FRAME_HEADER_SIZE: usize = 14 + 4;
/// Largest packet of all in bytes: one that is still to be segmented, with its headers.
const MAX_PACKET_SIZE: usize = PACKET_HEADER_SIZE + MAX_FRAME_HEADER_SIZE + (64 << 10);
/// The MTU of a device that does not say which it has.
const DEFAULT_MTU: u16 = 1500;

/// Offsets in the configuration space (section 5.1.4). The status and the number of queue pairs
/// between these two belong to features that are not offered.
mod config {
    pub const MAC: usize = 0;
    pub const MTU: usize = 10;
    pub const SIZE: usize = 12;
}

/// Of the features, those by which the driver says what it does to packets that it receives.
const GUEST_SEGMENTATION: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// The front of a network device.
pub struct Net {
    tap: Arc<Tap>,
    features: u64,
    mtu: u16,
    config: [u8; config::SIZE],
}

impl Net {
    /// A network card with the address `mac`, cabled to `tap`. The driver is told `mtu`, in bytes,
    /// where it is given.
    pub fn new(tap: Tap, mac: [u8; 6], mtu: Option<u16>) -> Net {
        let mut features = COMMON_FEATURES
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_ECN
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
            | 1 << VIRTIO_NET_F_MRG_RXBUF;
        if tap.segments_udp() {
            features |= 1 << VIRTIO_NET_F_GUEST_USO4
                | 1 << VIRTIO_NET_F_GUEST_USO6
                | 1 << VIRTIO_NET_F_HOST_USO;
        }
        let mut space = [0; config::SIZE];
        space[config::MAC..][..mac.len()].copy_from_slice(&mac);
        if let Some(mtu) = mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            space[config::MTU..].copy_from_slice(&mtu.to_le_bytes());
        }
        Net {
            tap: Arc::new(tap),
            features,
            mtu: mtu.unwrap_or(DEFAULT_MTU),
            config: space,
        }
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        device_id::NETWORK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, String> {
        self.tap
            .set_offloads(offloads(activation.features))
            .map_err(|error| {
                format!(
                    "cannot set the offloads of tap '{}': {error}",
                    self.tap.name()
                )
            })?;
        Ok(Box::new(Worker::new(
            self.tap.clone(),
            self.mtu,
            activation,
        )?))
    }
}

/// What the host may leave to the driver.
fn offloads(features: u64) -> Offloads {
    let negotiated = |feature: u32| features & 1 << feature != 0;
    Offloads {
        checksum: negotiated(VIRTIO_NET_F_GUEST_CSUM),
        tcp4_segmentation: negotiated(VIRTIO_NET_F_GUEST_TSO4),
        tcp6_segmentation: negotiated(VIRTIO_NET_F_GUEST_TSO6),
        ecn: negotiated(VIRTIO_NET_F_GUEST_ECN),
        udp_segmentation: negotiated(VIRTIO_NET_F_GUEST_USO4)
            && negotiated(VIRTIO_NET_F_GUEST_USO6),
    }
}

/// What a driver did that makes the device unusable until it is reset.
#[derive(Debug, thiserror::Error)]
enum DriverError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(
        "the descriptor chain at {head} is no receive buffer: it has {readable} bytes to read and \
         {writable} to write"
    )]
    ReceiveBuffer {
        head: u16,
        readable: usize,
        writable: usize,
    },
}

/// Why one direction of the traffic has come to a halt, and so when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Halt {
    /// The driver has no more for it in its queue; it rings the doorbell.
    Driver,
    /// The tap has no more packets, or takes no more; it becomes ready.
    Tap,
    /// The tap has been removed.
    TapGone,
}

struct Worker {
    tap: Arc<Tap>,
    /// Whether the tap has been removed from the host. Packets of the guest then go nowhere, as
    /// from a card whose cable is pulled.
    tap_is_gone: bool,
    receiver: Receiver,
    transmitter: Transmitter,
    receive_halt: Halt,
    transmit_halt: Halt,
    /// What the event loop watches the tap for, if it does.
    watched: Option<EventSet>,
    dropped: DroppedPackets,
    interrupt: Arc<VirtioInterrupt>,
}

impl Worker {
    fn new(tap: Arc<Tap>, mtu: u16, activation: Activation) -> Result<Worker, String> {
        let Ok([receive_queue, transmit_queue]) = <[VirtQueue; 2]>::try_from(activation.queues)
        else {
            return Err("a network device without a control queue has two queues".to_string());
        };
        let largest_packet = if activation.features & GUEST_SEGMENTATION != 0 {
            MAX_PACKET_SIZE
        } else {
            PACKET_HEADER_SIZE + MAX_FRAME_HEADER_SIZE + usize::from(mtu)
        };
        let merges_buffers = activation.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        Ok(Worker {
            dropped: DroppedPackets::new(activation.interrupt.clone(), tap.name()),
            tap,
            tap_is_gone: false,
            receiver: Receiver::new(
                receive_queue,
                &activation.memory,
                merges_buffers,
                largest_packet,
            ),
            transmitter: Transmitter::new(transmit_queue, &activation.memory),
            receive_halt: Halt::Driver,
            transmit_halt: Halt::Driver,
            watched: None,
            interrupt: activation.interrupt,
        })
    }

    fn handle(&mut self, fd: RawFd, ready: EventSet) -> Result<(), DriverError> {
        if fd == self.receiver.doorbell() {
            return self.receive();
        }
        if fd == self.transmitter.doorbell() {
            return self.transmit();
        }
        if ready.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            self.lose_tap();
        }
        if ready.contains(EventSet::IN) {
            self.receive()?;
        }
        if self.transmit_halt == Halt::Tap {
            self.transmit()?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), DriverError> {
        if self.tap_is_gone {
            return Ok(());
        }
        self.receive_halt = self
            .receiver
            .receive(&self.tap, &self.interrupt, &mut self.dropped)?;
        if self.receive_halt == Halt::TapGone {
            self.lose_tap();
        }
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), DriverError> {
        let tap = (!self.tap_is_gone).then_some(&*self.tap);
        self.transmit_halt = self
            .transmitter
            .transmit(tap, &self.interrupt, &mut self.dropped)?;
        if self.transmit_halt == Halt::TapGone {
            self.lose_tap();
            self.transmit()?;
        }
        Ok(())
    }

    fn lose_tap(&mut self) {
        if !std::mem::replace(&mut self.tap_is_gone, true) {
            self.interrupt.warn(format_args!(
                "tap '{}' has been removed; the guest has no network on this card until the \
                 machine is started anew",
                self.tap.name()
            ));
        }
    }

    /// Has the event loop watch the tap for what is waited for. An error of the tap is reported
    /// even while nothing is, so it is watched no more once it has been removed, nor while the
    /// device needs a reset.
    fn watch_tap(&mut self, operations: &mut EventOps<'_>) {
        let wanted = if self.tap_is_gone || self.interrupt.needs_reset() {
            None
        } else {
            let mut readiness = EventSet::empty();
            readiness.set(EventSet::IN, self.receive_halt == Halt::Tap);
            readiness.set(EventSet::OUT, self.transmit_halt == Halt::Tap);
            Some(readiness)
        };
        if wanted == self.watched {
            return;
        }
        let tap = &*self.tap;
        let done = match (self.watched, wanted) {
            (None, Some(readiness)) => operations.add(Events::new(tap, readiness)),
            (_, Some(readiness)) => operations.modify(Events::new(tap, readiness)),
            (_, None) => operations.remove(Events::empty(tap)),
        };
        self.watched = wanted;
        if let Err(error) = done {
            self.interrupt.need_reset(&error);
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        for doorbell in [self.receiver.doorbell(), self.transmitter.doorbell()] {
            if let Err(error) = operations.add(Events::new_raw(doorbell, EventSet::IN)) {
                self.interrupt.need_reset(&error);
            }
        }
        self.watch_tap(operations);
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if events.fd() == self.receiver.doorbell() {
            self.receiver.clear_doorbell();
        } else if events.fd() == self.transmitter.doorbell() {
            self.transmitter.clear_doorbell();
        }
        if !self.interrupt.needs_reset()
            && let Err(error) = self.handle(events.fd(), events.event_set())
        {
            self.interrupt.need_reset(&error);
        }
        self.watch_tap(operations);
    }
}

/// The next driver may not take what this one did, so no packet is left to it that was queued
/// for this one.
impl Drop for Worker {
    fn drop(&mut self) {
        if self.tap_is_gone {
            return;
        }
        if let Err(error) = self.tap.set_offloads(Offloads::default()) {
            self.interrupt.warn(format_args!(
                "cannot clear the offloads of its tap: {error}"
            ));
        }
        self.tap.discard_queued();
    }
}
