use super::*;

#[test]
fn devices_are_told_together_and_each_by_its_name() {
    let times = |least: u64, most: u64| json!({"min_us": least, "max_us": most, "sum_us": most});
    let machine = json!({
        "vcpus": [{"exit_io_in": 1}, {"exit_io_in": 2}],
        "devices": {
            "root": {"kind": "block", "read_count": 3, "read_agg": times(4, 9)},
            "data": {"kind": "block", "read_count": 5, "read_agg": times(2, 7)},
            "2": {"kind": "block", "read_count": 0, "read_agg": times(0, 0)},
            "rng": {"kind": "entropy", "entropy_bytes": 6},
        },
        "mmds": null,
    });
    let groups = groups(&machine);
    assert_eq!(groups["vcpu"]["exit_io_in"], 3);
    assert_eq!(groups["vcpu"]["exit_io_in_agg"]["max_us"], 0);
    assert_eq!(groups["vcpu_1"]["exit_io_in"], 2);
    assert_eq!(groups["block"]["read_count"], 8);
    assert_eq!(
        groups["block"]["read_agg"],
        json!({"min_us": 2, "max_us": 9, "sum_us": 16})
    );
    assert_eq!(
        groups["block_data"],
        json!({"read_count": 5, "read_agg": times(2, 7)})
    );
    assert_eq!(groups["block_2"]["read_count"], 0);
    assert_eq!(groups["net"]["rx_count"], 0);
    assert_eq!(groups["vsock"]["conns_added"], 0);
    assert_eq!(groups["entropy"]["entropy_bytes"], 6);
    assert_eq!(groups["entropy"]["host_rng_fails"], 0);
    assert_eq!(groups["put_api_requests"]["actions_count"], 0);
}
