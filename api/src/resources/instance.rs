//! `/`: the instance.

use bantam_vmm::State;
use serde::Serialize;

use super::Resource;
use crate::fault::Fault;
use crate::reply::Reply;
use crate::request::{Method, Request};
use crate::version::API_VERSION;
use crate::view::View;

pub(crate) const RESOURCE: Resource = Resource {
    path: "",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("instance_info", information)),
        _ => Err(call.unknown()),
    },
    ..Resource::DEFAULT
};

/// Answer of `GET /`.
#[derive(Clone, Debug, Serialize)]
pub struct InstanceInformation {
    /// The program's name.
    pub app_name: &'static str,
    /// The instance's name.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: &'static str,
    /// Version of the API's model.
    pub vmm_version: &'static str,
}

fn information(view: &View) -> Result<Reply, Fault> {
    Reply::value(&InstanceInformation {
        app_name: "Bantam",
        id: view.id().to_string(),
        state: match view.controller().state() {
            State::NotConfigured | State::Configured | State::Starting => "Not started",
            State::Running | State::Pausing | State::Stopped => "Running",
            State::Paused | State::Resuming => "Paused",
        },
        vmm_version: API_VERSION,
    })
}
