//! Places for a machine whose process can execute no programs: a process beside it takes them, and gives them up.
//!
//! They share a pair of sockets. The machine's process may be in the hands of its guest, so a request is bounded and parsed,
//! and names a place by its number among those that the configuration of the machine has.

use std::io::{self, ErrorKind, IoSlice};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::unistd::geteuid;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, recv,
    sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use super::Peer;
use super::protocol::{Answer, MAX_PACKET_SIZE};
use super::serve::{answer_with, pass_on, refuse};
use super::user::receive;
use crate::networks::Networks;
use crate::{Attachment, Mac, NetworkError, Port};

/// Makes the tap of a place: the one of this number, with this port.
pub type MakeTap<'a> = dyn FnMut(usize, &Port) -> Result<Vec<OwnedFd>, String> + 'a;

/// What a machine asks of its keeper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// A place, for a device with this address.
    Take { place: usize, mac: Mac },
    /// To give it up.
    GiveUp { place: usize },
}

/// The process that takes places for a machine, as the machine sees it. It ends when this is dropped.
#[derive(Debug)]
pub struct PlaceKeeper {
    socket: Mutex<OwnedFd>,
}

/// A place that a keeper has taken. Dropping it gives the place up, as the end of the process does.
#[derive(Debug)]
pub struct KeptPlace {
    keeper: Arc<PlaceKeeper>,
    place: usize,
    interface: String,
    address: Option<Ipv4Addr>,
    /// Says that the place is in use, should the keeper end before the machine.
    _lock: OwnedFd,
}

impl PlaceKeeper {
    /// Makes the machine's end of a pair of sockets, and the one for [`Networks::keep_places`].
    ///
    /// # Errors
    /// If the host is out of descriptors.
    pub fn pair() -> io::Result<(PlaceKeeper, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (own, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let socket = Mutex::new(own);
        Ok((PlaceKeeper { socket }, other))
    }

    /// Takes the place number `place` for a device with the address `mac`. Returns it, and the queues of its tap.
    ///
    /// # Errors
    /// Those of [`Networks::attach`], and if the keeper has ended.
    pub fn take(
        self: &Arc<Self>,
        place: usize,
        mac: Mac,
    ) -> Result<(KeptPlace, Vec<OwnedFd>), NetworkError> {
        let failed = |source| NetworkError::Keeper { source };
        let (answer, mut descriptors) = self.ask(&Request::Take { place, mac }).map_err(failed)?;
        match (answer, descriptors.pop()) {
            (Answer::Place { interface, address }, Some(lock)) if !descriptors.is_empty() => {
                let place = KeptPlace {
                    keeper: self.clone(),
                    place,
                    interface,
                    address,
                    _lock: lock,
                };
                Ok((place, descriptors))
            }
            (Answer::Refused(reason), _) => Err(NetworkError::Refused { reason }),
            _ => Err(failed(ErrorKind::InvalidData.into())),
        }
    }

    fn ask(&self, request: &Request) -> io::Result<(Answer, Vec<OwnedFd>)> {
        let packet = serde_json::to_vec(request)?;
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let no_descriptors = &mut SendAncillaryBuffer::default();
        let packet = &[IoSlice::new(&packet)];
        sendmsg(&*socket, packet, no_descriptors, SendFlags::NOSIGNAL)?;
        receive(&socket)
    }
}

impl KeptPlace {
    /// Returns the name of the interface that leads to the machine.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Returns the IPv4 address that is reserved for the machine.
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.address
    }
}

impl Drop for KeptPlace {
    fn drop(&mut self) {
        // It waits until the place is free for the next machine.
        let place = self.place;
        if let Err(error) = self.keeper.ask(&Request::GiveUp { place }) {
            tracing::warn!(
                "the place of '{}' on its network is not given up: {error}",
                self.interface
            );
        }
    }
}

impl Networks {
    /// Takes places for the machine whose process `machine` has the other end of `socket`, and gives them up, until
    /// that end is closed. `wanted` are the places that there are, by their numbers; their addresses are given later.
    ///
    /// # Errors
    /// If the machine cannot be waited for.
    pub fn keep_places(
        &self,
        socket: &OwnedFd,
        machine: u32,
        wanted: &[Option<Attachment>],
        make_tap: &mut MakeTap<'_>,
    ) -> io::Result<()> {
        let owner = Peer {
            uid: geteuid().as_raw(),
            pid: machine,
        };
        let mut places: Vec<Option<Port>> = wanted.iter().map(|_| None).collect();
        loop {
            let mut packet = [0; MAX_PACKET_SIZE];
            let size = match recv(socket, &mut packet[..], RecvFlags::empty()) {
                Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET) => return Ok(()),
                Ok((_, size)) => size,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            match serde_json::from_slice(&packet[..size]) {
                Ok(Request::GiveUp { place }) => {
                    if let Some(place) = places.get_mut(place) {
                        *place = None;
                    }
                    let _ = answer_with(socket.as_fd(), &Answer::GivenUp, &[]);
                }
                Ok(Request::Take { place, mac }) => {
                    let free = places.get_mut(place).filter(|place| place.is_none());
                    let attachment = wanted.get(place).and_then(Option::as_ref);
                    let (Some(free), Some(attachment)) = (free, attachment) else {
                        refuse(
                            socket.as_fd(),
                            "the machine has no such place, or has it already",
                        );
                        continue;
                    };
                    let attachment = Attachment {
                        mac,
                        ..attachment.clone()
                    };
                    let mut make_tap = |port: &Port| make_tap(place, port);
                    match self.give_kept(socket, &attachment, owner, &mut make_tap) {
                        Ok(port) => *free = Some(port),
                        Err(error) => refuse(socket.as_fd(), &error.to_string()),
                    }
                }
                Err(error) => refuse(socket.as_fd(), &format!("invalid request: {error}")),
            }
        }
    }

    fn give_kept(
        &self,
        socket: &OwnedFd,
        attachment: &Attachment,
        owner: Peer,
        make_tap: &mut dyn FnMut(&Port) -> Result<Vec<OwnedFd>, String>,
    ) -> Result<Port, NetworkError> {
        let port = self.attach_for(attachment, owner, false)?;
        let queues = make_tap(&port).map_err(|reason| NetworkError::Refused { reason })?;
        port.connect()?;
        pass_on(&port, &queues, socket.as_fd())?;
        Ok(port)
    }
}
