//! `/vm`: whether the machine runs, and its whole configuration.

use std::time::Instant;

use bantam_vmm::State;
use serde::Deserialize;

use crate::fault::Fault;
use crate::instance::Instance;
use crate::method::Method;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::resource::Resource;

pub(super) const RESOURCE: Resource = Resource {
    path: "vm",
    parse: |call| match (call.method, call.rest) {
        (Method::Get, ["config"]) => Ok(Request::get("vm_config", |view| {
            Reply::value(&*view.configuration())
        })),
        (Method::Patch, []) => {
            let Vm { state } = call.json()?;
            let received = Instant::now();
            Ok(Request::patch("vm", move |instance| {
                instance
                    .view()
                    .timed(state.latency(), received, || go_to(state, instance))
            }))
        }
        _ => Err(call.unknown()),
    },
    groups: &[],
};

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    /// The state wanted.
    state: VmState,
}

/// A state that a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum VmState {
    /// The vCPUs are stopped.
    Paused,
    /// The vCPUs run.
    Resumed,
}

impl VmState {
    /// What the metrics call the way there.
    fn latency(self) -> &'static str {
        match self {
            VmState::Paused => "pause_vm",
            VmState::Resumed => "resume_vm",
        }
    }
}

/// Pauses or resumes the machine, unless it is in the wanted state already.
fn go_to(wanted: VmState, instance: &Instance) -> Result<(), Fault> {
    instance.view().require_started()?;
    let controller = instance.controller();
    match (wanted, controller.state()) {
        (VmState::Paused, State::Paused) | (VmState::Resumed, State::Running) => Ok(()),
        (VmState::Paused, _) => Ok(controller.pause()?),
        (VmState::Resumed, _) => Ok(controller.resume()?),
    }
}
