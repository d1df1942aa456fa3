//! A client of a control socket.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bantam_vmm::{Answer, Command, Event};
use nix::errno::Errno;
use nix::sys::socket::sockopt::SendTimeout;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

use crate::error::ControlError;
use crate::line_buffer::{LineBuffer, LineTooLong};
use crate::protocol::{Action, Greeting, MAX_LINE_SIZE, Message, PROTOCOL_VERSION, Reply, Request};

/// How long a server may take to accept a client and greet it.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// How long a command may take by default. Some have to wait for those before them.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// Maximum number of events that wait to be taken by the client's owner.
const EVENT_CAPACITY: usize = 1024;
/// Most descriptors that the kernel passes beside a message (`SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 253;
/// How much is received at once.
const CHUNK_SIZE: usize = 16 << 10;

/// A client of the control socket of a machine. One thread uses it, and waits for each answer.
#[derive(Debug)]
pub struct ControlClient {
    stream: UnixStream,
    received: LineBuffer,
    /// The descriptors that were received last, until the line that they belong to is read.
    descriptors: Vec<OwnedFd>,
    greeting: Greeting,
    last_id: u64,
    answer_time: Duration,
    /// The events that have come while the client waited for an answer.
    events: VecDeque<Event>,
    /// How many more have come for which there was no room.
    missed: u64,
}

impl ControlClient {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// If there is none, it is out of use, or it refuses this client.
    pub fn connect(path: &Path) -> Result<ControlClient, ControlError> {
        let stream =
            connect_within(path, GREETING_TIME).map_err(|error| connection_error(path, error))?;
        let mut client = ControlClient {
            stream,
            received: LineBuffer::new(MAX_LINE_SIZE),
            descriptors: Vec::new(),
            greeting: Greeting::new(),
            last_id: 0,
            answer_time: ANSWER_TIME,
            events: VecDeque::new(),
            missed: 0,
        };
        let deadline = Instant::now() + GREETING_TIME;
        let greeting = match client.receive(Some(deadline)) {
            Ok(Some(Message::Greeting(greeting))) => greeting,
            Ok(Some(Message::Reply(Reply {
                result: Err(refusal),
                ..
            }))) => return Err(ControlError::Refused(refusal)),
            Ok(Some(_)) => {
                return Err(ControlError::Foreign {
                    reason: "it does not begin with a greeting".to_owned(),
                });
            }
            Ok(None) => {
                let seconds = GREETING_TIME.as_secs();
                let reason = format!("it sends no greeting within {seconds} s");
                return Err(ControlError::Foreign { reason });
            }
            Err(error) => return Err(error),
        };
        if greeting.protocol != PROTOCOL_VERSION {
            let found = greeting.protocol;
            return Err(ControlError::Version { found });
        }
        client.greeting = greeting;
        Ok(client)
    }

    /// Returns what the server has said of itself.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Sets how long an answer may take; a minute by default.
    pub fn set_answer_time(&mut self, time: Duration) {
        self.answer_time = time;
    }

    /// Has the machine execute `command`, and waits for the answer. Without an answer in time the command may
    /// still be executed later, and the client can be used for others.
    ///
    /// # Errors
    /// [`ControlError::Refused`] if the machine refuses it; otherwise if there is no answer.
    pub fn execute(&mut self, command: Command) -> Result<Answer, ControlError> {
        self.request(Action::Command(Box::new(command)))
    }

    /// Subscribes to the events of the machine from now on, which [`ControlClient::next_event`] returns. If the
    /// program that owns the machine starts it again, the events of the next machine follow.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn subscribe(&mut self) -> Result<(), ControlError> {
        self.request(Action::Subscribe(true)).map(drop)
    }

    /// Waits for the next event, up to `time` if that is given. Returns `None` if there is none by then.
    ///
    /// # Errors
    /// [`ControlError::Ended`] if there are no more, as the process of the machine has ended.
    pub fn next_event(&mut self, time: Option<Duration>) -> Result<Option<Event>, ControlError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        if self.missed > 0 {
            let count = std::mem::take(&mut self.missed);
            return Ok(Some(Event::Missed { count }));
        }
        // A time beyond the range of the clock never comes.
        let deadline = time.and_then(|time| Instant::now().checked_add(time));
        loop {
            match self.receive(deadline)? {
                Some(Message::Event(event)) => return Ok(Some(event)),
                // The reply to a request that was given up.
                Some(Message::Reply(_) | Message::Greeting(_)) => {}
                None => return Ok(None),
            }
        }
    }

    fn request(&mut self, action: Action) -> Result<Answer, ControlError> {
        self.last_id += 1;
        let id = self.last_id;
        let mut line =
            serde_json::to_vec(&Request { id, action }).map_err(ControlError::Command)?;
        line.push(b'\n');
        if line.len() > MAX_LINE_SIZE {
            return Err(ControlError::TooLong);
        }
        let deadline = Instant::now().checked_add(self.answer_time);
        self.send(&line)?;
        loop {
            match self.receive(deadline)? {
                Some(Message::Reply(reply)) if reply.id.is_none_or(|found| found == id) => {
                    return reply.result.map_err(ControlError::Refused);
                }
                // The reply to a request that was given up.
                Some(Message::Reply(_) | Message::Greeting(_)) => {}
                Some(Message::Event(event)) => self.keep(event),
                None => return Err(self.timed_out()),
            }
        }
    }

    fn keep(&mut self, event: Event) {
        match self.missed == 0 && self.events.len() < EVENT_CAPACITY {
            true => self.events.push_back(event),
            false => self.missed = self.missed.saturating_add(1),
        }
    }

    fn timed_out(&self) -> ControlError {
        ControlError::TimedOut {
            seconds: self.answer_time.as_secs(),
        }
    }

    fn send(&mut self, line: &[u8]) -> Result<(), ControlError> {
        // A timeout of zero would be none.
        let time = self.answer_time.max(Duration::from_millis(1));
        self.stream.set_write_timeout(Some(time))?;
        self.stream
            .write_all(line)
            .map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => self.timed_out(),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Ended,
                _ => error.into(),
            })
    }

    /// Returns what the server sends next, or `None` if nothing comes by `deadline`.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<Option<Message>, ControlError> {
        let foreign = |reason: String| ControlError::Foreign { reason };
        loop {
            match self.received.next_line() {
                Ok(Some(line)) => {
                    let message = serde_json::from_slice::<Message>(line).map_err(|error| {
                        foreign(format!("a line of it has another form: {error}"))
                    });
                    let message = message?.with_descriptors(&mut self.descriptors);
                    return Ok(Some(message));
                }
                Ok(None) => {}
                Err(LineTooLong) => return Err(foreign("a line of it is too long".to_owned())),
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.stream.set_read_timeout(left)?;
            let mut chunk = [0; CHUNK_SIZE];
            match receive_with_descriptors(&self.stream, &mut chunk, &mut self.descriptors) {
                Ok(0) => return Err(ControlError::Ended),
                Ok(count) => self.received.push(chunk.get(..count).unwrap_or_default()),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Err(ControlError::Ended),
                    _ => return Err(error.into()),
                },
            }
        }
    }
}

/// Receives bytes, and in `descriptors` those that are passed beside them, if there are any.
fn receive_with_descriptors(
    stream: &UnixStream,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut vectors = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut vectors, Some(&mut space), flags)?;
    // It fails if this process is out of descriptors. Those that there was room for stay open.
    let controls = message.cmsgs().map_err(|_| Errno::EMFILE)?;
    let rights = controls.filter_map(|control| match control {
        ControlMessageOwned::ScmRights(numbers) => Some(numbers),
        _ => None,
    });
    let received = rights.flatten().map(take_ownership);
    let received: Vec<_> = received.collect();
    if !received.is_empty() {
        *descriptors = received;
    }
    Ok(message.bytes)
}

/// Owns a descriptor that was received just now.
#[expect(unsafe_code)]
fn take_ownership(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has made the descriptor for this process when the message was received, and has told nobody but
    // the caller of its number.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Connects to the socket at `path`. A server that accepts no clients is waited for up to `time`.
fn connect_within(path: &Path, time: Duration) -> io::Result<UnixStream> {
    let stream = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    setsockopt(&stream, SendTimeout, &TimeVal::new(seconds, 0))?;
    let address = UnixAddr::new(path)?;
    loop {
        match connect(stream.as_raw_fd(), &address) {
            Err(Errno::EINTR) => {}
            connected => {
                connected?;
                return Ok(stream.into());
            }
        }
    }
}

fn connection_error(path: &Path, error: io::Error) -> ControlError {
    let is_other_file =
        || fs::metadata(path).is_ok_and(|metadata| !metadata.file_type().is_socket());
    match error.kind() {
        io::ErrorKind::NotFound => ControlError::NoSocket,
        io::ErrorKind::PermissionDenied => ControlError::Denied,
        io::ErrorKind::ConnectionRefused if is_other_file() => ControlError::NotASocket,
        io::ErrorKind::ConnectionRefused => ControlError::Abandoned,
        // The time that the socket's option allows is over.
        io::ErrorKind::WouldBlock => ControlError::TimedOut {
            seconds: GREETING_TIME.as_secs(),
        },
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests;
