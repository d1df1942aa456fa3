//! The lines that a client has yet to receive.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::protocol::Message;

/// How much may wait before no more requests and events are taken for the client. A message may be larger.
const CAPACITY: usize = 64 << 10;
/// How long a client may go without receiving anything that waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A line with the descriptors that are passed beside its first byte.
#[derive(Debug)]
struct Line {
    bytes: Vec<u8>,
    descriptors: Vec<Arc<OwnedFd>>,
}

/// The lines that wait to be sent to a client. Each is sent by itself.
#[derive(Debug)]
pub(super) struct Output {
    lines: VecDeque<Line>,
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
        let bytes = message.to_line();
        self.size += bytes.len();
        let descriptors = message.descriptors().to_vec();
        self.lines.push_back(Line { bytes, descriptors });
    }

    /// Sends what `stream` takes now.
    ///
    /// # Errors
    /// If the client has closed the connection.
    pub(super) fn send(&mut self, stream: &UnixStream) -> io::Result<()> {
        while let Some(line) = self.lines.front() {
            let rest = line.bytes.get(self.sent..).unwrap_or_default();
            let sent = match line.descriptors.is_empty() || self.sent > 0 {
                true => stream.try_write(rest),
                false => send_with_descriptors(stream, rest, &line.descriptors),
            };
            match sent {
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

/// Sends what `stream` takes of `bytes` now, with `descriptors` beside the first.
fn send_with_descriptors(
    stream: &UnixStream,
    bytes: &[u8],
    descriptors: &[Arc<OwnedFd>],
) -> io::Result<usize> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    stream.try_io(Interest::WRITABLE, || {
        let control = [ControlMessage::ScmRights(&numbers)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &control,
            flags,
            None,
        );
        Ok(sent?)
    })
}
