use std::time::Duration;

use bantam_vmm::config::MachineConfig;
use bantam_vmm::{
    DeviceCommand, DiskJob, DiskSnapshot, HintingCommand, ImageFormat, Limits, NetLimits,
    RateLimit, State,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn command(command: Command) -> Request {
    Request {
        id: 7,
        action: Action::Command(Box::new(command)),
    }
}

fn device(command: DeviceCommand) -> Command {
    Command::Device {
        name: "disk0".parse().unwrap(),
        command,
    }
}

#[test]
fn a_request_is_one_object() {
    for (request, text) in [
        (
            command(Command::Pause),
            json!({"id": 7, "command": "pause"}),
        ),
        (
            command(Command::ShutDown {
                timeout: Some(Duration::from_millis(1500)),
            }),
            json!({"id": 7, "command": {"shut-down": {"timeout": {"secs": 1, "nanos": 500_000_000}}}}),
        ),
        (
            command(Command::ShutDown { timeout: None }),
            json!({"id": 7, "command": {"shut-down": {}}}),
        ),
        (
            command(Command::PutMetadata(json!({"a": null}))),
            json!({"id": 7, "command": {"put-metadata": {"a": null}}}),
        ),
        (
            Request {
                id: u64::MAX,
                action: Action::Subscribe(true),
            },
            json!({"id": u64::MAX, "subscribe": true}),
        ),
    ] {
        assert_eq!(serde_json::to_value(&request).unwrap(), text);
        assert_eq!(
            Request::parse(text.to_string().as_bytes()).unwrap(),
            request
        );
    }
}

#[test]
fn a_message_is_one_object() {
    let refusal = Refusal::new(ErrorKind::WrongState, "not now");
    for (message, text) in [
        (
            Message::Greeting(Greeting {
                protocol: 1,
                version: "2.0".to_owned(),
            }),
            r#"{"greeting":{"protocol":1,"version":"2.0"}}"#,
        ),
        (
            Message::Reply(Reply {
                id: Some(1),
                result: Ok(Answer::State(State::Running)),
            }),
            r#"{"id":1,"answer":{"state":"running"}}"#,
        ),
        (
            Message::Reply(Reply {
                id: Some(1),
                result: Ok(Answer::Metadata(None)),
            }),
            r#"{"id":1,"answer":{"metadata":null}}"#,
        ),
        (
            Message::Reply(Reply {
                id: Some(2),
                result: Err(refusal.clone()),
            }),
            r#"{"id":2,"error":{"kind":"wrong-state","message":"not now"}}"#,
        ),
        (
            Message::Reply(Reply {
                id: None,
                result: Err(refusal),
            }),
            r#"{"error":{"kind":"wrong-state","message":"not now"}}"#,
        ),
        (
            Message::Event(Event::State {
                state: State::Paused,
            }),
            r#"{"event":{"event":"state","state":"paused"}}"#,
        ),
    ] {
        assert_eq!(message.to_line(), format!("{text}\n").into_bytes());
        assert_eq!(serde_json::from_str::<Message>(text).unwrap(), message);
    }
}

#[test]
fn a_client_passes_over_what_a_later_server_adds() {
    let text = r#"{"id":1,"answer":"done","more":1}"#;
    assert!(serde_json::from_str::<Message>(text).is_ok());
    let text = r#"{"id":1,"error":{"kind":"new","message":"no","more":1}}"#;
    let Message::Reply(reply) = serde_json::from_str(text).unwrap() else {
        panic!("it is a reply");
    };
    assert_eq!(reply.result.unwrap_err().kind, ErrorKind::Failed);
}

#[track_caller]
fn refused(line: &str) -> (Option<u64>, String) {
    let reply = Request::parse(line.as_bytes()).unwrap_err();
    let refusal = reply.result.unwrap_err();
    assert_eq!(refusal.kind, ErrorKind::InvalidRequest);
    assert!(!refusal.message.contains('\n'));
    (reply.id, refusal.message)
}

#[test]
fn what_is_not_a_request_is_refused_with_its_number_if_it_has_one() {
    for line in [
        "",
        "x",
        "[]",
        "{}",
        r#"{"id":-1}"#,
        r#"{"id":"1"}"#,
        "\u{0}",
    ] {
        assert_eq!(refused(line).0, None, "{line}");
    }
    for rest in [
        r#""#,
        r#","command":"explode""#,
        r#","command":"pause","subscribe":true"#,
        r#","command":null"#,
        r#","command":"pause","command":"pause""#,
        r#","command":"pause","more":1"#,
        r#","command":{"pause":1}"#,
        r#","command":{"pause":null,"resume":null}"#,
        r#","subscribe":1"#,
    ] {
        let (id, message) = refused(&format!(r#"{{"id":7{rest}}}"#));
        assert_eq!(id, Some(7), "{rest}");
        assert!(message.starts_with("invalid request: "), "{message}");
    }
    let (_, message) = refused(r#"{"id":7,"command":"explode"}"#);
    assert!(message.contains("unknown variant `explode`"), "{message}");
}

/// Returns all copies of `value` in which one object has one more field.
fn with_unknown_fields(value: &Value) -> Vec<Value> {
    let mut altered = Vec::new();
    match value {
        Value::Object(fields) => {
            let mut more = fields.clone();
            more.insert("unknown".to_owned(), json!(1));
            altered.push(more.into());
            for (name, field) in fields {
                for field in with_unknown_fields(field) {
                    let mut fields = fields.clone();
                    fields.insert(name.clone(), field);
                    altered.push(fields.into());
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                for item in with_unknown_fields(item) {
                    let mut items = items.clone();
                    items[index] = item;
                    altered.push(items.into());
                }
            }
        }
        _ => {}
    }
    altered
}

#[test]
fn unknown_fields_of_commands_are_refused() {
    let limit = RateLimit {
        size: 1,
        refill_time: Duration::from_secs(1),
        one_time_burst: 0,
    };
    let limits = Limits {
        bytes: Some(limit),
        operations: Some(limit),
    };
    for asked in [
        Command::Configure(Box::new(MachineConfig::new("vmlinux"))),
        Command::ShutDown {
            timeout: Some(Duration::from_secs(1)),
        },
        Command::SnapshotDisks(vec![DiskSnapshot {
            disk: "disk0".parse().unwrap(),
            path: "/overlay".into(),
        }]),
        device(DeviceCommand::ReplaceImage {
            path: "/image".into(),
            format: None,
        }),
        device(DeviceCommand::Grow { size: 1 }),
        device(DeviceCommand::StartJob(DiskJob::Copy {
            path: "/copy".into(),
            format: ImageFormat::Raw,
        })),
        device(DeviceCommand::SetLimits(limits)),
        device(DeviceCommand::SetNetLimits(NetLimits {
            receive: limits,
            transmit: limits,
        })),
        device(DeviceCommand::ResizeConsole {
            columns: 1,
            rows: 1,
        }),
        device(DeviceCommand::SetBalloonTarget { mib: 1 }),
        device(DeviceCommand::Hint(HintingCommand::Start {
            acknowledge_on_stop: true,
        })),
    ] {
        let value = serde_json::to_value(command(asked)).unwrap();
        assert!(Request::parse(value.to_string().as_bytes()).is_ok());
        for value in with_unknown_fields(&value) {
            let (id, _) = refused(&value.to_string());
            assert_eq!(id, Some(7), "{value}");
        }
    }
}

#[test]
fn an_answer_that_does_not_fit_into_a_line_is_replaced_by_the_reason() {
    let long = |size| {
        let answer = Answer::Metadata(Some(Value::String("x".repeat(size))));
        let message = Message::Reply(Reply {
            id: Some(7),
            result: Ok(answer),
        });
        message.to_line()
    };
    let frame = long(0).len();
    assert_eq!(long(MAX_LINE_SIZE - frame).len(), MAX_LINE_SIZE);
    let line = long(MAX_LINE_SIZE - frame + 1);
    let Message::Reply(reply) = serde_json::from_slice(&line).unwrap() else {
        panic!("it is a reply");
    };
    assert_eq!(reply.id, Some(7));
    assert!(reply.result.unwrap_err().message.contains("longer"));
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_or_refused_in_one_line(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..64),
            // Something near a request.
            prop::collection::vec(
                prop::sample::select(vec![
                    "{", "}", "[", "]", ":", ",", "\"id\"", "\"command\"", "\"subscribe\"", "\"pause\"",
                    "\"device\"", "\"shut-down\"", "\"timeout\"", "\"secs\"", "1", "-1", "1e400", "null",
                    "true", "\"\\u0000\"", "\"\\ud800\"", "\"", "\\", " ",
                ]),
                0..32,
            )
            .prop_map(|words| words.concat().into_bytes()),
        ],
    ) {
        match Request::parse(&bytes) {
            Ok(request) => {
                let line = serde_json::to_vec(&request).unwrap();
                prop_assert_eq!(Request::parse(&line).unwrap(), request);
            }
            Err(reply) => {
                let message = Message::Reply(reply);
                let line = message.to_line();
                prop_assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
                prop_assert_eq!(serde_json::from_slice::<Message>(&line).unwrap(), message);
            }
        }
    }

    #[test]
    fn a_request_that_was_altered_is_a_request_or_refused(
        place in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let request = command(device(DeviceCommand::Grow { size: 1 << 40 }));
        let mut line = serde_json::to_vec(&request).unwrap();
        let place = place.index(line.len());
        line[place] = byte;
        line.truncate(cut.index(line.len()) + 1);
        let _ = Request::parse(&line);
    }
}
