//! What a load did.

use alloc::format;
use alloc::string::String;

use runtime::time::ticks_per_second;
use runtime::{interrupts, println, report};

use crate::completion::DEVICE_VECTOR;
use crate::histogram::Histogram;

/// What a load did, as it is printed.
pub struct Outcome {
    /// The load with all its settings, for a reader of the line.
    pub name: &'static str,
    /// Operations that succeeded.
    pub operations: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Ticks of the time stamp counter from the first operation's start to the last one's end.
    pub ticks: u64,
    /// How long each took; empty if an operation's start is not known.
    pub latency: Histogram,
    /// Operations that failed.
    pub errors: u64,
    /// The first error.
    pub first_error: Option<String>,
    /// How often a doorbell was rung.
    pub doorbells: u64,
}

impl Outcome {
    /// Prints the line of JSON, and fails the payload if there were errors.
    pub fn print(&self) {
        let frequency = ticks_per_second() as f64;
        let seconds = self.ticks as f64 / frequency;
        let operations = self.operations as f64;
        let bytes = self.bytes;
        let nanoseconds = |share| match self.latency.percentile(share) {
            Some(ticks) => format!("{:.0}", ticks as f64 * 1e9 / frequency),
            None => "null".into(),
        };
        println!(
            "{{\"load\":\"{}\",\"operations\":{},\"bytes\":{bytes},\"seconds\":{seconds:.6},\
             \"operations_per_second\":{:.0},\"bytes_per_second\":{:.0},\"p50_ns\":{},\
             \"p99_ns\":{},\"p99_9_ns\":{},\"errors\":{},\"doorbells\":{},\"interrupts\":{}}}",
            self.name,
            self.operations,
            operations / seconds,
            bytes as f64 / seconds,
            nanoseconds(0.5),
            nanoseconds(0.99),
            nanoseconds(0.999),
            self.errors,
            self.doorbells,
            interrupts::count(DEVICE_VECTOR),
        );
        if let Some(reason) = &self.first_error {
            report::fail(
                self.name,
                format_args!("{} errors, the first: {reason}", self.errors),
            );
        } else {
            report::ok(self.name);
        }
    }
}
