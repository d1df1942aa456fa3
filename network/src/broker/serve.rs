//! What a broker does: one loop, which waits for all of its clients at once.

use std::convert::Infallible;
use std::io::{self, ErrorKind, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Gid;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, accept_with,
    recv, sendmsg,
};

use super::peer::{self, Peer};
use super::protocol::{Answer, MAX_PACKET_SIZE, MAX_QUEUES, Request};
use crate::networks::Networks;
use crate::{Attachment, NetworkError, NetworkName, Place, Port};

/// Most connections, and most of a user whose requests are not answered yet.
const MAX_CLIENTS: usize = 1024;
const MAX_WAITING_OF_USER: usize = 4;
/// How long a client may take to ask.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// Most connections that are accepted at once.
const MAX_ACCEPTED: usize = 16;
/// How long no connection is accepted if the process has no more descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(200);

/// Opens the tap of a name with up to as many queues as are asked for, and returns them.
pub type OpenTap<'a> = dyn FnMut(&str, u8) -> Result<Vec<OwnedFd>, String> + 'a;

impl Networks {
    /// Gives users places on the network whose folder is `folder`, for clients of `listener`, a socket that
    /// [`Networks::start`] has made. `open_tap` opens the taps, and is told their names and numbers of queues.
    ///
    /// # Errors
    /// If there is no such network, or its clients cannot be waited for.
    pub fn serve_places(
        &self,
        folder: &Path,
        listener: OwnedFd,
        open_tap: &mut OpenTap<'_>,
    ) -> Result<Infallible, NetworkError> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let name: NetworkName = name.parse()?;
        let not_started = || NetworkError::NotStarted {
            name: name.to_string(),
        };
        let state = self.state(name.as_str())?.ok_or_else(not_started)?;
        let group = state.definition.group.ok_or_else(not_started)?.id()?;
        let mut server = Server {
            networks: self.clone(),
            name,
            group,
            listener,
            clients: Vec::new(),
            left: Vec::new(),
            rests_until: None,
            accepts_from: None,
        };
        loop {
            let turn = server.turn(open_tap);
            turn.map_err(NetworkError::netlink("wait for users of the network"))?;
        }
    }
}

struct Server {
    networks: Networks,
    name: NetworkName,
    group: Gid,
    listener: OwnedFd,
    /// In the order in which they have come.
    clients: Vec<Client>,
    /// Places of clients that are gone.
    left: Vec<Port>,
    /// Until then others have the lock under which networks are changed.
    rests_until: Option<Instant>,
    /// From then on connections are accepted again.
    accepts_from: Option<Instant>,
}

struct Client {
    socket: OwnedFd,
    peer: Peer,
    stage: Stage,
}

/// How far a client has come.
enum Stage {
    /// It has yet to ask, until then.
    Asks(Instant),
    /// It has asked, and waits for its turn.
    Waits(Request),
    /// It has a place.
    HasPlace(Port),
    /// It has had a place, and is gone.
    Left(Port),
    /// It is gone without a place, or was refused.
    Over,
}

/// Events of sockets.
struct Occurred {
    /// In the order of the clients.
    of_clients: Vec<PollFlags>,
    of_listener: PollFlags,
}

impl Server {
    /// Waits until there is something to do, and does it.
    fn turn(&mut self, open_tap: &mut OpenTap<'_>) -> io::Result<()> {
        let events = self.wait()?;
        let now = Instant::now();
        for (client, events) in self.clients.iter_mut().zip(&events.of_clients) {
            client.take_events(*events, now);
        }
        let clients = std::mem::take(&mut self.clients).into_iter();
        for client in clients {
            match client.stage {
                Stage::Over => {}
                Stage::Left(port) => self.left.push(port),
                _ => self.clients.push(client),
            }
        }
        if !events.of_listener.is_empty() {
            self.accept(now);
        }
        if self.rests_until.is_none_or(|until| until <= now) {
            self.rests_until = None;
            self.work(open_tap);
        }
        Ok(())
    }

    /// Waits for clients, the end of their time, or that of a rest.
    fn wait(&self) -> io::Result<Occurred> {
        let now = Instant::now();
        let mut deadlines: Vec<Instant> = Vec::new();
        let mut sockets: Vec<PollFd<'_>> = Vec::new();
        let mut has_work = !self.left.is_empty();
        for client in &self.clients {
            let events = match client.stage {
                Stage::Asks(until) => {
                    deadlines.push(until);
                    PollFlags::POLLIN
                }
                // The end of the connection is told in any case.
                _ => PollFlags::empty(),
            };
            has_work |= matches!(client.stage, Stage::Waits(_));
            sockets.push(PollFd::new(client.socket.as_fd(), events));
        }
        if has_work {
            deadlines.push(self.rests_until.unwrap_or(now));
        }
        let accepts = self.accepts_from.is_none_or(|from| from <= now);
        deadlines.extend(self.accepts_from.filter(|_| !accepts));
        let of_listener = match accepts {
            true => PollFlags::POLLIN,
            false => PollFlags::empty(),
        };
        sockets.push(PollFd::new(self.listener.as_fd(), of_listener));
        let timeout = match deadlines.into_iter().min() {
            // Rounded up, as a timeout of zero would be no rest.
            Some(deadline) => {
                let left = deadline.saturating_duration_since(now);
                let left = left.as_nanos().div_ceil(1_000_000);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut sockets, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let events = |socket: &PollFd<'_>| socket.revents().unwrap_or(PollFlags::empty());
        let of_listener = sockets.pop().as_ref().map(events);
        Ok(Occurred {
            of_clients: sockets.iter().map(events).collect(),
            of_listener: of_listener.unwrap_or(PollFlags::empty()),
        })
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..MAX_ACCEPTED {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(error) => {
                    let error = io::Error::from(error);
                    if !matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::ConnectionAborted
                    ) {
                        self.accepts_from = Some(now + ACCEPT_REST);
                    }
                    return;
                }
            };
            match peer::member(socket.as_fd(), self.group) {
                Ok(peer) => match self.has_room_for(peer) {
                    true => self.clients.push(Client {
                        socket,
                        peer,
                        stage: Stage::Asks(now + REQUEST_TIME),
                    }),
                    false => refuse(socket.as_fd(), "too many connections at once; try again"),
                },
                Err(error) => refuse(socket.as_fd(), &format!("cannot tell who you are: {error}")),
            }
        }
    }

    fn has_room_for(&self, peer: Peer) -> bool {
        let waiting = self.clients.iter().filter(|client| {
            client.peer.uid == peer.uid && matches!(client.stage, Stage::Asks(_) | Stage::Waits(_))
        });
        self.clients.len() + self.left.len() < MAX_CLIENTS && waiting.count() < MAX_WAITING_OF_USER
    }

    /// Takes one place back or gives one, and then rests as long as that has taken: commands of root wait for the same lock.
    fn work(&mut self, open_tap: &mut OpenTap<'_>) {
        let begin = Instant::now();
        if let Some(port) = self.left.pop() {
            // The place is given up.
            drop(port);
        } else if let Some(client) = self
            .clients
            .iter_mut()
            .find(|client| matches!(client.stage, Stage::Waits(_)))
        {
            let Stage::Waits(request) = std::mem::replace(&mut client.stage, Stage::Over) else {
                return;
            };
            match give(&self.networks, &self.name, &request, client, open_tap) {
                Ok(port) => client.stage = Stage::HasPlace(port),
                Err(error) => refuse(client.socket.as_fd(), &error.to_string()),
            }
        } else {
            return;
        }
        let end = Instant::now();
        self.rests_until = Some(end + end.duration_since(begin));
    }
}

impl Client {
    fn take_events(&mut self, events: PollFlags, now: Instant) {
        let is_gone = events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Asks(until) => self.read(until, events.contains(PollFlags::POLLIN), now),
            Stage::Waits(_) if is_gone => Stage::Over,
            Stage::HasPlace(port) if is_gone => Stage::Left(port),
            stage => stage,
        };
    }

    /// Reads what the client asks for.
    fn read(&self, until: Instant, is_readable: bool, now: Instant) -> Stage {
        if !is_readable {
            return match now < until {
                true => Stage::Asks(until),
                false => Stage::Over,
            };
        }
        // A byte more tells a packet that is too large. Descriptors that come along are closed by the kernel.
        let mut packet = [0; MAX_PACKET_SIZE + 1];
        let size = match recv(&self.socket, &mut packet[..], RecvFlags::DONTWAIT) {
            // The end of the connection is an empty packet too.
            Ok((_, 0)) => return Stage::Over,
            Ok((_, size)) => size,
            Err(rustix::io::Errno::AGAIN) => return Stage::Asks(until),
            Err(_) => return Stage::Over,
        };
        let request = match size <= MAX_PACKET_SIZE {
            true => Request::read(&packet[..size]),
            false => Err(NetworkError::Request {
                reason: format!("it has more than {MAX_PACKET_SIZE} bytes"),
            }),
        };
        match request {
            Ok(request) => Stage::Waits(request),
            Err(error) => {
                refuse(self.socket.as_fd(), &error.to_string());
                Stage::Over
            }
        }
    }
}

/// Gives a client a place, and the descriptors of its tap.
fn give(
    networks: &Networks,
    name: &NetworkName,
    request: &Request,
    client: &Client,
    open_tap: &mut OpenTap<'_>,
) -> Result<Port, NetworkError> {
    let attachment = Attachment {
        place: Place::Network(name.clone()),
        mac: request.mac,
        hostname: request.hostname.clone(),
        filter: None,
    };
    let port = networks.attach_for_user(&attachment, client.peer)?;
    let queues = open_tap(port.interface(), request.queues);
    let queues = queues.map_err(|reason| NetworkError::Refused { reason })?;
    port.connect()?;
    pass_on(&port, &queues, client.socket.as_fd())?;
    Ok(port)
}

/// Tells a client what its place is, and passes it the queues of its tap.
pub(super) fn pass_on(
    port: &Port,
    queues: &[OwnedFd],
    socket: BorrowedFd<'_>,
) -> Result<(), NetworkError> {
    let answer = Answer::Place {
        interface: port.interface().to_owned(),
        address: port.address(),
    };
    let lock = port.lock();
    let descriptors: Vec<_> = queues.iter().map(AsFd::as_fd).chain([lock]).collect();
    // The tap is the client's alone from now on: it vanishes with the client.
    answer_with(socket, &answer, &descriptors).map_err(NetworkError::netlink("pass on a tap"))
}

/// Tells a client why it has no place. One that does not read it is not waited for.
pub(super) fn refuse(socket: BorrowedFd<'_>, reason: &str) {
    // What it has sent must be read: the kernel would report a reset in place of the answer.
    let _ = recv(socket, &mut [0u8][..], RecvFlags::DONTWAIT);
    let mut reason = reason.to_owned();
    // Room for what JSON adds: at most five bytes to each.
    let room = (MAX_PACKET_SIZE - 64) / 6;
    while reason.len() > room {
        reason.pop();
    }
    let _ = answer_with(socket, &Answer::Refused(reason), &[]);
}

pub(super) fn answer_with(
    socket: BorrowedFd<'_>,
    answer: &Answer,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    const MAX_DESCRIPTORS: usize = MAX_QUEUES as usize + 1;
    let packet = serde_json::to_vec(answer)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&packet)], &mut control, flags)?;
    Ok(())
}
