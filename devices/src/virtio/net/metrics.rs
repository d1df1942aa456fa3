//! The counters of a network device.

use bantam_metrics::{Counter, Latency};
use serde::Serialize;

/// The work of a network device since the machine was built. Bytes are those of Ethernet frames, without the
/// virtio header.
#[derive(Debug, Default, Serialize)]
pub struct NetMetrics {
    /// Failed activations.
    pub activate_fails: Counter,
    /// Times that the driver changed the card's address.
    pub mac_address_updates: Counter,
    /// Times that reception stopped because the driver had no more buffers.
    pub no_rx_avail_buffer: Counter,
    /// Times that the worker was woken to transmit and found nothing in the queue.
    pub no_tx_avail_buffer: Counter,
    /// Events whose handling ended with the device asking for a reset.
    pub event_fails: Counter,
    /// Times that the worker was woken for a receive queue.
    pub rx_queue_event_count: Counter,
    /// Times that the worker was woken because a limit allowed it to receive more, or was changed.
    pub rx_event_rate_limiter_count: Counter,
    /// Times that reception was held up by a limit.
    pub rx_rate_limiter_throttled: Counter,
    /// Times that the worker was woken because the tap had packets, or room for some.
    pub rx_tap_event_count: Counter,
    /// Bytes of the packets that the driver received.
    pub rx_bytes_count: Counter,
    /// Packets that the driver received.
    pub rx_packets_count: Counter,
    /// Packets that were lost on their way to the driver.
    pub rx_fails: Counter,
    /// Reads of the tap that returned one or more packets.
    pub rx_count: Counter,
    /// Reads of the tap that failed.
    pub tap_read_fails: Counter,
    /// Writes to the tap that failed.
    pub tap_write_fails: Counter,
    /// Bytes of the packets that were sent.
    pub tx_bytes_count: Counter,
    /// Buffers that the driver sent that were not packets.
    pub tx_malformed_frames: Counter,
    /// Packets of the driver that were lost.
    pub tx_fails: Counter,
    /// Writes to the tap that sent one or more packets.
    pub tx_count: Counter,
    /// Packets that were sent.
    pub tx_packets_count: Counter,
    /// Times that the worker was woken for a transmit queue: by the driver, or by itself for work that it had
    /// left.
    pub tx_queue_event_count: Counter,
    /// Times that the worker was woken because a limit allowed it to transmit more, or was changed.
    pub tx_rate_limiter_event_count: Counter,
    /// Times that packets had to wait in their queue for a limit.
    pub tx_rate_limiter_throttled: Counter,
    /// Packets left in a transmit queue each time that the worker stopped serving it.
    pub tx_remaining_reqs_count: Counter,
    /// Attempts of the guest to reach something that its user network keeps from it.
    pub refused_count: Counter,
    /// Attempts of the guest to open a connection that got no answer because its user network has too many.
    pub delayed_count: Counter,
    /// How long writes to the tap took, including taking their packets from the queue.
    pub tap_write_agg: Latency,
}
