//! `bantam events`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Error};
use bantam_manager::{Machine, MachineName, Manager};
use bantam_vmm::Event;
use serde_json::{Value, json};

use super::args::{EventsArgs, Output};
use super::{machine, print, print_json};
use crate::control;
use crate::local_time::local_time;

pub fn events(args: &EventsArgs) -> anyhow::Result<()> {
    match &args.name {
        Some(name) => {
            let machine = machine(name)?;
            let take = |event: &Event| show(name, event, args.output);
            machine.follow::<Error>(take)
        }
        None => Manager::of_user()?
            .follow::<Error>(|machine: &Machine, event| show(machine.name(), event, args.output)),
    }
}

fn show(name: &MachineName, event: &Event, output: Output) -> anyhow::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    if output == Output::Text {
        let text = control::describe_event(event)?;
        return print(&format!("{} {name}: {text}\n", local_time(now.as_secs())));
    }
    let mut line = json!({"time": now.as_secs_f64(), "machine": name});
    let event = serde_json::to_value(event).context("cannot write JSON")?;
    if let (Value::Object(line), Value::Object(event)) = (&mut line, event) {
        line.extend(event);
    }
    print_json(&line)
}
