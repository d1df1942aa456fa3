//! Who is at the other end of a socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::Gid;

/// Most groups of a user (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;
/// Groups that most users have fewer of.
const USUAL_GROUPS: usize = 64;

/// The process that has connected to a socket, as it was then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    pub(crate) pid: u32,
}

/// Returns who has connected, if it is root or a member of `group`. The kernel has checked that by the permissions of the
/// socket, which this does not rely on.
///
/// # Errors
/// If it is somebody else, or the kernel does not say.
pub(super) fn member(socket: BorrowedFd<'_>, group: Gid) -> io::Result<Peer> {
    let credentials = getsockopt(&socket, PeerCredentials)?;
    let peer = Peer {
        uid: credentials.uid(),
        pid: credentials.pid().unsigned_abs(),
    };
    let is_member = peer.uid == 0
        || credentials.gid() == group.as_raw()
        || groups(socket)?.contains(&group.as_raw());
    match is_member {
        true => Ok(peer),
        false => Err(Errno::EACCES.into()),
    }
}

/// Returns the supplementary groups of the process that has connected (`SO_PEERGROUPS`, from Linux 4.13).
fn groups(socket: BorrowedFd<'_>) -> io::Result<Vec<libc::gid_t>> {
    let mut groups = vec![0; USUAL_GROUPS];
    loop {
        let size_of_one = size_of::<libc::gid_t>();
        let mut size = (groups.len() * size_of_one) as libc::socklen_t;
        // SAFETY: the kernel writes at most `size` bytes, which is what `groups` has, and then how many it has written,
        // or would write, to `size`. Any bytes are numbers of groups.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut size,
            )
        };
        let count = size as usize / size_of_one;
        match Errno::result(result) {
            Ok(_) => {
                groups.truncate(count);
                return Ok(groups);
            }
            Err(Errno::ERANGE) if (groups.len() + 1..=MAX_GROUPS).contains(&count) => {
                groups.resize(count, 0);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::unistd::{getegid, geteuid, getgroups};

    use super::*;

    #[test]
    fn a_peer_is_known_by_its_groups() {
        let (near, _far) = UnixStream::pair().unwrap();
        let peer = member(near.as_fd(), getegid()).unwrap();
        assert_eq!(peer.uid, geteuid().as_raw());
        assert_eq!(peer.pid, std::process::id());
        let mut found = groups(near.as_fd()).unwrap();
        found.sort_unstable();
        let mut own: Vec<_> = getgroups().unwrap().iter().map(|it| it.as_raw()).collect();
        own.sort_unstable();
        assert_eq!(found, own);
        let other = member(near.as_fd(), Gid::from_raw(4_000_000));
        assert_eq!(other.is_ok(), geteuid().is_root());
    }
}
