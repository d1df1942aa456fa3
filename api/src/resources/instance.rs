//! `/`: the instance.

use bantam_vmm::State;
use serde::Serialize;

use crate::fault::Fault;
use crate::method::Method;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::resource::Resource;
use crate::version::API_VERSION;
use crate::view::View;

pub(super) const RESOURCE: Resource = Resource {
    path: "",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, []) => Ok(Request::get("instance_info", information)),
        _ => Err(call.unknown()),
    },
    groups: &[],
};

/// Answer of `GET /`.
#[derive(Clone, Debug, Serialize)]
struct InstanceInformation {
    /// The program's name.
    app_name: &'static str,
    /// The instance's name.
    id: String,
    /// `Not started`, `Running` or `Paused`.
    state: &'static str,
    /// Version of the API's model.
    vmm_version: &'static str,
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
