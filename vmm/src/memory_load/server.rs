//! Guest memory that another program serves, in the protocol of Firecracker.
//!
//! The program listens on a Unix socket. It gets one message, a list of the regions in JSON together with the userfaultfd, and
//! then fills pages when they are touched. It sends nothing.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bantam_memory::MissingPages;
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt,
    sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::Serialize;

use super::{Link, Patience, Turn};
use crate::error::Error;

/// How long the program may take to accept the connection, and then to take the request.
const REQUEST_SECONDS: i64 = 5;
/// How often it is looked at whether the request has been taken.
const TICK: Duration = Duration::from_millis(20);

/// Why another program does not serve guest memory, or does so no longer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryServerError {
    /// It cannot be connected to.
    #[error(
        "cannot connect to '{path}', where a program is to serve guest memory: {source}; start that program first",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The request cannot be sent.
    #[error("cannot ask the program at '{path}' to serve guest memory: {source}", path = .path.display())]
    Request {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It does not take the request.
    #[error(
        "the program at '{path}' has not taken the request to serve guest memory within {REQUEST_SECONDS} s: it hangs, or is \
         another program",
        path = .path.display()
    )]
    NotTaken {
        /// The socket.
        path: PathBuf,
    },
    /// It has ended.
    #[error(
        "the program at '{path}' has ended, and guest memory with it: restore the machine again when the program runs",
        path = .path.display()
    )]
    Ended {
        /// The socket.
        path: PathBuf,
    },
}

/// A region of guest memory, as the program gets it. The names are those of Firecracker.
#[derive(Serialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    /// Where the region begins in the memory file.
    offset: u64,
    /// In bytes.
    page_size: usize,
    /// In bytes as well, whatever its name.
    page_size_kib: usize,
}

/// A program that fills the missing pages of a machine.
pub(super) struct Server {
    path: PathBuf,
    pages: MissingPages,
    connection: OwnedFd,
    /// The process, unless the host does not tell which one it is.
    process: Option<OwnedFd>,
}

impl Server {
    /// Asks the program that listens at `path` to fill `pages`.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub(super) fn connect(path: PathBuf, pages: MissingPages) -> Result<Server, MemoryServerError> {
        let connection = match connected(&path) {
            Ok(connection) => connection,
            Err(source) => return Err(MemoryServerError::Connect { path, source }),
        };
        if let Err(source) = request(&connection, &pages) {
            return Err(MemoryServerError::Request { path, source });
        }
        Ok(Server {
            process: process_of(&connection),
            path,
            pages,
            connection,
        })
    }

    /// Watches the program until the machine has ended, and ends the machine if the program does.
    pub(super) fn watch(self, link: &Link) {
        let mut patience = Patience::default();
        let deadline = Instant::now() + Duration::from_secs(REQUEST_SECONDS as u64);
        let mut is_taken = false;
        let mut has_hung_up = false;
        loop {
            let time = (!is_taken).then_some(TICK);
            let (source, flags) = match (&self.process, has_hung_up) {
                // Readable when it has ended.
                (Some(process), true) => (process.as_fd(), PollFlags::POLLIN),
                // A hang-up is reported in any case. What it sends, if anything, is not read.
                _ => (self.connection.as_fd(), PollFlags::empty()),
            };
            match patience.wait(link, source, flags, time) {
                Turn::End => return self.pages.give_up(),
                Turn::GiveUp => return link.give_up(&self.pages),
                // A program may close the connection when it has taken the request.
                Turn::Ready if self.process.is_some() && !has_hung_up => has_hung_up = true,
                Turn::Ready => {
                    // Forks have moved all memory to files.
                    if !link.memory.is_missing_pages() {
                        return;
                    }
                    return self.fail(
                        link,
                        MemoryServerError::Ended {
                            path: self.path.clone(),
                        },
                    );
                }
                Turn::Other => {}
            }
            is_taken = is_taken || has_hung_up || unread(&self.connection) == 0;
            if !is_taken && Instant::now() >= deadline {
                let path = self.path.clone();
                return self.fail(link, MemoryServerError::NotTaken { path });
            }
        }
    }

    fn fail(&self, link: &Link, error: MemoryServerError) {
        link.fail(Error::MemoryServer(error));
        link.give_up(&self.pages);
    }
}

/// Connects to the socket at `path`, for which the program has [`REQUEST_SECONDS`].
fn connected(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let connection = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // It applies to a connection that waits until others have been accepted.
    let time = TimeVal::seconds(REQUEST_SECONDS);
    setsockopt(&connection, sockopt::SendTimeout, &time)?;
    let address = UnixAddr::new(path)?;
    match connect(connection.as_raw_fd(), &address) {
        Err(nix::errno::Errno::EAGAIN) => Err(io::Error::other(format!(
            "it accepts no connection within {REQUEST_SECONDS} s"
        ))),
        connected => Ok(connected.map(|()| connection)?),
    }
}

/// Sends the regions and the descriptor by which their pages are filled.
fn request(connection: &OwnedFd, pages: &MissingPages) -> io::Result<()> {
    let memory = pages.memory();
    let page_size = memory.backing().page_size();
    let mut offset = 0;
    let regions: Vec<_> = memory
        .regions()
        .map(|region| {
            let first = offset;
            offset += region.len;
            Region {
                base_host_virt_addr: region.host_address,
                size: region.len,
                offset: first,
                page_size,
                page_size_kib: page_size,
            }
        })
        .collect();
    let body = serde_json::to_vec(&regions)?;
    let descriptors = [pages.as_fd().as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let vectors = [IoSlice::new(&body)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(connection.as_raw_fd(), &vectors, &rights, flags, None)?;
    match sent == body.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Returns a descriptor of the process at the other end, which is readable when the process has ended.
fn process_of(connection: &OwnedFd) -> Option<OwnedFd> {
    let peer = getsockopt(connection, sockopt::PeerCredentials).ok()?;
    // A process in another namespace has no number here.
    let process = Some(peer.pid()).filter(|process| *process > 0)?;
    // SAFETY: the call takes integers only.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    let descriptor = i32::try_from(descriptor).ok().filter(|it| *it >= 0)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Returns how much of what was sent has not been read. Zero if the host does not say.
fn unread(connection: &OwnedFd) -> libc::c_int {
    let mut count = 0;
    // SAFETY: the kernel writes an integer to `count`.
    match unsafe { libc::ioctl(connection.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) } {
        0 => count,
        _ => 0,
    }
}
