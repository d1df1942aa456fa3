//! The network device (section 5.1) over a tap.
//!
//! A tap that speaks of packets as virtio does, header included, lets the host's kernel copy each
//! between its own memory and the guest's: the bytes never pass through the monitor's.

mod config;
mod control_queue;
mod dhcp_checksum;
mod dropped;
mod expected_size;
mod filter;
mod flow;
mod handle;
mod local_endpoint;
mod local_port;
mod metrics;
mod packet_ring;
mod receive;
mod receive_slot;
mod shared;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use super::{Activation, COMMON_FEATURES, ConfigSpace, QueueError, VirtioDevice, device_id};
use crate::event_loop::Subscriber;
use crate::tap::{Offloads, PACKET_HEADER_SIZE, Tap};
use config::config_space;
use local_port::LocalPort;
use shared::Shared;
use worker::Worker;

pub use handle::NetHandle;
pub use local_endpoint::{FRAME_START_SIZE, LocalEndpoint, LocalService};
pub use metrics::NetMetrics;
pub use shared::NetLimits;

/// Of each queue, the control queue too: which of them that is depends on the driver.
const QUEUE_SIZE: u16 = 256;

/// Most packets handled before other devices have their turn.
const MAX_PACKETS_PER_TURN: usize = 256;
/// After so many packets the driver hears of them, so that it has work while the turn goes on.
const PACKETS_PER_INTERRUPT: usize = 64;

/// Most bytes before the payload of a frame: an Ethernet header with a VLAN tag.
const MAX_FRAME_HEADER_SIZE: usize = 14 + 4;
/// Largest packet of all in bytes: one that is still to be segmented, with its headers.
const MAX_PACKET_SIZE: usize = PACKET_HEADER_SIZE + MAX_FRAME_HEADER_SIZE + (64 << 10);
/// The MTU of a device that does not say which it has.
const DEFAULT_MTU: u16 = 1500;

/// Of the features, those by which the driver says what it does to packets that it receives.
const GUEST_SEGMENTATION: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;
/// Those that the driver may switch off and on again with `CTRL_GUEST_OFFLOADS`
/// (section 5.1.6.5.6).
const GUEST_OFFLOADS: u64 =
    GUEST_SEGMENTATION | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_ECN;

/// The front of a network device.
pub struct Net {
    tap: Arc<Tap>,
    features: u64,
    queue_sizes: Vec<u16>,
    mtu: u16,
    config: Arc<ConfigSpace>,
    shared: Arc<Shared>,
    service: Option<LocalService>,
}

impl Net {
    /// A network card with the address `mac`, cabled to `tap`, with as many pairs of queues as that
    /// has queues. The driver is told `mtu`, in bytes, where it is given. Frames that
    /// `service` claims go there and not to the tap.
    ///
    /// # Errors
    /// When the host has no timers for the limits.
    pub fn new(
        tap: Tap,
        mac: [u8; 6],
        mtu: Option<u16>,
        limits: &NetLimits,
        service: Option<LocalService>,
    ) -> io::Result<Net> {
        let mut features = COMMON_FEATURES
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_CTRL_RX
            | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
            | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
            | offload_features(tap.offloads());
        if mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let pair_count = tap.queues().len();
        if pair_count > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        let mtu = mtu.unwrap_or(DEFAULT_MTU);
        Ok(Net {
            tap: Arc::new(tap),
            features,
            queue_sizes: vec![QUEUE_SIZE; 2 * pair_count + 1],
            mtu,
            config: Arc::new(config_space(mac, pair_count as u16, mtu)),
            service,
            shared: Arc::new(Shared::new(limits)?),
        })
    }

    /// A handle to the device for the owner of the machine.
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            shared: self.shared.clone(),
        }
    }

    fn worker(&self, activation: Activation) -> Result<Worker, String> {
        self.tap
            .set_offloads(offloads(activation.features))
            .map_err(|error| {
                format!(
                    "cannot set the offloads of tap '{}': {error}",
                    self.tap.name()
                )
            })?;
        let connect = |service: &LocalService| {
            LocalPort::new(service, self.mtu)
                .map_err(|error| format!("cannot create {}: {error}", service.name()))
        };
        let local_port = self.service.as_ref().map(connect).transpose()?;
        Worker::new(
            self.tap.clone(),
            self.mtu,
            self.config.clone(),
            self.shared.clone(),
            local_port,
            activation,
        )
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
        &self.queue_sizes
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, String> {
        match self.worker(activation) {
            Ok(worker) => Ok(Box::new(worker)),
            Err(reason) => {
                self.shared.metrics.activate_fails.add(1);
                Err(reason)
            }
        }
    }
}

/// What is offered to the driver over a host that knows `offloads`. What the driver may leave to
/// the host, the host takes in any case, but for UDP, which it came to know together.
fn offload_features(offloads: Offloads) -> u64 {
    let mut features = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_ECN;
    for (known, bits) in [
        (
            offloads.checksum,
            1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ),
        (offloads.tcp4_segmentation, 1 << VIRTIO_NET_F_GUEST_TSO4),
        (offloads.tcp6_segmentation, 1 << VIRTIO_NET_F_GUEST_TSO6),
        (offloads.ecn, 1 << VIRTIO_NET_F_GUEST_ECN),
        (
            offloads.udp_segmentation,
            1 << VIRTIO_NET_F_GUEST_USO4
                | 1 << VIRTIO_NET_F_GUEST_USO6
                | 1 << VIRTIO_NET_F_HOST_USO,
        ),
    ] {
        if known {
            features |= bits;
        }
    }
    features
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

/// What makes the device unusable until it is reset.
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
    #[error("the command at {head} has no byte for its answer")]
    NoRoomForAnswer { head: u16 },
    #[error("cannot set the timer of its limits: {0}")]
    Timer(#[from] io::Error),
}

/// Why one direction of the traffic has come to a halt, and so when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Halt {
    /// The driver has no more for it in its queue; it rings the doorbell.
    Driver,
    /// The tap has no more packets, or takes no more; it becomes ready.
    Tap,
    /// A limit is reached; the timer ends.
    Limit,
    /// The tap has been removed.
    TapGone,
}
