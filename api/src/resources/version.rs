//! `/version`: the version of the API.

use serde::Serialize;

use super::Resource;
use crate::reply::Reply;
use crate::request::{Method, Request};
use crate::version::API_VERSION;

pub(crate) const RESOURCE: Resource = Resource {
    path: "version",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("vmm_version", |_| {
            Reply::value(&Version {
                firecracker_version: API_VERSION,
            })
        })),
        _ => Err(call.unknown()),
    },
    ..Resource::DEFAULT
};

/// Answer of `GET /version`.
#[derive(Clone, Debug, Serialize)]
pub struct Version {
    /// Version of the API's model.
    pub firecracker_version: &'static str,
}
