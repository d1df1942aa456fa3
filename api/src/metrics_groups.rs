//! Metrics in the groups in which Firecracker has them, so that programs that read its metrics read these.

use serde_json::{Map, Value, json};

/// Every group, and what is counted in it. What this monitor does not count stays zero.
const GROUPS: [(&str, &str); 18] = [
    (
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails",
    ),
    (
        "block",
        "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count \
         flush_count queue_event_count rate_limiter_event_count update_count update_fails read_bytes \
         write_bytes read_count write_count read_agg write_agg rate_limiter_throttled_events \
         io_engine_throttled_events remaining_reqs_count",
    ),
    ("deprecated_api", "deprecated_http_api_calls"),
    (
        "entropy",
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails \
         entropy_rate_limiter_throttled rate_limiter_event_count",
    ),
    (
        "get_api_requests",
        "instance_info_count machine_cfg_count mmds_count vmm_version_count",
    ),
    (
        "i8042",
        "error_count missed_read_count missed_write_count read_count write_count reset_count",
    ),
    (
        "latencies_us",
        "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm \
         vmm_full_create_snapshot vmm_diff_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm",
    ),
    (
        "logger",
        "missed_metrics_count metrics_fails missed_log_count",
    ),
    (
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token \
         rx_count tx_bytes tx_count tx_errors tx_frames connections_created connections_destroyed",
    ),
    (
        "net",
        "activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer event_fails \
         rx_queue_event_count rx_event_rate_limiter_count rx_rate_limiter_throttled rx_tap_event_count \
         rx_bytes_count rx_packets_count rx_fails rx_count tap_read_fails tap_write_fails tap_write_agg \
         tx_bytes_count tx_malformed_frames tx_fails tx_count tx_packets_count tx_queue_event_count \
         tx_rate_limiter_event_count tx_rate_limiter_throttled tx_spoofed_mac_count \
         tx_remaining_reqs_count",
    ),
    (
        "patch_api_requests",
        "drive_count drive_fails network_count network_fails machine_cfg_count machine_cfg_fails \
         mmds_count mmds_fails",
    ),
    (
        "put_api_requests",
        "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails \
         logger_count logger_fails machine_cfg_count machine_cfg_fails cpu_cfg_count cpu_cfg_fails \
         metrics_count metrics_fails network_count network_fails mmds_count mmds_fails vsock_count \
         vsock_fails",
    ),
    ("seccomp", "num_faults"),
    (
        "signals",
        "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill",
    ),
    (
        "uart",
        "error_count flush_count missed_read_count missed_write_count read_count write_count",
    ),
    (
        "vcpu",
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures exit_io_in_agg exit_io_out_agg \
         exit_mmio_read_agg exit_mmio_write_agg",
    ),
    ("vmm", "panic_count"),
    (
        "vsock",
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails \
         muxer_event_fails conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count \
         tx_bytes_count rx_packets_count tx_packets_count conns_added conns_killed conns_removed \
         killq_resync tx_flush_fails tx_write_fails rx_read_fails",
    ),
];

/// Devices of which there can be several: their name in the machine's metrics, and that of their group.
const LISTS: [(&str, &str); 3] = [("vcpus", "vcpu"), ("disks", "block"), ("networks", "net")];

/// The totals of a machine in groups. Of devices of which there can be several, all together are one group,
/// and each is another with its name, of which `names` gives those for each list of the machine's metrics.
pub(crate) fn groups<'a>(
    machine: &Value,
    names: impl Fn(&str, usize) -> Option<&'a str>,
) -> Map<String, Value> {
    let mut groups = Map::new();
    for (group, counters) in GROUPS {
        let zeroes = counters
            .split(' ')
            .map(|counter| (counter.to_string(), zero(counter)));
        groups.insert(group.to_string(), Value::Object(zeroes.collect()));
    }
    for (list, group) in LISTS {
        let devices = machine[list].as_array();
        for (index, device) in devices.into_iter().flatten().enumerate() {
            add(&mut groups[group], device);
            let name = names(list, index).map_or_else(|| index.to_string(), str::to_string);
            groups.insert(format!("{group}_{name}"), device.clone());
        }
    }
    for (name, device) in machine.as_object().into_iter().flatten() {
        if let Some(group) = groups.get_mut(name)
            && device.is_object()
        {
            add(group, device);
        }
    }
    groups
}

fn zero(counter: &str) -> Value {
    match counter.ends_with("_agg") {
        true => json!({"min_us": 0, "max_us": 0, "sum_us": 0}),
        false => json!(0),
    }
}

/// Adds what a device has counted to `total`.
fn add(total: &mut Value, device: &Value) {
    let (Some(total), Some(device)) = (total.as_object_mut(), device.as_object()) else {
        return;
    };
    for (name, value) in device {
        let before = total.entry(name).or_insert_with(|| match value {
            Value::Object(_) => json!({}),
            _ => json!(0),
        });
        match (before.as_u64(), value.as_u64()) {
            (Some(before_count), Some(count)) => {
                *before = json!(match name.as_str() {
                    // It is zero as long as there is none.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_together_and_each_by_its_name() {
        let times =
            |least: u64, most: u64| json!({"min_us": least, "max_us": most, "sum_us": most});
        let machine = json!({
            "vcpus": [{"exit_io_in": 1}, {"exit_io_in": 2}],
            "disks": [
                {"read_count": 3, "read_agg": times(4, 9)},
                {"read_count": 5, "read_agg": times(2, 7)},
                {"read_count": 0, "read_agg": times(0, 0)},
            ],
            "networks": [],
            "vsock": null,
            "entropy": {"entropy_bytes": 6},
        });
        let names = |list: &str, index: usize| {
            let drives = ["root", "data"];
            (list == "disks").then(|| drives.get(index).copied())?
        };
        let groups = groups(&machine, names);
        assert_eq!(groups["vcpu"]["exit_io_in"], 3);
        assert_eq!(groups["vcpu"]["exit_io_in_agg"]["max_us"], 0);
        assert_eq!(groups["vcpu_1"]["exit_io_in"], 2);
        assert_eq!(groups["block"]["read_count"], 8);
        assert_eq!(
            groups["block"]["read_agg"],
            json!({"min_us": 2, "max_us": 9, "sum_us": 16})
        );
        assert_eq!(groups["block_data"]["read_count"], 5);
        assert_eq!(groups["block_2"]["read_count"], 0);
        assert_eq!(groups["net"]["rx_count"], 0);
        assert_eq!(groups["vsock"]["conns_added"], 0);
        assert_eq!(groups["entropy"]["entropy_bytes"], 6);
        assert_eq!(groups["entropy"]["host_rng_fails"], 0);
        assert_eq!(groups["put_api_requests"]["actions_count"], 0);
    }
}
