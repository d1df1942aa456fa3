//! How often each resource was asked for, put and changed.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::request::Request;

const GET: &str = "get_api_requests";
const PATCH: &str = "patch_api_requests";
const PUT: &str = "put_api_requests";

/// How often each resource was asked for, put and changed, and how often that was refused.
#[derive(Debug, Default)]
pub(crate) struct RequestCounts {
    /// By group and by the counter's name.
    counts: BTreeMap<(&'static str, String), u64>,
}

impl RequestCounts {
    /// Counts a request that was answered. `names` are those of [`names_of`].
    pub(crate) fn count(&mut self, names: (&'static str, &str), refused: bool) {
        let (group, name) = names;
        let mut add = |name, count| *self.counts.entry((group, name)).or_default() += count;
        add(format!("{name}_count"), 1);
        // Firecracker counts no requests to read that are refused.
        if group != GET {
            add(format!("{name}_fails"), u64::from(refused));
        }
    }

    /// Puts the counts into their groups.
    pub(crate) fn add_to(&self, groups: &mut Map<String, Value>) {
        for ((group, name), count) in &self.counts {
            if let Some(Value::Object(group)) = groups.get_mut(*group) {
                group.insert(name.clone(), json!(count));
            }
        }
    }
}

/// The group and the name under which a request is counted.
pub(crate) fn names_of(request: &Request) -> (&'static str, &'static str) {
    match request {
        Request::GetInstance => (GET, "instance_info"),
        Request::GetVersion => (GET, "vmm_version"),
        Request::GetConfiguration => (GET, "vm_config"),
        Request::GetMachineConfiguration => (GET, "machine_cfg"),
        Request::GetBalloon | Request::GetBalloonHinting => (GET, "balloon"),
        Request::GetBalloonStatistics => (GET, "balloon_stats"),
        Request::GetMetadata => (GET, "mmds"),
        Request::PutAction(_) => (PUT, "actions"),
        Request::PutMachineConfiguration(_) => (PUT, "machine_cfg"),
        Request::PutBootSource(_) => (PUT, "boot_source"),
        Request::PutDrive(_) => (PUT, "drive"),
        Request::PutNetworkInterface(_) => (PUT, "network"),
        Request::PutBalloon(_) => (PUT, "balloon"),
        Request::PutVsock(_) => (PUT, "vsock"),
        Request::PutEntropy(_) => (PUT, "entropy"),
        Request::PutSerial(_) => (PUT, "serial"),
        Request::PutLogger(_) => (PUT, "logger"),
        Request::PutMetrics(_) => (PUT, "metrics"),
        Request::PutMetadata(_) | Request::PutMetadataConfig(_) => (PUT, "mmds"),
        Request::PutCpuConfig(_) => (PUT, "cpu_cfg"),
        Request::PatchVm(_) => (PATCH, "vm"),
        Request::PatchMachineConfiguration(_) => (PATCH, "machine_cfg"),
        Request::PatchDrive(_) => (PATCH, "drive"),
        Request::PatchNetworkInterface(_) => (PATCH, "network"),
        Request::PatchBalloon(_)
        | Request::StartBalloonHinting(_)
        | Request::StopBalloonHinting => (PATCH, "balloon"),
        Request::PatchBalloonStatistics(_) => (PATCH, "balloon_stats"),
        Request::PatchMetadata(_) => (PATCH, "mmds"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_in_the_groups_of_their_methods() {
        let mut counts = RequestCounts::default();
        let get = Request::parse("GET", "/", b"").unwrap();
        let put = Request::parse("PUT", "/entropy", b"{}").unwrap();
        counts.count(names_of(&get), false);
        counts.count(names_of(&put), true);
        counts.count(names_of(&put), false);
        let mut groups = Map::new();
        groups.insert(GET.to_string(), json!({"mmds_count": 0}));
        groups.insert(PUT.to_string(), json!({}));
        counts.add_to(&mut groups);
        assert_eq!(
            Value::Object(groups),
            json!({
                GET: {"instance_info_count": 1, "mmds_count": 0},
                PUT: {"entropy_count": 2, "entropy_fails": 1},
            })
        );
    }
}
