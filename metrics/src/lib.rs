//! Counters of the work that the parts of a machine do, for programs that monitor it.
//!
//! Each part has a struct of these counters, shared between the thread that counts and the owner of
//! the machine, who reads them. They serialize as their totals since the machine was built.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        // Most counts are zero most of the time, and a comparison is cheaper than an atomic
        // addition.
        if count > 0 {
            self.0.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Returns the total so far.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Serialize for Counter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.total())
    }
}

/// How long something took: the shortest time, the longest, and the sum of all.
///
/// It serializes as an object of `min_us`, `max_us` and `sum_us`, in microseconds, all zero before
/// the first time.
#[derive(Debug)]
pub struct Latency {
    /// In nanoseconds, like the next two.
    least: AtomicU64,
    most: AtomicU64,
    sum: AtomicU64,
}

impl Default for Latency {
    fn default() -> Latency {
        Latency {
            least: AtomicU64::new(u64::MAX),
            most: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }
}

impl Latency {
    /// Adds the content of `times`, and empties it.
    pub fn record(&self, times: &mut Times) {
        let Some((least, most)) = std::mem::take(&mut times.range) else {
            return;
        };
        self.least.fetch_min(nanoseconds(least), Ordering::Relaxed);
        self.most.fetch_max(nanoseconds(most), Ordering::Relaxed);
        let sum = nanoseconds(std::mem::take(&mut times.sum));
        self.sum.fetch_add(sum, Ordering::Relaxed);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Serialize for Latency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let microseconds = |field: &AtomicU64| field.load(Ordering::Relaxed) / 1000;
        let most = microseconds(&self.most);
        let mut fields = serializer.serialize_struct("Latency", 3)?;
        fields.serialize_field("min_us", &microseconds(&self.least).min(most))?;
        fields.serialize_field("max_us", &most)?;
        fields.serialize_field("sum_us", &microseconds(&self.sum))?;
        fields.end()
    }
}

/// Times that one thread collects before it records them, because recording each would slow down
/// every packet or request.
#[derive(Debug, Default)]
pub struct Times {
    /// The shortest and the longest time.
    range: Option<(Duration, Duration)>,
    sum: Duration,
}

impl Times {
    /// Adds `count` events that took `time` each.
    pub fn add(&mut self, time: Duration, count: u32) {
        if count > 0 {
            let (least, most) = self.range.unwrap_or((time, time));
            self.range = Some((least.min(time), most.max(time)));
            self.sum += time * count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_summed_and_bounded() {
        let latency = Latency::default();
        let json = |latency: &Latency| serde_json::to_string(latency).unwrap();
        assert_eq!(json(&latency), r#"{"min_us":0,"max_us":0,"sum_us":0}"#);
        let mut times = Times::default();
        times.add(Duration::from_micros(5), 0);
        for (time, count) in [(30, 1), (10, 2)] {
            times.add(Duration::from_micros(time), count);
        }
        latency.record(&mut times);
        // Times that have been recorded are not recorded again.
        latency.record(&mut times);
        times.add(Duration::from_nanos(20_500), 2);
        latency.record(&mut times);
        assert_eq!(json(&latency), r#"{"min_us":10,"max_us":30,"sum_us":91}"#);
    }
}
