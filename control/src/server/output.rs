//! The lines that a client has yet to receive.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::protocol::Message;

/// How much may wait before no more requests and events are taken for the client. A message may be larger.
const CAPACITY: usize = 64 << 10;
/// How long a client may go without receiving anything that waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The lines that wait to be sent to a client. Each is sent by itself, so that a descriptor could go with it.
#[derive(Debug)]
pub(super) struct Output {
    lines: VecDeque<Vec<u8>>,
    /// How much of the first line has been sent.
    sent: usize,
    /// Size of what waits.
    size: usize,
    /// When the client is given up, if something waits.
    deadline: Instant,
}

impl Output {
    pub(super) fn new() -> Output {
        Output {
            lines: VecDeque::new(),
            sent: 0,
            size: 0,
            deadline: Instant::now(),
        }
    }

    /// Whether more is to be taken for the client.
    pub(super) fn has_room(&self) -> bool {
        self.size < CAPACITY
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Returns when a client that receives nothing of what waits for it is given up.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(super) fn push(&mut self, message: &Message) {
        if self.lines.is_empty() {
            self.deadline = Instant::now() + PATIENCE;
        }
        let line = message.to_line();
        self.size += line.len();
        self.lines.push_back(line);
    }

    /// Sends what `stream` takes now.
    ///
    /// # Errors
    /// If the client has closed the connection.
    pub(super) fn send(&mut self, stream: &UnixStream) -> io::Result<()> {
        while let Some(line) = self.lines.front() {
            let rest = line.get(self.sent..).unwrap_or_default();
            match stream.try_write(rest) {
                Ok(count) => {
                    self.size -= count;
                    self.sent += count;
                    if count == rest.len() {
                        self.lines.pop_front();
                        self.sent = 0;
                    }
                    self.deadline = Instant::now() + PATIENCE;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
