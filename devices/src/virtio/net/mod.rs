//! The network device (section 5.1) over a tap or another backend.
//!
//! A tap uses the packet format of virtio, header included, so the host's kernel copies each packet directly
//! between its own memory and the guest's: the bytes never pass through the monitor's memory.

mod backend;
mod config;
mod control_queue;
mod dhcp_checksum;
mod dropped;
mod error;
mod expected_size;
mod filter;
mod flow;
mod handle;
mod local_endpoint;
mod local_port;
mod metrics;
mod offloads;
mod overflow;
mod packet_ring;
mod receive;
mod receive_slot;
mod reconnection;
mod ring_store;
mod shared;
mod state;
mod stream_backend;
mod tap_backend;
#[cfg(test)]
mod tests;
mod transmit;
mod turn;
mod worker;

use std::io;
use std::sync::Arc;

use bantam_state::{RestoreError, Section};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::{Activation, COMMON_FEATURES, ConfigSpace, VirtioDevice, device_id};
use crate::worker::VirtioWorker;
use config::{
    MacAddress, asks_for_announcement, config_space, has_link, is_station_address, mac,
    set_announce, set_link, set_mac,
};
use error::DriverError;
use local_port::LocalPort;
use offloads::{GUEST_OFFLOADS, GUEST_SEGMENTATION, offload_features, offloads};
use ring_store::RingStore;
use shared::Shared;
use turn::{
    Halt, MAX_FRAME_HEADER_SIZE, MAX_PACKET_SIZE, MAX_PACKETS_PER_TURN, PACKETS_PER_INTERRUPT,
};
use worker::Worker;

pub use backend::{NetBackend, NetQueue, PacketBuffer};
pub use handle::NetHandle;
pub use local_endpoint::{FRAME_START_SIZE, LocalEndpoint, LocalService};
pub use metrics::NetMetrics;
pub use shared::NetLimits;
pub use stream_backend::FrameStream;

/// Size of each queue. It is the same for the control queue, whose index depends on the driver.
const QUEUE_SIZE: u16 = 256;

/// The MTU of a device that does not report one.
const DEFAULT_MTU: u16 = 1500;

/// The front of a network device.
pub struct Net {
    rings: Arc<RingStore>,
    features: u64,
    queue_sizes: Vec<u16>,
    mtu: u16,
    /// The address that the card has until a driver gives it another.
    mac: MacAddress,
    config: Arc<ConfigSpace>,
    shared: Arc<Shared>,
    service: Option<LocalService>,
}

impl Net {
    /// Makes a network card with the address `mac` that is connected to `backend`, with a pair of queues for
    /// each queue of the backend. The driver is told `mtu`, in bytes, if it is given. Frames that `service` claims go
    /// there and not to the backend.
    ///
    /// # Errors
    /// When the host has no timers for the limits.
    pub fn new(
        backend: Arc<dyn NetBackend>,
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
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
            | offload_features(backend.offloads(), backend.takes_unfinished_packets());
        if mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let pair_count = backend.queue_count();
        if pair_count > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        let mtu = mtu.unwrap_or(DEFAULT_MTU);
        Ok(Net {
            rings: Arc::new(RingStore::new(backend)),
            features,
            queue_sizes: vec![QUEUE_SIZE; 2 * pair_count + 1],
            mtu,
            mac,
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
        let backend = self.rings.backend();
        backend
            .set_offloads(offloads(activation.features))
            .map_err(|error| format!("cannot set the offloads of {}: {error}", backend.label()))?;
        let connect = |service: &LocalService| {
            LocalPort::new(service, self.mtu)
                .map_err(|error| format!("cannot create {}: {error}", service.name()))
        };
        let local_port = self.service.as_ref().map(connect).transpose()?;
        Worker::new(
            self.rings.clone(),
            self.mtu,
            self.mac,
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

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        match self.worker(activation) {
            Ok(worker) => Ok(Box::new(worker)),
            Err(reason) => {
                self.shared.metrics.activate_fails.add(1);
                self.reset();
                Err(reason)
            }
        }
    }

    fn reset(&mut self) {
        set_mac(&self.config, self.mac);
        set_announce(&self.config, false);
    }

    fn restore(&mut self, config: &[u8], _state: Option<&Section>) -> Result<(), RestoreError> {
        let saved = ConfigSpace::new(config.to_vec());
        let address = mac(&saved);
        // All else is the same for every driver.
        let possible = ConfigSpace::new(self.config.save().0);
        set_mac(&possible, address);
        set_announce(&possible, asks_for_announcement(&saved));
        set_link(&possible, has_link(&saved));
        let fits = possible.save().0 == config;
        if fits && (address == self.mac || is_station_address(address)) {
            return Ok(());
        }
        Err(RestoreError::Invalid {
            kind: "net".to_owned(),
            reason: format!("its configuration space is {config:02x?}"),
        })
    }
}
