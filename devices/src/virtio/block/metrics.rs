//! The counters of a block device.

use std::time::Duration;

use bantam_metrics::{Counter, Latency, Times};
use serde::Serialize;

/// The work of a block device since the machine was built.
#[derive(Debug, Default, Serialize)]
pub struct BlockMetrics {
    /// Failed activations.
    pub activate_fails: Counter,
    /// Doorbells for which there was no request in the queue.
    pub no_avail_buffer: Counter,
    /// Events whose handling ended with the device asking for a reset.
    pub event_fails: Counter,
    /// Requests that the host failed.
    pub execute_fails: Counter,
    /// Requests that were refused: beyond the end of the disk, unknown, too large or otherwise wrong.
    pub invalid_reqs_count: Counter,
    /// Flushes that were done.
    pub flush_count: Counter,
    /// Times that the worker was woken for a queue: by the driver, or by itself for work that it had left.
    pub queue_event_count: Counter,
    /// Times that the worker was woken because a limit allowed more, or was changed.
    pub rate_limiter_event_count: Counter,
    /// Times that the image was replaced or its size was updated.
    pub update_count: Counter,
    /// Times that this failed.
    pub update_fails: Counter,
    /// Bytes that read requests have read.
    pub read_bytes: Counter,
    /// Bytes that write requests have written.
    pub write_bytes: Counter,
    /// Read requests that were done.
    pub read_count: Counter,
    /// Write requests that were done.
    pub write_count: Counter,
    /// How long read requests took, from when they were begun, alone or together with others, until the
    /// driver was told of them.
    pub read_agg: Latency,
    /// How long write requests took, measured in the same way.
    pub write_agg: Latency,
    /// Times that requests had to wait for a limit.
    pub rate_limiter_throttled_events: Counter,
    /// Times that requests had to wait because io_uring was full.
    pub io_engine_throttled_events: Counter,
    /// Requests left in their queue each time that the worker had to stop: because of a limit, because
    /// io_uring was full, or to give others their turn.
    pub remaining_reqs_count: Counter,
}

/// How a request is counted.
#[derive(Debug, Clone, Copy)]
pub(super) enum Work {
    /// A read of this many bytes.
    Read(u32),
    /// A write of this many bytes.
    Write(u32),
    Flush,
    Other,
}

/// Work that has yet to be added to the metrics.
#[derive(Default)]
pub(super) struct Tally {
    reads: Transfers,
    writes: Transfers,
    flushes: u64,
}

#[derive(Default)]
struct Transfers {
    count: u64,
    bytes: u64,
    /// How many requests of the current batch were done at once.
    in_batch: u32,
    times: Times,
}

impl Tally {
    /// Counts a completed request that took `time`, or as long as the current batch if that is not given.
    pub(super) fn done(&mut self, work: Work, time: Option<Duration>) {
        let (transfers, bytes) = match work {
            Work::Read(bytes) => (&mut self.reads, bytes),
            Work::Write(bytes) => (&mut self.writes, bytes),
            Work::Flush => {
                self.flushes += 1;
                return;
            }
            Work::Other => return,
        };
        transfers.count += 1;
        transfers.bytes += u64::from(bytes);
        match time {
            Some(time) => transfers.times.add(time, 1),
            None => transfers.in_batch += 1,
        }
    }

    /// Ends the current batch, which took `time`.
    pub(super) fn end_batch(&mut self, time: Duration) {
        for transfers in [&mut self.reads, &mut self.writes] {
            transfers
                .times
                .add(time, std::mem::take(&mut transfers.in_batch));
        }
    }

    /// Whether there is a batch that has not been ended.
    pub(super) fn has_batch(&self) -> bool {
        self.reads.in_batch > 0 || self.writes.in_batch > 0
    }

    /// Adds the counters to `metrics`.
    pub(super) fn report(&mut self, metrics: &BlockMetrics) {
        for (transfers, count, bytes, latency) in [
            (
                &mut self.reads,
                &metrics.read_count,
                &metrics.read_bytes,
                &metrics.read_agg,
            ),
            (
                &mut self.writes,
                &metrics.write_count,
                &metrics.write_bytes,
                &metrics.write_agg,
            ),
        ] {
            count.add(std::mem::take(&mut transfers.count));
            bytes.add(std::mem::take(&mut transfers.bytes));
            latency.record(&mut transfers.times);
        }
        metrics.flush_count.add(std::mem::take(&mut self.flushes));
    }
}
