//! `/version`: the version of the API.

use serde::Serialize;

use crate::method::Method;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::resource::Resource;
use crate::version::API_VERSION;

pub(super) const RESOURCE: Resource = Resource {
    path: "version",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("vmm_version", |_| {
            Reply::value(&Version {
                firecracker_version: API_VERSION,
            })
        })),
        _ => Err(call.unknown()),
    },
    groups: &[],
};

/// Answer of `GET /version`.
#[derive(Clone, Debug, Serialize)]
struct Version {
    /// Version of the API's model.
    firecracker_version: &'static str,
}
