use super::*;

const GET: &str = "get_api_requests";
const PUT: &str = "put_api_requests";

#[test]
fn requests_are_counted_in_the_groups_of_their_methods() {
    let mut counts = RequestCounts::default();
    counts.count((Method::Get, "instance_info"), false);
    counts.count((Method::Put, "entropy"), true);
    counts.count((Method::Put, "entropy"), false);
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
