//! Puts metrics into Firecracker's groups, for programs that read its metrics.

use std::collections::HashMap;

use bantam_vmm::config::DeviceName;
use serde_json::{Map, Value, json};

use crate::latencies;

/// A group of metrics. What this monitor does not count stays zero.
#[derive(Clone, Copy)]
pub(crate) struct Group {
    /// The name of the group, and of the kind of device that counts in it.
    name: &'static str,
    /// The names of the counters, with spaces between.
    counters: &'static str,
    /// Whether each device of the kind has another group of its own.
    has_members: bool,
}

impl Group {
    pub(crate) const fn new(name: &'static str, counters: &'static str) -> Group {
        Group {
            name,
            counters,
            has_members: false,
        }
    }

    /// Makes this the group of a kind of device that a machine can have several of: it has the sums of all
    /// devices, and each device has another group with its name.
    pub(crate) const fn and_each(self) -> Group {
        Group {
            has_members: true,
            ..self
        }
    }

    fn zeroes(&self) -> Value {
        let counters = self.counters.split(' ');
        let zeroes = counters.map(|counter| {
            let value = match counter.ends_with("_agg") {
                true => json!({"min_us": 0, "max_us": 0, "sum_us": 0}),
                false => json!(0),
            };
            (counter.to_string(), value)
        });
        Value::Object(zeroes.collect())
    }
}

/// Groups that belong to no resource.
const GROUPS: &[Group] = &[
    Group::new("deprecated_api", "deprecated_http_api_calls"),
    Group::new(
        "get_api_requests",
        "instance_info_count machine_cfg_count mmds_count vmm_version_count",
    ),
    Group::new(
        "i8042",
        "error_count missed_read_count missed_write_count read_count write_count reset_count",
    ),
    Group::new(
        latencies::GROUP,
        "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm \
         vmm_full_create_snapshot vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm",
    ),
    Group::new(
        "patch_api_requests",
        "drive_count drive_fails network_count network_fails machine_cfg_count machine_cfg_fails \
         mmds_count mmds_fails",
    ),
    Group::new(
        "put_api_requests",
        "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails \
         logger_count logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count cpu_cfg_fails \
         metrics_count metrics_fails network_count network_fails mmds_count mmds_fails vsock_count \
         vsock_fails",
    ),
    Group::new("seccomp", "num_faults"),
    Group::new(
        "signals",
        "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill",
    ),
    Group::new("vmm", "panic_count"),
];

/// What a device has counted.
struct DeviceMetrics<'a> {
    kind: &'a str,
    name: String,
    counters: &'a Value,
}

/// Lists everything that counts in a machine: its devices by name, its vCPUs by number, and whatever it has
/// only one of.
fn counted<'a>(machine: &'a Value, ids: &HashMap<DeviceName, String>) -> Vec<DeviceMetrics<'a>> {
    let mut found = Vec::new();
    let vcpus = machine["vcpus"].as_array();
    for (index, counters) in vcpus.into_iter().flatten().enumerate() {
        found.push(DeviceMetrics {
            kind: "vcpu",
            name: index.to_string(),
            counters,
        });
    }
    let devices = machine["devices"].as_object();
    for (name, counters) in devices.into_iter().flatten() {
        found.push(DeviceMetrics {
            kind: counters["kind"].as_str().unwrap_or_default(),
            name: ids.get(name.as_str()).unwrap_or(name).clone(),
            counters,
        });
    }
    for (kind, counters) in machine.as_object().into_iter().flatten() {
        found.push(DeviceMetrics {
            kind,
            name: String::new(),
            counters,
        });
    }
    found
}

/// Puts the totals of a machine into groups: those in `of_resources`, and those that belong to no resource. A
/// device has the name in `ids`, by which clients know it, if there is one for it.
pub(crate) fn groups(
    of_resources: &[Group],
    machine: &Value,
    ids: &HashMap<DeviceName, String>,
) -> Map<String, Value> {
    let all: Vec<&Group> = of_resources.iter().chain(GROUPS).collect();
    let zeroes = all
        .iter()
        .map(|group| (group.name.to_string(), group.zeroes()));
    let mut groups: Map<String, Value> = zeroes.collect();
    for device in counted(machine, ids) {
        let Some(group) = all.iter().find(|group| group.name == device.kind) else {
            continue;
        };
        add(&mut groups[group.name], device.counters);
        if group.has_members {
            let name = format!("{}_{}", group.name, device.name);
            let mut counters = device.counters.clone();
            if let Some(counters) = counters.as_object_mut() {
                counters.remove("kind");
            }
            groups.insert(name, counters);
        }
    }
    groups
}

/// Adds what a device has counted to `total`.
fn add(total: &mut Value, device: &Value) {
    let (Some(total), Some(device)) = (total.as_object_mut(), device.as_object()) else {
        return;
    };
    for (name, value) in device {
        if value.is_string() {
            continue;
        }
        let before = total.entry(name).or_insert_with(|| match value {
            Value::Object(_) => json!({}),
            _ => json!(0),
        });
        match (before.as_u64(), value.as_u64()) {
            (Some(before_count), Some(count)) => {
                *before = json!(match name.as_str() {
                    // The minimum is zero until there is a first value.
                    "min_us" if before_count == 0 || count == 0 => before_count.max(count),
                    "min_us" => before_count.min(count),
                    "max_us" => before_count.max(count),
                    _ => before_count.saturating_add(count),
                });
            }
            _ => add(before, value),
        }
    }
}
