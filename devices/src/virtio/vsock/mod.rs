//! The socket device (section 5.10): connections between the guest and programs of the host, which
//! see Unix domain sockets.
//!
//! A program of the host that wants to reach port 52 of the guest connects to the device's socket
//! and sends `CONNECT 52` and a line feed. If the guest takes the connection, the answer is
//! `OK PORT`, with the port of the host that the guest sees at the other end. What the guest connects
//! to, port 53 of CID 2, leads to the socket whose path is the device's with `_53` behind it. This
//! is the protocol of Firecracker. Only stream sockets are offered.
//!
//! A packet of the guest goes from its buffers to the host's socket, and what a program of the host
//! sends goes from the socket to the driver's buffers, without a copy in between. Only what a
//! program of the host does not take at once is kept, and no more than the guest is told that there
//! is room for. In the other direction nothing is kept: what the guest does not take stays in the
//! host's socket.

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

/// The least CID that a guest can have: those before it have meanings of their own (section 5.10.4).
pub const MIN_GUEST_CID: u32 = 3;
/// The greatest, as the one after it stands for any.
pub const MAX_GUEST_CID: u32 = u32::MAX - 1;

/// How much longer than the path of the device's socket that of a port's can be, in bytes.
pub const MAX_PORT_SUFFIX_SIZE: usize = "_4294967295".len();

/// The front of the socket device.
pub struct Vsock {
    guest_cid: u64,
    listener: Arc<ListeningSocket>,
    config: ConfigSpace,
    metrics: Arc<VsockMetrics>,
}

impl Vsock {
    /// A device for the guest with this CID, [`MIN_GUEST_CID`] to [`MAX_GUEST_CID`]. Programs of
    /// the host connect to `listener`; they wait until the guest's driver is ready. Its path must
    /// leave room for [`MAX_PORT_SUFFIX_SIZE`] more bytes.
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

    /// The CID is part of how the device is configured.
    fn restore(&mut self, config: &[u8], _state: Option<&Section>) -> Result<(), RestoreError> {
        if config == self.guest_cid.to_le_bytes() {
            return Ok(());
        }
        Err(RestoreError::Invalid {
            kind: "socket device".to_owned(),
            reason: format!("it is not that of a guest with CID {}", self.guest_cid),
        })
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
