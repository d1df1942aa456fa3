//! The socket device (section 5.10): connections between the guest and programs on the host, which use Unix
//! domain sockets.
//!
//! A program on the host that wants to reach port 52 of the guest connects to the device's socket and sends
//! `CONNECT 52` and a line feed. If the guest accepts the connection, the answer is `OK PORT`, with the port
//! of the host that the guest sees at the other end. If the guest connects to port 53 of CID 2, it reaches
//! the socket at the device's path with `_53` appended. This is the protocol of Firecracker. Only stream
//! sockets are offered.
//!
//! A packet of the guest goes from its buffers to the host's socket, and data from a program on the host goes
//! from the socket to the driver's buffers, without a copy in between. Only data that a program on the host
//! does not take at once is kept, and no more than the room announced to the guest. In the other direction
//! nothing is kept: data that the guest does not take stays in the host's socket.

mod connection;
mod credit;
mod error;
mod event_queue;
mod greeting;
mod metrics;
mod muxer;
mod packet;
mod receive;
mod source;
mod state;
mod stream;
mod table;
mod waiting;
mod worker;

use std::sync::Arc;

pub use metrics::VsockMetrics;

use bantam_state::{RestoreError, Section};

use super::{Activation, COMMON_FEATURES, ConfigSpace, VirtioDevice, device_id};
use crate::ListeningSocket;
use crate::worker::VirtioWorker;
use error::DriverError;
use worker::Worker;

/// Size of each queue.
const QUEUE_SIZE: u16 = 256;

/// The smallest CID that a guest can have: smaller ones have special meanings (section 5.10.4).
pub const MIN_GUEST_CID: u32 = 3;
/// The largest CID that a guest can have: the next one stands for any CID.
pub const MAX_GUEST_CID: u32 = u32::MAX - 1;

/// Longest suffix in bytes that the path of a port's socket adds to that of the device's socket.
pub const MAX_PORT_SUFFIX_SIZE: usize = "_4294967295".len();

/// The front of the socket device.
pub struct Vsock {
    guest_cid: u64,
    listener: Arc<ListeningSocket>,
    config: ConfigSpace,
    metrics: Arc<VsockMetrics>,
}

impl Vsock {
    /// Makes a device for the guest with this CID, from [`MIN_GUEST_CID`] to [`MAX_GUEST_CID`]. Programs on
    /// the host connect to `listener`; they wait until the guest's driver is ready. Its path must leave room
    /// for [`MAX_PORT_SUFFIX_SIZE`] more bytes.
    pub fn new(guest_cid: u32, listener: ListeningSocket) -> Vsock {
        let guest_cid = u64::from(guest_cid);
        Vsock {
            guest_cid,
            listener: Arc::new(listener),
            config: ConfigSpace::new(guest_cid.to_le_bytes().to_vec()),
            metrics: Arc::default(),
        }
    }

    /// What the device counts.
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        self.metrics.clone()
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        device_id::SOCKET
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// The CID need not be the one that was saved.
    fn restore(&mut self, config: &[u8], _state: Option<&Section>) -> Result<(), RestoreError> {
        if config.len() == size_of_val(&self.guest_cid) {
            return Ok(());
        }
        Err(RestoreError::Invalid {
            kind: "socket device".to_owned(),
            reason: format!("its configuration space has {} bytes", config.len()),
        })
    }

    /// A driver reads the CID again when it is told that its connections have ended (section 5.10.6.7).
    fn config_restored(&self) {
        self.config.write(0, &self.guest_cid.to_le_bytes());
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String> {
        let (listener, metrics) = (self.listener.clone(), self.metrics.clone());
        match Worker::new(self.guest_cid, listener, metrics, activation) {
            Ok(worker) => Ok(Box::new(worker)),
            Err(reason) => {
                self.metrics.activate_fails.add(1);
                Err(reason)
            }
        }
    }
}

#[cfg(test)]
mod tests;
