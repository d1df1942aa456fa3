//! `/mmds`: the metadata service.

use serde_json::{Value, json};

use crate::configuration::Configuration;
use crate::method::Method;
use crate::metrics_groups::Group;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::resource::Resource;

pub(super) const RESOURCE: Resource = Resource {
    path: "mmds",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("mmds", |view| {
            Reply::value(&match view.metadata()? {
                None | Some(Value::Null) => json!({}),
                Some(contents) => contents,
            })
        })),
        (Method::Put, []) => {
            let contents: Value = call.value()?;
            Ok(Request::change(Method::Put, "mmds", |instance| {
                instance.put_metadata(contents)
            }))
        }
        (Method::Patch, []) => {
            let patch: Value = call.value()?;
            Ok(Request::patch("mmds", |instance| {
                instance.patch_metadata(patch)
            }))
        }
        (Method::Put, ["config"]) => Ok(Request::put(
            "mmds",
            call.json()?,
            Configuration::put_mmds_config,
        )),
        _ => Err(call.unknown()),
    },
    groups: &[Group::new(
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token \
         rx_no_token rx_count tx_bytes tx_count tx_errors tx_frames connections_created \
         connections_destroyed",
    )],
};
