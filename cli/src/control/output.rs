//! Answers and events as text.

use std::fmt::Write;

use bantam_vmm::{Answer, DeviceAnswer, Event, JobState, ShutDown};
use serde::Serialize;
use serde_json::Value;

use super::Output;

/// Returns an answer in the form that `format` says.
pub fn answer(answer: &Answer, format: Output) -> serde_json::Result<String> {
    Ok(match (format, answer) {
        (Output::Json, answer) => return json(answer),
        (Output::Human, Answer::Done | Answer::Device(DeviceAnswer::Done)) => "done".to_owned(),
        (Output::Human, Answer::State(state)) => state.to_string(),
        (Output::Human, Answer::ShutDown(how)) => match how {
            ShutDown::PowerButton => "the guest is asked to shut down, by the power button",
            ShutDown::CtrlAltDel => "the guest is asked to shut down, by Ctrl-Alt-Del",
            ShutDown::PowerCut => "the power is cut",
            ShutDown::Unheard => "the guest cannot be asked to shut down",
        }
        .to_owned(),
        (Output::Human, Answer::Configuration(config)) => config.to_toml().trim_end().to_owned(),
        (Output::Human, Answer::Metrics(counters)) => lines(counters),
        (Output::Human, other) => return json(other),
    })
}

/// Returns an event in the form that `format` says.
pub fn event(event: &Event, format: Output) -> serde_json::Result<String> {
    Ok(match (format, event) {
        (Output::Json, event) => return json(event),
        (Output::Human, Event::State { state }) => format!("the machine is {state}"),
        (Output::Human, Event::Attached { device }) => format!("{device}: attached"),
        (Output::Human, Event::Detached { device }) => format!("{device}: detached"),
        (Output::Human, Event::NeedsReset { device, reason }) => {
            format!("{device}: needs a reset by its driver: {reason}")
        }
        (Output::Human, Event::HostError { device, text }) => format!("{device}: {text}"),
        (Output::Human, Event::MemoryReturned { device, mib }) => {
            format!("{device}: {mib} MiB returned to the host")
        }
        (Output::Human, Event::MemoryLost { reason }) => reason.clone(),
        (Output::Human, Event::Job { device, status }) => {
            let state = match &status.state {
                JobState::Copying => "is copying".to_owned(),
                JobState::Ready => "is ready to be finished".to_owned(),
                JobState::Ending => "is ending".to_owned(),
                JobState::Finished => "is finished".to_owned(),
                JobState::Cancelled => "is cancelled".to_owned(),
                JobState::Failed { reason } => format!("has failed: {reason}"),
            };
            format!(
                "{device}: the job {state} ({} of {} bytes)",
                status.done, status.total
            )
        }
        (Output::Human, Event::Missed { count }) => format!("{count} events were missed here"),
        (Output::Human, other) => return json(other),
    })
}

fn json(value: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string(value)
}

/// Returns a line for each number or text in `value`, after the names that lead to it.
fn lines(value: &Value) -> String {
    let mut text = String::new();
    add_lines(&mut text, "", value);
    text.truncate(text.trim_end().len());
    text
}

fn add_lines(text: &mut String, name: &str, value: &Value) {
    let inner = |part: &str| match name {
        "" => part.to_owned(),
        name => format!("{name}.{part}"),
    };
    match value {
        Value::Object(fields) => {
            for (part, value) in fields {
                add_lines(text, &inner(part), value);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                add_lines(text, &inner(&index.to_string()), value);
            }
        }
        value => {
            // A string takes everything.
            let _ = match value {
                Value::String(value) => writeln!(text, "{name} {value}"),
                value => writeln!(text, "{name} {value}"),
            };
        }
    }
}
