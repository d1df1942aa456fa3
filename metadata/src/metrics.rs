//! Counters of the metadata services.

use bantam_metrics::Counter;
use serde::Serialize;

/// Counters of all services of one machine together.
#[derive(Debug, Default, Serialize)]
pub struct MetadataMetrics {
    /// Frames of the guest that were taken from its network device.
    pub rx_accepted: Counter,
    /// Accepted frames that were dropped: malformed, too large, or with no room for an answer.
    pub rx_accepted_err: Counter,
    /// Accepted frames that were dropped because they were neither ARP nor whole TCP segments.
    pub rx_accepted_unusual: Counter,
    /// Packets of the guest, on a device with a service, that were too short for an Ethernet header.
    pub rx_bad_eth: Counter,
    /// Requests with a token that is not valid.
    pub rx_invalid_token: Counter,
    /// Requests without a token.
    pub rx_no_token: Counter,
    /// Frames of the guest that were processed.
    pub rx_count: Counter,
    /// Bytes of the frames that the guest has received.
    pub tx_bytes: Counter,
    /// Frames that were made for the guest.
    pub tx_count: Counter,
    /// Frames for the guest that were too large for its driver's buffers.
    pub tx_errors: Counter,
    /// Frames that the guest has received.
    pub tx_frames: Counter,
    /// Connections that the guest has begun.
    pub connections_created: Counter,
    /// Connections that have ended, for any reason.
    pub connections_destroyed: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_named_as_others_name_them() {
        let metrics = serde_json::to_value(MetadataMetrics::default()).unwrap();
        let names: Vec<_> = metrics.as_object().unwrap().keys().collect();
        assert_eq!(
            names,
            [
                "connections_created",
                "connections_destroyed",
                "rx_accepted",
                "rx_accepted_err",
                "rx_accepted_unusual",
                "rx_bad_eth",
                "rx_count",
                "rx_invalid_token",
                "rx_no_token",
                "tx_bytes",
                "tx_count",
                "tx_errors",
                "tx_frames",
            ]
        );
    }
}
