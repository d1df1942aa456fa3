//! `/actions`: the start, Ctrl-Alt-Del, and metrics on demand.

use bantam_vmm::{Error, KeyboardError};
use serde::Deserialize;

use crate::fault::Fault;
use crate::instance::Instance;
use crate::method::Method;
use crate::request::Request;
use crate::resources::resource::Resource;

pub(super) const RESOURCE: Resource = Resource {
    path: "actions",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, []) => {
            let Action { action_type } = call.json()?;
            Ok(Request::change(Method::Put, "actions", move |instance| {
                act(action_type, instance)
            }))
        }
        _ => Err(call.unknown()),
    },
    groups: &[],
};

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    /// The action.
    action_type: ActionType,
}

/// What `PUT /actions` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum ActionType {
    /// Writes the metrics now.
    FlushMetrics,
    /// Starts the machine.
    InstanceStart,
    /// Presses Ctrl-Alt-Del on the guest's keyboard.
    SendCtrlAltDel,
}

fn act(action: ActionType, instance: &mut Instance) -> Result<(), Fault> {
    match action {
        ActionType::InstanceStart => instance.start(),
        ActionType::SendCtrlAltDel => {
            instance.view().require_started()?;
            match instance.controller().press_ctrl_alt_del() {
                // A guest without a driver for the keyboard may have one for the power button.
                Err(Error::Keyboard(KeyboardError::Disabled)) => {
                    Ok(instance.controller().press_power_button()?)
                }
                pressed => Ok(pressed?),
            }
        }
        ActionType::FlushMetrics => {
            instance.view().require_started()?;
            let flushed = instance.view().flush_metrics();
            flushed.map_err(|error| Fault::Value {
                what: "metrics file",
                reason: error.to_string(),
            })
        }
    }
}
