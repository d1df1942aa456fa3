//! One direction of a card's traffic: its limits and its counters.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bantam_metrics::{Counter, Times};

use super::shared::{Direction, Shared};
use crate::tap::PACKET_HEADER_SIZE;
use crate::virtio::Throttle;

/// A direction's limits, which are asked before a packet passes, and counters, which are told afterwards.
pub(super) struct Flow {
    shared: Arc<Shared>,
    direction: Direction,
    /// Packets that have yet to be added to the metrics.
    packets: u64,
    bytes: u64,
    calls: u64,
    times: Times,
}

impl Flow {
    pub(super) fn new(shared: Arc<Shared>, direction: Direction) -> Flow {
        Flow {
            shared,
            direction,
            packets: 0,
            bytes: 0,
            calls: 0,
            times: Times::default(),
        }
    }

    pub(super) fn throttle(&self) -> &Throttle {
        self.shared.throttle(self.direction)
    }

    /// Returns how many of `batch` packets may pass together: just one if there are limits, so that these are
    /// kept.
    pub(super) fn batch(&self, batch: usize) -> usize {
        if self.throttle().is_limited() {
            batch.min(1)
        } else {
            batch
        }
    }

    /// Whether a packet may pass now. If not, the worker is woken once one may.
    ///
    /// # Errors
    /// If the host refuses to set the timer.
    pub(super) fn allows_more(&self) -> io::Result<bool> {
        let allowed = self.throttle().allows_more()?;
        if !allowed {
            self.throttled().add(1);
        }
        Ok(allowed)
    }

    /// Charges a packet of `size` bytes, header included, to the limits.
    pub(super) fn charge(&self, size: usize) {
        self.throttle().count(1, frame_size(size));
    }

    /// Counts a packet of `size` bytes, header included, that has reached the other side.
    pub(super) fn passed(&mut self, size: usize) {
        self.packets += 1;
        self.bytes += frame_size(size);
    }

    /// Counts a call that has passed packets.
    pub(super) fn called(&mut self) {
        self.calls += 1;
    }

    /// Counts a call like [`Flow::called`], and its time: its preparation began at `since`, which is set to
    /// its end.
    pub(super) fn called_since(&mut self, since: &mut Instant) {
        let now = Instant::now();
        self.times.add(now.duration_since(*since), 1);
        *since = now;
        self.calls += 1;
    }

    /// Adds the counters to the metrics.
    pub(super) fn report(&mut self) {
        let metrics = &self.shared.metrics;
        let (packets, bytes, calls) = match self.direction {
            Direction::Receive => (
                &metrics.rx_packets_count,
                &metrics.rx_bytes_count,
                &metrics.rx_count,
            ),
            Direction::Transmit => (
                &metrics.tx_packets_count,
                &metrics.tx_bytes_count,
                &metrics.tx_count,
            ),
        };
        packets.add(std::mem::take(&mut self.packets));
        bytes.add(std::mem::take(&mut self.bytes));
        calls.add(std::mem::take(&mut self.calls));
        metrics.tap_write_agg.record(&mut self.times);
    }

    fn throttled(&self) -> &Counter {
        let metrics = &self.shared.metrics;
        match self.direction {
            Direction::Receive => &metrics.rx_rate_limiter_throttled,
            Direction::Transmit => &metrics.tx_rate_limiter_throttled,
        }
    }
}

fn frame_size(size: usize) -> u64 {
    size.saturating_sub(PACKET_HEADER_SIZE) as u64
}
