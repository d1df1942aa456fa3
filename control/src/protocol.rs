//! The protocol of a control socket: a stream of lines in each direction, each a JSON object.
//!
//! The server begins with a [`Greeting`]. Then each [`Request`] gets a [`Reply`] with its number, in the order in
//! which they are answered, and a client that has subscribed gets an [`Event`] for what happens to the machine.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bantam_vmm::{Answer, Command, Error, Event};
use serde::{Deserialize, Serialize};

/// Version of the protocol. A later one is for changes that a client of this one would not understand.
pub const PROTOCOL_VERSION: u32 = 1;

/// Maximum size of a line in bytes, with the line feed at its end.
pub const MAX_LINE_SIZE: usize = 1 << 20;

/// What a server says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Version of the protocol.
    pub protocol: u32,
    /// Version of Bantam.
    pub version: String,
}

impl Greeting {
    /// Returns the greeting of this version.
    pub(crate) fn new() -> Greeting {
        Greeting {
            protocol: PROTOCOL_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// What a client sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RequestFields", into = "RequestFields")]
pub struct Request {
    /// A number of the client's choice, which the reply has too.
    pub id: u64,
    /// What is asked for.
    pub action: Action,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// To execute a command.
    Command(Box<Command>),
    /// To send events from now on, or to stop that.
    Subscribe(bool),
}

/// The fields of a request.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestFields {
    id: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command: Option<Box<Command>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subscribe: Option<bool>,
}

impl TryFrom<RequestFields> for Request {
    type Error = &'static str;

    fn try_from(fields: RequestFields) -> Result<Request, &'static str> {
        let action = match (fields.command, fields.subscribe) {
            (Some(command), None) => Action::Command(command),
            (None, Some(subscribe)) => Action::Subscribe(subscribe),
            _ => return Err("a request has either a field `command` or a field `subscribe`"),
        };
        let id = fields.id;
        Ok(Request { id, action })
    }
}

impl From<Request> for RequestFields {
    fn from(request: Request) -> RequestFields {
        let (command, subscribe) = match request.action {
            Action::Command(command) => (Some(command), None),
            Action::Subscribe(subscribe) => (None, Some(subscribe)),
        };
        RequestFields {
            id: request.id,
            command,
            subscribe,
        }
    }
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// The reply to a line that is not a request, with its number if that can be read.
    pub(crate) fn parse(line: &[u8]) -> Result<Request, Reply> {
        /// All that is needed to refuse a request.
        #[derive(Deserialize)]
        struct Numbered {
            id: u64,
        }
        serde_json::from_slice(line).map_err(|error| {
            let numbered = serde_json::from_slice::<Numbered>(line);
            let refusal = Refusal::new(
                ErrorKind::InvalidRequest,
                format!("invalid request: {error}"),
            );
            Reply {
                id: numbered.ok().map(|numbered| numbered.id),
                result: Err(refusal),
            }
        })
    }
}

/// What a server sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "MessageFields", into = "MessageFields")]
pub enum Message {
    /// The first line.
    Greeting(Greeting),
    /// The answer to a request, or why it is refused.
    Reply(Reply),
    /// Something has happened to the machine.
    Event(Event),
}

/// The reply to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The number of the request. A refusal has none if the number cannot be read, or if it is the client that
    /// is refused.
    pub id: Option<u64>,
    /// The answer to the command. A subscription is answered like a command by [`Answer::Done`].
    pub result: Result<Answer, Refusal>,
}

/// Why a request, or a client, is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The kind of reason, for programs.
    pub kind: ErrorKind,
    /// The reason and a remedy in one line, for people.
    pub message: String,
}

/// The kinds of reasons for a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The line is not a request, is too long, or has an unknown command or field.
    InvalidRequest,
    /// The state of the machine does not allow the command.
    WrongState,
    /// The machine has no such device.
    NoSuchDevice,
    /// Too many clients are connected, or too many commands wait.
    Busy,
    /// The client's user may not control the machine.
    Denied,
    /// The command has failed otherwise.
    #[serde(other)]
    Failed,
}

impl Refusal {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Refusal {
        let message = message.into();
        Refusal { kind, message }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal::new(ErrorKind::of(&error), one_line(&error))
    }
}

impl ErrorKind {
    fn of(error: &Error) -> ErrorKind {
        match error {
            Error::WrongState { .. } => ErrorKind::WrongState,
            Error::NoSuchDevice { .. } => ErrorKind::NoSuchDevice,
            Error::Shared(error) => ErrorKind::of(error),
            _ => ErrorKind::Failed,
        }
    }
}

fn one_line(error: &Error) -> String {
    bantam_vmm::text::without_error_numbers(error.to_string().replace('\n', " "))
}

/// The fields of all that a server sends. A client passes over those that it does not know.
#[derive(Serialize, Deserialize)]
struct MessageFields {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    greeting: Option<Greeting>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answer: Option<Answer>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<Refusal>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    event: Option<Event>,
}

impl From<Message> for MessageFields {
    fn from(message: Message) -> MessageFields {
        let mut fields = MessageFields {
            greeting: None,
            id: None,
            answer: None,
            error: None,
            event: None,
        };
        match message {
            Message::Greeting(greeting) => fields.greeting = Some(greeting),
            Message::Event(event) => fields.event = Some(event),
            Message::Reply(Reply { id, result }) => {
                fields.id = id;
                match result {
                    Ok(answer) => fields.answer = Some(answer),
                    Err(refusal) => fields.error = Some(refusal),
                }
            }
        }
        fields
    }
}

impl TryFrom<MessageFields> for Message {
    type Error = &'static str;

    fn try_from(fields: MessageFields) -> Result<Message, &'static str> {
        let id = fields.id;
        let reply = |result| Ok(Message::Reply(Reply { id, result }));
        match (fields.greeting, fields.answer, fields.error, fields.event) {
            (Some(greeting), None, None, None) => Ok(Message::Greeting(greeting)),
            (None, Some(answer), None, None) => reply(Ok(answer)),
            (None, None, Some(refusal), None) => reply(Err(refusal)),
            (None, None, None, Some(event)) => Ok(Message::Event(event)),
            _ => Err("a line has one of the fields `greeting`, `answer`, `error` and `event`"),
        }
    }
}

impl Message {
    /// Returns the message as a line. An answer that cannot be one is replaced by the reason why not.
    pub(crate) fn to_line(&self) -> Vec<u8> {
        let reason = match serde_json::to_vec(self) {
            Ok(mut line) if line.len() < MAX_LINE_SIZE => {
                line.push(b'\n');
                return line;
            }
            Ok(_) => format!("the answer is longer than a line may be, {MAX_LINE_SIZE} bytes"),
            Err(error) => format!("the answer cannot be sent: {error}"),
        };
        let id = match self {
            Message::Reply(reply) => reply.id,
            Message::Greeting(_) | Message::Event(_) => None,
        };
        Message::refusal(id, ErrorKind::Failed, reason).to_line()
    }

    /// Returns the descriptors that are passed beside the line.
    pub(crate) fn descriptors(&self) -> &[Arc<OwnedFd>] {
        match self {
            Message::Reply(Reply {
                result: Ok(Answer::Forked(forked)),
                ..
            }) => &forked.snapshot.0,
            _ => &[],
        }
    }

    /// Adds `descriptors`, which were received beside the line, if it is one that has some.
    pub(crate) fn with_descriptors(mut self, descriptors: &mut Vec<OwnedFd>) -> Message {
        if let Message::Reply(Reply {
            result: Ok(Answer::Forked(forked)),
            ..
        }) = &mut self
        {
            forked.snapshot.0 = descriptors.drain(..).map(Arc::new).collect();
        }
        self
    }

    pub(crate) fn refusal(id: Option<u64>, kind: ErrorKind, reason: impl Into<String>) -> Message {
        Message::Reply(Reply {
            id,
            result: Err(Refusal::new(kind, reason)),
        })
    }
}

#[cfg(test)]
mod tests;
