use std::collections::HashMap;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::metrics_groups::groups;

fn fault(method: &str, path: &str, body: &str) -> String {
    let parsed = parse_request(method, path, body.as_bytes());
    parsed.expect_err("it is refused").to_string()
}

#[test]
fn requests_are_told_apart_by_method_and_path() {
    let parsed = |method, path, body: &[u8]| {
        let request = parse_request(method, path, body).unwrap();
        request.counted_as()
    };
    assert_eq!(parsed("GET", "/", b""), (Method::Get, "instance_info"));
    assert_eq!(
        parsed("GET", "/balloon/statistics", b""),
        (Method::Get, "balloon_stats")
    );
    let drive = br#"{"drive_id": "root", "is_root_device": true, "path_on_host": "a"}"#;
    assert_eq!(parsed("PUT", "/drives/root", drive), (Method::Put, "drive"));
    assert_eq!(parsed("PUT", "/entropy", b"{}"), (Method::Put, "entropy"));
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    for (method, path, body, message) in [
        (
            "DELETE",
            "/",
            "",
            "Invalid request method and/or path: DELETE /",
        ),
        (
            "GET",
            "/vm",
            "",
            "Invalid request method and/or path: GET /vm",
        ),
        (
            "PUT",
            "/drives",
            "{}",
            "Invalid request method and/or path: PUT /drives",
        ),
        ("GET", "/", "{}", "GET request cannot have a body"),
        (
            "PUT",
            "/vsock",
            "",
            "Empty PUT request: a JSON body is needed",
        ),
        (
            "PATCH",
            "/machine-config",
            "{}",
            "Empty PATCH request: a JSON body is needed",
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": "two"}"#,
            "Invalid JSON body: vcpu_count: invalid type: string \"two\", expected u8 at line 1 \
             column 20",
        ),
        (
            "PUT",
            "/entropy",
            r#"{"rate_limiter": {"ops": {"size": 1, "refill": 2}}}"#,
            "Invalid JSON body: rate_limiter.ops.refill: unknown field `refill`, expected one of \
             `size`, `one_time_burst`, `refill_time` at line 1 column 45",
        ),
        (
            "PUT",
            "/vsock",
            "{} x",
            "Invalid JSON body: missing field `guest_cid` at line 1 column 2",
        ),
        (
            "PUT",
            "/entropy",
            "{} x",
            "Invalid JSON body: trailing characters at line 1 column 4",
        ),
        (
            "PUT",
            "/entropy",
            r#"{"rate_limiter": {"#,
            "Invalid JSON body: rate_limiter: EOF while parsing an object at line 1 column 18",
        ),
        (
            "PUT",
            "/entropy",
            " []",
            "Invalid JSON body: it is an array, but has to be an object",
        ),
        (
            "PUT",
            "/drives/a",
            r#"{"drive_id": "b", "is_root_device": true}"#,
            "The id from the path 'a' does not match the id from the body 'b'",
        ),
        (
            "PUT",
            "/drives/a-b",
            r#"{"drive_id": "a-b", "is_root_device": true}"#,
            "Invalid id 'a-b': only letters, digits and underscores are allowed",
        ),
        (
            "PUT",
            "/snapshot/create",
            "{}",
            "Invalid JSON body: missing field `snapshot_path` at line 1 column 2",
        ),
        (
            "PUT",
            "/snapshot/create",
            r#"{"snapshot_path": "a", "mem_file_path": "b", "version": "1.0.0"}"#,
            "Invalid JSON body: version: unknown field `version`, expected one of `snapshot_type`, \
             `snapshot_path`, `mem_file_path`, `sync_snapshot_files` at line 1 column 54",
        ),
        (
            "PUT",
            "/snapshot/create",
            r#"{"snapshot_path": "a", "mem_file_path": "b", "snapshot_type": "Half"}"#,
            "Invalid JSON body: snapshot_type: unknown variant `Half`, expected `Full` or `Diff` at \
             line 1 column 68",
        ),
        (
            "PUT",
            "/snapshot/load",
            r#"{"snapshot_path": "a"}"#,
            "Invalid JSON body: missing field: either `mem_backend` or `mem_file_path` is required",
        ),
        (
            "PUT",
            "/snapshot/load",
            r#"{"snapshot_path": "a", "mem_file_path": "b",
                "mem_backend": {"backend_type": "File", "backend_path": "b"}}"#,
            "Invalid JSON body: too many fields: either `mem_backend` or `mem_file_path` exclusively \
             is required",
        ),
        (
            "PUT",
            "/snapshot/load",
            r#"{"snapshot_path": "a", "mem_backend": {"backend_path": "b"}}"#,
            "Invalid JSON body: mem_backend: missing field `backend_type` at line 1 column 59",
        ),
        (
            "PUT",
            "/snapshot",
            "{}",
            "Invalid request method and/or path: PUT /snapshot",
        ),
        (
            "GET",
            "/hotplug/memory",
            "",
            "Memory hotplug: not supported by this version of Bantam",
        ),
        (
            "PATCH",
            "/balloon/hinting/start",
            r#"{"acknowledge_on_stop": 1}"#,
            "Invalid JSON body: acknowledge_on_stop: invalid type: integer `1`, expected a boolean \
             at line 1 column 25",
        ),
        (
            "PATCH",
            "/balloon/hinting",
            "{}",
            "Invalid request method and/or path: PATCH /balloon/hinting",
        ),
    ] {
        assert_eq!(fault(method, path, body), message, "{method} {path} {body}");
    }
}

#[test]
fn devices_are_told_together_and_each_by_its_name() {
    let times = |least: u64, most: u64| json!({"min_us": least, "max_us": most, "sum_us": most});
    let machine = json!({
        "vcpus": [{"exit_io_in": 1}, {"exit_io_in": 2}],
        "devices": {
            "root": {"kind": "block", "read_count": 3, "read_agg": times(4, 9)},
            "data": {"kind": "block", "read_count": 5, "read_agg": times(2, 7)},
            "drive.2": {"kind": "block", "read_count": 0, "read_agg": times(0, 0)},
            "rng": {"kind": "entropy", "entropy_bytes": 6},
        },
        "mmds": null,
    });
    let ids = HashMap::from([("drive.2".parse().unwrap(), "2".to_string())]);
    let groups = groups(&metrics_groups(), &machine, &ids);
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

proptest! {
    #[test]
    fn any_request_is_read_or_refused_on_one_line(
        method in "GET|PUT|PATCH|[A-Z]{1,5}",
        path in "(/(drives|vm|balloon|mmds|config|statistics|[^/]{0,5})){0,4}",
        body in prop_oneof![
            ".*".prop_map(String::into_bytes),
            proptest::collection::vec(any::<u8>(), 0..100),
            "(\\{|\\}|\"[a-z_]{0,8}\"|:|,|\\[|\\]|[0-9]{1,3}|null){0,20}"
                .prop_map(String::into_bytes),
        ],
    ) {
        if let Err(fault) = parse_request(&method, &path, &body) {
            let text = fault.to_string();
            prop_assert!(!text.contains('\n'), "{}", text);
        }
    }
}
