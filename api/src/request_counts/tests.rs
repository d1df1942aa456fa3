use super::*;
use crate::request::Request;

const GET: &str = "get_api_requests";
const PUT: &str = "put_api_requests";

#[test]
fn requests_are_counted_in_the_groups_of_their_methods() {
    let mut counts = RequestCounts::default();
    let get = Request::parse("GET", "/", b"").unwrap();
    let put = Request::parse("PUT", "/entropy", b"{}").unwrap();
    counts.count(get.counted_as(), false);
    counts.count(put.counted_as(), true);
    counts.count(put.counted_as(), false);
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
