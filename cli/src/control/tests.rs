use bantam_vmm::config::MachineConfig;
use bantam_vmm::{Answer, DeviceAnswer, ShutDown};
use clap::Parser;
use serde_json::json;

use super::output::{answer, event};
use super::*;
use crate::args::{Args, Command as Subcommand};

fn parsed(line: &[&str]) -> Result<ControlArgs, String> {
    let line = ["bantam", "control", "machine.sock"].iter().chain(line);
    match Args::try_parse_from(line)
        .map_err(|error| error.to_string())?
        .command
    {
        Subcommand::Control(args) => Ok(*args),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_format_may_come_before_or_after_the_command() {
    for line in [["--output", "json", "query"], ["query", "--output", "json"]] {
        assert_eq!(parsed(&line).unwrap().output, Output::Json);
    }
    let args = parsed(&["shutdown"]).unwrap();
    assert_eq!(args.output, Output::Human);
    let ControlCommand::Shutdown { timeout } = args.command else {
        panic!("{args:?}");
    };
    assert_eq!(timeout.get().as_secs(), 10);
}

#[test]
fn a_command_in_json_is_checked_before_it_is_sent() {
    let args = parsed(&["json", r#"{"shut-down":{"timeout":{"secs":1,"nanos":0}}}"#]);
    assert!(matches!(args.unwrap().command, ControlCommand::Json { .. }));
    let error = parsed(&["json", r#""explode""#]).unwrap_err();
    assert!(error.contains("unknown variant `explode`"), "{error}");
    assert!(parsed(&[]).is_err());
}

#[test]
fn answers_are_for_people_or_programs() {
    let config = MachineConfig::new("vmlinux");
    for (of_machine, text, value) in [
        (Answer::Done, "done", json!("done")),
        (
            Answer::State(State::NotConfigured),
            "not configured",
            json!({"state": "not-configured"}),
        ),
        (
            Answer::ShutDown(ShutDown::PowerCut),
            "the power is cut",
            json!({"shut-down": "power-cut"}),
        ),
        (
            Answer::Metrics(json!({"a": {"b": [1, "c"]}, "d": null})),
            "a.b.0 1\na.b.1 c\nd null",
            json!({"metrics": {"a": {"b": [1, "c"]}, "d": null}}),
        ),
        (
            Answer::Device(DeviceAnswer::Size(7)),
            r#"{"device":{"size":7}}"#,
            json!({"device": {"size": 7}}),
        ),
    ] {
        assert_eq!(answer(&of_machine, Output::Human).unwrap(), text);
        let line = answer(&of_machine, Output::Json).unwrap();
        assert_eq!(line, value.to_string());
    }
    let file = answer(&Answer::Configuration(Box::new(config)), Output::Human).unwrap();
    assert_eq!(file, "kernel = \"vmlinux\"");
}

#[test]
fn an_event_is_one_line() {
    let device = "disk0".parse().unwrap();
    let failed = Event::HostError {
        device,
        text: "no room".to_owned(),
    };
    assert_eq!(event(&failed, Output::Human).unwrap(), "disk0: no room");
    let line = event(&failed, Output::Json).unwrap();
    assert_eq!(
        line,
        r#"{"event":"host-error","device":"disk0","text":"no room"}"#
    );
}
