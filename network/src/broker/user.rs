//! The machine of an ordinary user, which asks a broker for a place.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::unistd::geteuid;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};

use super::process::Broker;
use super::protocol::{Answer, MAX_PACKET_SIZE, MAX_QUEUES, Request};
use crate::networks::Networks;
use crate::started::Phase;
use crate::{Attachment, NetworkError, NetworkName, accounts};

/// How long a broker may take to answer: other users and commands may be before.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A place on a network that a broker has given to this process. Dropping it gives the place up, as the end of the process
/// does.
#[derive(Debug)]
pub struct UserPlace {
    interface: String,
    address: Option<Ipv4Addr>,
    /// Says that the place is in use, should the broker end before the machine.
    _lock: OwnedFd,
    _connection: OwnedFd,
}

impl UserPlace {
    /// Returns the name of the interface that leads to the machine.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Returns the IPv4 address that is reserved for the machine.
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.address
    }
}

impl Networks {
    /// Asks the broker of the network `name` for the place that `attachment` describes. Returns it, and the queues of a tap
    /// that is on the network already: up to `queues`, of which the first is in use.
    ///
    /// # Errors
    /// If there is no such network, it is not started, this user may not use it, or it has no place for the machine.
    pub fn ask_for_place(
        &self,
        name: &NetworkName,
        attachment: &Attachment,
        queues: usize,
    ) -> Result<(UserPlace, Vec<OwnedFd>), NetworkError> {
        let broker = Broker::of(&self.folders, name.as_str());
        let failed = |source: io::Error| NetworkError::Broker {
            network: name.to_string(),
            source,
        };
        let connection = match connected(&broker.socket()) {
            Ok(connection) => connection,
            Err(error) => return Err(self.why_not(name, error)),
        };
        let request = Request {
            mac: attachment.mac,
            hostname: attachment.hostname.clone(),
            filter: attachment.filter,
            queues: u8::try_from(queues)
                .unwrap_or(MAX_QUEUES)
                .clamp(1, MAX_QUEUES),
        };
        let packet = serde_json::to_vec(&request).map_err(|error| failed(error.into()))?;
        let no_descriptors = &mut SendAncillaryBuffer::default();
        let sent = sendmsg(
            &connection,
            &[IoSlice::new(&packet)],
            no_descriptors,
            SendFlags::NOSIGNAL,
        );
        // It may have refused already, and said why.
        let answered =
            receive(&connection).map_err(|error| failed(sent.err().map_or(error, Into::into)));
        let (answer, mut descriptors) = answered?;
        match (answer, descriptors.pop()) {
            (Answer::Place { interface, address }, Some(lock)) if !descriptors.is_empty() => {
                let place = UserPlace {
                    interface,
                    address,
                    _lock: lock,
                    _connection: connection,
                };
                Ok((place, descriptors))
            }
            (Answer::Refused(reason), _) => Err(NetworkError::Refused { reason }),
            (Answer::Place { .. } | Answer::GivenUp, _) => {
                Err(failed(ErrorKind::InvalidData.into()))
            }
        }
    }

    /// Says why there is no way to the broker of a network.
    fn why_not(&self, name: &NetworkName, error: io::Error) -> NetworkError {
        let network = name.to_string();
        let definition = match self.state(name.as_str()) {
            Ok(Some(state)) if state.phase == Phase::Started => state.definition,
            Ok(_) => {
                return match self.definition(name) {
                    Ok(_) => NetworkError::NotStarted { name: network },
                    Err(error) => error,
                };
            }
            Err(error) => return error,
        };
        match (definition.group, error.kind()) {
            (None, _) => NetworkError::ForRoot { network },
            (Some(group), ErrorKind::PermissionDenied) => NetworkError::NotMember {
                network,
                group: group.to_string(),
                user: user_name(),
            },
            (Some(_), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                NetworkError::BrokerMissing { network }
            }
            (Some(_), _) => NetworkError::Broker {
                network,
                source: error,
            },
        }
    }
}

fn connected(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    for timeout in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, timeout, Some(ANSWER_LIMIT))?;
    }
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Receives an answer, and the descriptors that come with it.
pub(super) fn receive(connection: &OwnedFd) -> io::Result<(Answer, Vec<OwnedFd>)> {
    const MAX_DESCRIPTORS: usize = MAX_QUEUES as usize + 1;
    let mut packet = [0; MAX_PACKET_SIZE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let vectors = &mut [IoSliceMut::new(&mut packet)];
    let received = recvmsg(connection, vectors, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Err(ErrorKind::ConnectionReset.into());
    }
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    let answer = serde_json::from_slice(&packet[..received.bytes])?;
    Ok((answer, descriptors))
}

/// Returns the name of the user of this process.
fn user_name() -> String {
    let uid = geteuid();
    match accounts::user(uid.as_raw()) {
        Some(user) => user.name,
        None => uid.to_string(),
    }
}
