//! The counters of the device.

use bantam_metrics::Counter;
use serde::Serialize;

/// The work of a console device since the machine was built, all its ports together.
#[derive(Debug, Default, Serialize)]
pub struct ConsoleMetrics {
    /// Failed activations.
    pub activate_fails: Counter,
    /// Breaches of the rules by the driver, each of which needs a reset.
    pub event_fails: Counter,
    /// Bytes that the guest received.
    pub rx_bytes_count: Counter,
    /// Bytes that the guest transmitted and the host took.
    pub tx_bytes_count: Counter,
    /// Bytes that the guest transmitted while nobody was there to take them.
    pub tx_dropped_bytes: Counter,
    /// Clients that connected to a socket.
    pub clients_count: Counter,
    /// Times that a client could not be accepted, or the event loop could not watch it.
    pub client_fails: Counter,
}
