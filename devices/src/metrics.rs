//! What devices count of their work, for whoever watches the machine.
//!
//! Each device has a struct of these of its own, shared between its worker, which counts, and the
//! owner of the machine, who reads. They serialize as their totals since the machine was built.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::ser::{Serialize, SerializeStruct, Serializer};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The total so far.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Serialize for Counter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.total())
    }
}

/// How long something took, in microseconds: the least, the most and all times together.
///
/// It serializes as an object of `min_us`, `max_us` and `sum_us`, all zero before the first time.
#[derive(Debug)]
pub struct Latency {
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
    /// Counts something that took `time`.
    pub fn record(&self, time: Duration) {
        let time = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.least.fetch_min(time, Ordering::Relaxed);
        self.most.fetch_max(time, Ordering::Relaxed);
        self.sum.fetch_add(time, Ordering::Relaxed);
    }
}

impl Serialize for Latency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let most = self.most.load(Ordering::Relaxed);
        let mut fields = serializer.serialize_struct("Latency", 3)?;
        fields.serialize_field("min_us", &self.least.load(Ordering::Relaxed).min(most))?;
        fields.serialize_field("max_us", &most)?;
        fields.serialize_field("sum_us", &self.sum.load(Ordering::Relaxed))?;
        fields.end()
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
        for time in [30, 10, 20] {
            latency.record(Duration::from_micros(time));
        }
        assert_eq!(json(&latency), r#"{"min_us":10,"max_us":30,"sum_us":60}"#);
    }
}
