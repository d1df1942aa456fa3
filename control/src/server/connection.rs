//! One client: its requests, what it gets, and the order of both.

use std::io;

use bantam_serving::Place;
use bantam_vmm::{Answer, Command};
use nix::unistd::geteuid;
use tokio::net::UnixStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::{task, time};

use super::output::Output;
use super::subscription::Subscription;
use super::{MAX_COMMANDS, Shared};
use crate::line_buffer::{LineBuffer, LineTooLong};
use crate::present_machine::is_quick;
use crate::protocol::{
    Action, ErrorKind, Greeting, MAX_LINE_SIZE, Message, Refusal, Reply, Request,
};

/// How much is received at once.
const CHUNK_SIZE: usize = 16 << 10;

/// A client that is connected.
pub(super) struct Connection {
    stream: UnixStream,
    place: Place,
    shared: Shared,
    requests: LineBuffer,
    /// Whether no more requests are received.
    is_closing: bool,
    output: Output,
    /// The commands that the other thread executes, or is going to, and where their replies come in.
    pending: usize,
    reply_sender: UnboundedSender<Reply>,
    replies: UnboundedReceiver<Reply>,
    subscription: Option<Subscription>,
}

/// Why a connection ends before its client ends it.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("its place is needed for another")]
    PlaceNeeded,
    #[error("it does not receive what it has asked for")]
    Stalled,
    #[error("cannot tell its user: {0}")]
    UnknownUser(io::Error),
    #[error("cannot follow the events of the next machine: {0}")]
    Events(io::Error),
    #[error(transparent)]
    Stream(#[from] io::Error),
}

impl Connection {
    /// Serves a client until it closes its end, its place is needed for another, or all clients are to leave.
    pub(super) async fn serve(
        stream: UnixStream,
        place: Place,
        shared: Shared,
    ) -> Result<(), ConnectionError> {
        let user = stream
            .peer_cred()
            .map_err(ConnectionError::UnknownUser)?
            .uid();
        let (reply_sender, replies) = mpsc::unbounded_channel();
        let mut connection = Connection {
            stream,
            place,
            shared,
            requests: LineBuffer::new(MAX_LINE_SIZE),
            is_closing: false,
            output: Output::new(),
            pending: 0,
            reply_sender,
            replies,
            subscription: None,
        };
        match user == 0 || user == geteuid().as_raw() {
            true => connection.output.push(&Message::Greeting(Greeting::new())),
            false => connection.turn_away(user),
        }
        connection.run().await
    }

    fn turn_away(&mut self, user: u32) {
        tracing::warn!("control socket: user {user} may not control the machine");
        let reason = "only the user of the machine's process, and root, may control it";
        let refusal = Message::refusal(None, ErrorKind::Denied, reason);
        self.output.push(&refusal);
        self.is_closing = true;
    }

    async fn run(mut self) -> Result<(), ConnectionError> {
        loop {
            self.take_requests();
            self.take_events()?;
            let was_full = !self.output.has_room();
            self.output.send(&self.stream)?;
            let has_room = self.output.has_room();
            if was_full && has_room {
                // More requests or events may wait already.
                task::yield_now().await;
                continue;
            }
            let is_sending = !self.output.is_empty();
            if self.is_closing && self.pending == 0 && !is_sending {
                return Ok(());
            }
            self.note_who_waits();
            tokio::select! {
                () = self.place.needed() => return Err(ConnectionError::PlaceNeeded),
                () = self.place.leaving(), if !self.is_closing => self.is_closing = true,
                ready = self.stream.readable(), if has_room && !self.is_closing => {
                    ready?;
                    self.receive()?;
                }
                ready = self.stream.writable(), if is_sending => ready?,
                Some(reply) = self.replies.recv() => {
                    self.pending -= 1;
                    self.output.push(&Message::Reply(reply));
                }
                ready = has_events(&self.subscription), if has_room => {
                    ready.map_err(ConnectionError::Events)?;
                }
                () = time::sleep_until(self.output.deadline()), if is_sending => {
                    return Err(ConnectionError::Stalled);
                }
            }
        }
    }

    /// A client that waits for the server keeps its place; one that the server waits for may lose it.
    fn note_who_waits(&self) {
        match self.pending > 0 || self.subscription.is_some() {
            true => self.place.work(),
            false => self.place.wait_for_client(),
        }
    }

    /// Receives what the client has sent.
    fn receive(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK_SIZE];
        match self.stream.try_read(&mut chunk) {
            // A client that can no longer unsubscribe gets no more events.
            Ok(0) => {
                self.is_closing = true;
                self.subscription = None;
            }
            Ok(count) => self.requests.push(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Takes the requests that have been received, as far as there is room for replies.
    fn take_requests(&mut self) {
        while self.output.has_room() {
            let parsed = match self.requests.next_line() {
                Ok(Some(line)) => Request::parse(line),
                Ok(None) => return,
                Err(LineTooLong) => {
                    // What follows could be anything.
                    if !std::mem::replace(&mut self.is_closing, true) {
                        let reason = format!("a line is longer than {MAX_LINE_SIZE} bytes");
                        let refusal = Message::refusal(None, ErrorKind::InvalidRequest, reason);
                        self.output.push(&refusal);
                    }
                    return;
                }
            };
            match parsed {
                Ok(request) => self.answer(request),
                Err(refusal) => self.output.push(&Message::Reply(refusal)),
            }
        }
    }

    /// Answers a request, or has the other thread do so.
    fn answer(&mut self, Request { id, action }: Request) {
        let result = match action {
            Action::Command(command) if is_quick(&command) => {
                self.shared.machine.execute(*command).map_err(Refusal::from)
            }
            Action::Command(command) => match self.execute_apart(id, *command) {
                Ok(()) => return,
                Err(refusal) => Err(refusal),
            },
            Action::Subscribe(true) if self.subscription.is_some() => Ok(Answer::Done),
            Action::Subscribe(true) => {
                Subscription::new(&self.shared.machine).map(|subscription| {
                    self.subscription = Some(subscription);
                    Answer::Done
                })
            }
            Action::Subscribe(false) => {
                self.subscription = None;
                Ok(Answer::Done)
            }
        };
        let id = Some(id);
        self.output.push(&Message::Reply(Reply { id, result }));
    }

    /// Has the other thread execute a command after those before it, even if the client leaves meanwhile.
    fn execute_apart(&mut self, id: u64, command: Command) -> Result<(), Refusal> {
        let Ok(permit) = self.shared.commands.clone().try_acquire_owned() else {
            let reason = format!("{MAX_COMMANDS} commands are under way; try again later");
            return Err(Refusal::new(ErrorKind::Busy, reason));
        };
        let machine = self.shared.machine.clone();
        let replies = self.reply_sender.clone();
        self.pending += 1;
        tokio::spawn(async move {
            let executed = task::spawn_blocking(move || machine.execute(command)).await;
            let result = match executed {
                Ok(result) => result.map_err(Refusal::from),
                Err(error) => {
                    let reason = format!("the command has failed, which is a bug: {error}");
                    Err(Refusal::new(ErrorKind::Failed, reason))
                }
            };
            drop(permit);
            let id = Some(id);
            // It fails if the client has left.
            let _ = replies.send(Reply { id, result });
        });
        Ok(())
    }

    /// Takes the events that have happened, as far as there is room for them.
    fn take_events(&mut self) -> Result<(), ConnectionError> {
        while self.output.has_room()
            && let Some(subscription) = &mut self.subscription
            && let Some(event) = subscription.try_next().map_err(ConnectionError::Events)?
        {
            self.output.push(&Message::Event(event));
        }
        Ok(())
    }
}

/// Waits until there may be events; without a subscription for ever.
async fn has_events(subscription: &Option<Subscription>) -> io::Result<()> {
    match subscription {
        Some(subscription) => subscription.ready().await,
        None => std::future::pending().await,
    }
}
