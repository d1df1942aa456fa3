//! The states of machines that run, from their processes.
//!
//! All are asked before the first has answered, and the request is sent before the greeting is there, so that each process
//! has to wake up only once.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bantam_control::protocol::{Action, Message, Request};
use bantam_vmm::{Answer, Command};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::machine::{Machine, MachineState};

/// How long the answers may take.
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// Most bytes that a process may send before its answer.
const MAX_SIZE: usize = 64 << 10;
/// The number of the request.
const ID: u64 = 1;

/// A machine that is asked.
struct Asked {
    /// Its place in the answers.
    place: usize,
    stream: UnixStream,
    received: Vec<u8>,
}

/// Returns the states of machines that have a process. One that does not answer in time is [`MachineState::Unresponsive`].
pub(crate) fn states(machines: &[&Machine]) -> Vec<MachineState> {
    let mut states = vec![MachineState::Unresponsive; machines.len()];
    let mut waiting = Vec::new();
    for (place, machine) in machines.iter().enumerate() {
        match ask(&machine.control_socket()) {
            Ok(stream) => waiting.push(Asked {
                place,
                stream,
                received: Vec::new(),
            }),
            // Its process has not come that far.
            Err(Errno::ENOENT | Errno::ECONNREFUSED) => {
                if let Some(state) = states.get_mut(place) {
                    *state = MachineState::Starting;
                }
            }
            Err(_) => {}
        }
    }
    let deadline = Instant::now() + ANSWER_TIME;
    while !waiting.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds: Vec<_> = waiting
            .iter()
            .map(|asked| PollFd::new(asked.stream.as_fd(), PollFlags::POLLIN))
            .collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(1..) | Err(Errno::EINTR) if !left.is_zero() => {}
            _ => break,
        }
        let ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let mut ready = ready.into_iter();
        waiting.retain_mut(|asked| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            let Some(found) = asked.receive() else {
                return true;
            };
            if let Some(state) = states.get_mut(asked.place) {
                *state = found;
            }
            false
        });
    }
    states
}

/// Connects to the control socket at `path`, and asks for the state.
fn ask(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(path)?)?;
    let mut stream = UnixStream::from(stream);
    let request = Request {
        id: ID,
        action: Action::Command(Box::new(Command::Query)),
    };
    let mut line = serde_json::to_vec(&request).map_err(|_| Errno::EINVAL)?;
    line.push(b'\n');
    // A new socket has room for it.
    let sent = stream.write_all(&line);
    sent.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
    Ok(stream)
}

impl Asked {
    /// Receives what is there, and returns the state once it is known.
    fn receive(&mut self) -> Option<MachineState> {
        let mut chunk = [0; 4096];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Some(MachineState::Ending),
                Ok(count) => {
                    let bytes = chunk.get(..count).unwrap_or_default();
                    self.received.extend_from_slice(bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return state_in(&self.received)
                        .or((self.received.len() > MAX_SIZE).then_some(MachineState::Unresponsive));
                }
                Err(_) => return Some(MachineState::Ending),
            }
            if let Some(state) = state_in(&self.received) {
                return Some(state);
            }
        }
    }
}

/// Returns the state in the lines that were received, if they have the answer.
fn state_in(received: &[u8]) -> Option<MachineState> {
    let end = received.iter().rposition(|&byte| byte == b'\n')?;
    let lines = received.get(..end).unwrap_or_default();
    lines.split(|&byte| byte == b'\n').find_map(|line| {
        match serde_json::from_slice::<Message>(line) {
            Ok(Message::Reply(reply)) if reply.id.is_none_or(|id| id == ID) => {
                Some(match reply.result {
                    Ok(Answer::State(state)) => MachineState::of(state),
                    // There are too many clients, for example.
                    _ => MachineState::Unresponsive,
                })
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GREETING: &str = "{\"greeting\":{\"protocol\":1,\"version\":\"0.1.0\"}}\n";

    #[test]
    fn the_answer_is_found_behind_the_greeting() {
        assert_eq!(state_in(GREETING.as_bytes()), None);
        let answer = "{\"id\":1,\"answer\":{\"state\":\"paused\"}}";
        let text = format!("{GREETING}{answer}");
        assert_eq!(state_in(text.as_bytes()), None);
        let text = format!("{text}\n");
        assert_eq!(state_in(text.as_bytes()), Some(MachineState::Paused));
        let refusal = "{\"error\":{\"kind\":\"busy\",\"message\":\"later\"}}\n";
        let found = state_in(refusal.as_bytes());
        assert_eq!(found, Some(MachineState::Unresponsive));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = state_in(&bytes);
        }
    }
}
