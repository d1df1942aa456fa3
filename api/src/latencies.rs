//! How long requests took last.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// The group of metrics for these times.
pub(crate) const GROUP: &str = "latencies_us";

/// How long the last request of each kind took, for its client and in the machine.
#[derive(Debug, Default)]
pub(crate) struct Latencies(BTreeMap<&'static str, [Duration; 2]>);

impl Latencies {
    /// Sets the times of the requests that the metrics call `name`: from the moment that one was received, and without the
    /// wait for others.
    pub(crate) fn set(&mut self, name: &'static str, of_request: Duration, of_machine: Duration) {
        self.0.insert(name, [of_request, of_machine]);
    }

    /// Puts the times into their group.
    pub(crate) fn add_to(&self, groups: &mut Map<String, Value>) {
        let Some(Value::Object(group)) = groups.get_mut(GROUP) else {
            return;
        };
        for (name, [of_request, of_machine]) in &self.0 {
            group.insert((*name).to_string(), json!(of_request.as_micros() as u64));
            group.insert(format!("vmm_{name}"), json!(of_machine.as_micros() as u64));
        }
    }
}
