//! How often each resource was asked for, put and changed.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::method::Method;

/// How often each resource was asked for, put and changed, and how often that was refused.
#[derive(Debug, Default)]
pub(crate) struct RequestCounts {
    /// By method and by the counter's name.
    counts: BTreeMap<(Method, String), u64>,
    deprecated: u64,
}

impl RequestCounts {
    /// Counts a request that was answered. `request` is its method and its name.
    pub(crate) fn count(&mut self, request: (Method, &str), refused: bool) {
        let (method, name) = request;
        let mut add = |name, count| *self.counts.entry((method, name)).or_default() += count;
        add(format!("{name}_count"), 1);
        // Firecracker does not count requests to read that are refused.
        if method != Method::Get {
            add(format!("{name}_fails"), u64::from(refused));
        }
    }

    /// Counts the use of a field that clients are to do without.
    pub(crate) fn count_deprecated(&mut self) {
        self.deprecated += 1;
    }

    /// Puts the counts into their groups.
    pub(crate) fn add_to(&self, groups: &mut Map<String, Value>) {
        if let Some(Value::Object(group)) = groups.get_mut("deprecated_api") {
            group.insert(
                "deprecated_http_api_calls".to_string(),
                json!(self.deprecated),
            );
        }
        for ((method, name), count) in &self.counts {
            if let Some(Value::Object(group)) = groups.get_mut(group_of(*method)) {
                group.insert(name.clone(), json!(count));
            }
        }
    }
}

/// The group of metrics in which requests with this method are counted.
fn group_of(method: Method) -> &'static str {
    match method {
        Method::Get => "get_api_requests",
        Method::Put => "put_api_requests",
        Method::Patch => "patch_api_requests",
    }
}

#[cfg(test)]
mod tests;
