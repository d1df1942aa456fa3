//! What a block device counts.

use std::time::Duration;

use bantam_metrics::{Counter, Latency, Times};
use serde::Serialize;

/// The work of a block device since the machine was built.
#[derive(Debug, Default, Serialize)]
pub struct BlockMetrics {
    /// Drivers that the device could not begin to work for.
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
    /// Times that the worker was woken for a queue: by the driver, or by itself for what it had put
    /// off.
    pub queue_event_count: Counter,
    /// Times that the worker was woken as a limit allowed more, or was changed.
    pub rate_limiter_event_count: Counter,
    /// Times that the image was replaced or measured anew.
    pub update_count: Counter,
    /// Times that this failed.
    pub update_fails: Counter,
    /// Bytes that read requests were given.
    pub read_bytes: Counter,
    /// Bytes that write requests have written.
    pub write_bytes: Counter,
    /// Read requests that were done.
    pub read_count: Counter,
    /// Write requests that were done.
    pub write_count: Counter,
    /// How long these read requests took, from when they were begun, alone or together with others,
    /// until the driver was told of them.
    pub read_agg: Latency,
    /// The same of write requests.
    pub write_agg: Latency,
    /// Times that requests had to wait for a limit.
    pub rate_limiter_throttled_events: Counter,
    /// Times that requests had to wait as io_uring had as many as it takes.
    pub io_engine_throttled_events: Counter,
    /// Requests that were left in their queue each time that the worker had to stop, for a limit, for
    /// io_uring or as others had their turn.
    pub remaining_reqs_count: Counter,
}

/// What a request is counted as.
#[derive(Debug, Clone, Copy)]
pub(super) enum Work {
    /// Of so many bytes, as is the next.
    Read(u32),
    Write(u32),
    Flush,
    Other,
}

/// What was done since the worker last told the metrics of it.
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
    /// How many of them were done at once in the batch that is being begun.
    in_batch: u32,
    times: Times,
}

impl Tally {
    /// Counts a request that was done, which took `time`. Where none is given, it is that of the batch.
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

    /// Takes account of how long the batch took.
    pub(super) fn end_batch(&mut self, time: Duration) {
        for transfers in [&mut self.reads, &mut self.writes] {
            transfers
                .times
                .add(time, std::mem::take(&mut transfers.in_batch));
        }
    }

    /// Whether a batch has not been ended.
    pub(super) fn has_batch(&self) -> bool {
        self.reads.in_batch > 0 || self.writes.in_batch > 0
    }

    /// Tells `metrics` of it all.
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
