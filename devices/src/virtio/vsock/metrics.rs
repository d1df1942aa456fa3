//! The counters of the device.

use bantam_metrics::Counter;
use serde::Serialize;

/// The work of a socket device. "Received" is what the guest receives, and "transmitted" what it
/// transmits.
#[derive(Debug, Default, Serialize)]
pub struct VsockMetrics {
    /// Failed activations.
    pub activate_fails: Counter,
    /// Breaches of the rules in the receive queue, each of which needs a reset.
    pub rx_queue_event_fails: Counter,
    /// The same in the transmit queue.
    pub tx_queue_event_fails: Counter,
    /// Failures to accept a program on the host.
    pub muxer_event_fails: Counter,
    /// Connections that could not be watched by the event loop, which ended them.
    pub conn_event_fails: Counter,
    /// Times that the receive queue was served because its doorbell was rung, or to continue work that was
    /// too much for one turn.
    pub rx_queue_event_count: Counter,
    /// The same for the transmit queue.
    pub tx_queue_event_count: Counter,
    /// Bytes of data received.
    pub rx_bytes_count: Counter,
    /// Bytes of data transmitted.
    pub tx_bytes_count: Counter,
    /// Packets received, including those without data.
    pub rx_packets_count: Counter,
    /// Packets transmitted, including those without data.
    pub tx_packets_count: Counter,
    /// Connections begun: requested of the guest, or requested by it and accepted by a program on the host.
    pub conns_added: Counter,
    /// Connections that ended otherwise than by both sides shutting them down: refused, reset by one side, or
    /// too slow to begin or end.
    pub conns_killed: Counter,
    /// Connections ended in any way.
    pub conns_removed: Counter,
    /// Failures to send data that had waited for a program on the host, and was lost.
    pub tx_flush_fails: Counter,
    /// Failures to send data directly to a program on the host.
    pub tx_write_fails: Counter,
    /// Failures to read from a program on the host.
    pub rx_read_fails: Counter,
}
