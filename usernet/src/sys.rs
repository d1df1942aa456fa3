//! Requests to sockets that the standard library does not have.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use libc::c_int;

/// Makes the first [`libc::MSG_PEEK`] read from the front of the socket's queue, and each further one from
/// where the last ended. `false` if the host cannot do that (TCP before Linux 6.9).
pub(crate) fn restart_peeking(socket: &impl AsFd) -> bool {
    #[cfg(test)]
    if IS_OLD_HOST.get() {
        return false;
    }
    let offset: c_int = 0;
    // SAFETY: the pointer is to an int of the size given, which the call reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    result == 0
}

/// Removes at most `size` bytes from a TCP socket's queue without copying them, and returns their number.
///
/// # Errors
/// Those of `recv`.
pub(crate) fn discard(socket: &impl AsFd, size: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with MSG_TRUNC, a TCP socket writes nothing to the buffer (tcp(7)).
    let result = unsafe { libc::recv(socket.as_fd().as_raw_fd(), ptr::null_mut(), size, flags) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Receives bytes from a socket with `flags`.
///
/// # Errors
/// Those of `recv`.
pub(crate) fn receive(socket: &impl AsFd, bytes: &mut [u8], flags: c_int) -> io::Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer is to as many bytes as the size says, to which nobody else has access.
    let result = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), flags) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Returns the size of the largest packet that the way to the other end of a connected UDP socket takes, as far as the
/// host knows.
pub(crate) fn path_mtu(socket: &UdpSocket) -> Option<u32> {
    let (level, name) = match socket.peer_addr().ok()? {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: c_int = 0;
    let mut size = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the pointers are to an int and to its size, which the call reads and writes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut mtu).cast(),
            &raw mut size,
        )
    };
    u32::try_from(mtu).ok().filter(|_| result == 0)
}

#[cfg(test)]
thread_local! {
    /// Makes this thread's sockets those of a host that cannot peek behind the front of a queue.
    pub(crate) static IS_OLD_HOST: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}
