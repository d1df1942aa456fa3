//! Datagrams of the guest that are sent together.

use std::io::IoSlice;
use std::net::UdpSocket;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::frame::GuestFrame;
use crate::udp::may_be_of_another;

/// Most datagrams that Linux takes at once (`UDP_MAX_SEGMENTS`, udp(7)).
const MAX_COUNT: usize = 64;
/// Most bytes of all of them: the payload of the largest packet, in which they pass through the host's stack.
const MAX_BYTES: usize = 65_000;

/// Datagrams of one size to one socket. The host's kernel takes them as one packet, and cuts it as late as it
/// can, so that a burst costs a fraction of what the datagrams would cost one by one.
#[derive(Default)]
pub(crate) struct Batch {
    socket: Option<Arc<UdpSocket>>,
    size: usize,
    bytes: Vec<u8>,
}

impl Batch {
    /// The sizes of payload that are worth a copy: in larger ones the host has to send fragments.
    pub(crate) const SIZES: RangeInclusive<usize> = 1..=1472;

    /// Adds the datagram whose payload of `size` bytes, one of [`Batch::SIZES`], is at `offset` in `frame`.
    pub(crate) fn add(
        &mut self,
        socket: &Arc<UdpSocket>,
        frame: &dyn GuestFrame,
        (offset, size): (usize, usize),
    ) {
        let is_of_socket = |own: &Arc<UdpSocket>| Arc::ptr_eq(own, socket);
        let is_like_others = self.size == size && self.socket.as_ref().is_some_and(is_of_socket);
        let new_size = self.bytes.len() + size;
        if !is_like_others || new_size > MAX_BYTES.min(MAX_COUNT * size) {
            self.send();
            self.socket = Some(socket.clone());
            self.size = size;
        }
        let start = self.bytes.len();
        self.bytes.resize(start + size, 0);
        frame.read_at(offset, &mut self.bytes[start..]);
    }

    /// Sends what there is. What the host cannot send now is lost, as on any network.
    pub(crate) fn send(&mut self) {
        let Some(socket) = self.socket.take() else {
            return;
        };
        if self.bytes.len() == self.size || !send_together(&socket, &self.bytes, self.size) {
            for datagram in self.bytes.chunks(self.size.max(1)) {
                let sent = socket.send(datagram);
                if sent.is_err_and(|error| may_be_of_another(&error)) {
                    let _ = socket.send(datagram);
                }
            }
        }
        self.bytes.clear();
    }

    /// Forgets what there is.
    pub(crate) fn clear(&mut self) {
        self.socket = None;
        self.bytes.clear();
    }
}

/// Sends datagrams of `size` bytes each by one call. Returns `false` if they have to be sent one by one: the path
/// may take only smaller packets, an interface may be unable to compute checksums, or what is reported may be the
/// fate of an earlier datagram.
fn send_together(socket: &UdpSocket, bytes: &[u8], size: usize) -> bool {
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &[ControlMessage::UdpGsoSegments(&(size as u16))],
        MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        None,
    );
    matches!(sent, Ok(_) | Err(Errno::EAGAIN | Errno::ENOBUFS))
}
