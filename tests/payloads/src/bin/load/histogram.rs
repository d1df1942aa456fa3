//! A histogram of the durations of operations. Its steps grow with the durations, so that each is
//! known to 1.6 %, in memory of a fixed size.

use alloc::boxed::Box;
use alloc::vec;

/// Steps between a power of two and the next.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.ilog2();
/// Times of 2 to the power of this and more, in ticks, count as one: minutes.
const MAX_BITS: u32 = 40;
const BUCKETS: usize = ((MAX_BITS - STEP_BITS + 1) as u64 * STEPS) as usize;

/// Times in ticks of the time stamp counter.
pub struct Histogram {
    counts: Box<[u32]>,
    total: u64,
}

impl Histogram {
    /// Makes an empty histogram.
    pub fn new() -> Self {
        Self {
            counts: vec![0; BUCKETS].into_boxed_slice(),
            total: 0,
        }
    }

    /// Adds a time.
    #[inline]
    pub fn record(&mut self, ticks: u64) {
        let ticks = ticks.min((1 << MAX_BITS) - 1);
        let shift = (ticks | (STEPS - 1)).ilog2() + 1 - STEP_BITS;
        // Below the first power of two that has all steps, a bucket is one tick.
        let bucket = if ticks < STEPS {
            ticks
        } else {
            u64::from(shift) * STEPS + ((ticks >> (shift - 1)) & (STEPS - 1))
        };
        if let Some(count) = self.counts.get_mut(bucket as usize) {
            *count = count.saturating_add(1);
            self.total += 1;
        }
    }

    /// Returns the time that `share` of all operations took at most, in ticks: the middle of its
    /// step. `None` if there are no times.
    pub fn percentile(&self, share: f64) -> Option<u64> {
        let wanted = ((self.total as f64 * share) as u64).max(1);
        let mut seen = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= wanted {
                return Some(middle(bucket as u64));
            }
        }
        None
    }
}

fn middle(bucket: u64) -> u64 {
    let (power, step) = (bucket / STEPS, bucket % STEPS);
    if power == 0 {
        return step;
    }
    let width = 1 << (power - 1);
    (STEPS + step) * width + width / 2
}
