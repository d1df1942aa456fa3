//! Taps that another program has opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, ifreq};
use nix::errno::Errno;

use super::{
    FrameFilter, Offloads, PACKET_HEADER_SIZE, Tap, TapError, TapQueue, interface_name,
    interface_request, request,
};

impl Tap {
    /// Uses the tap, or the queue of a macvtap, that this process has as descriptor `fd`. The descriptor stays
    /// open, and becomes non-blocking.
    ///
    /// The tap stays as it is, apart from the size of its packets' headers, which it gets back in the end.
    ///
    /// # Errors
    /// If there is no such descriptor, or it is not that of a tap whose packets have headers.
    pub fn adopt(fd: RawFd) -> Result<Tap, TapError> {
        let refuse = |reason: String| TapError::Descriptor { fd, reason };
        // SAFETY: the request takes integers, and fails for a descriptor that is not open.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            let error = io::Error::last_os_error();
            return Err(refuse(match error.raw_os_error() {
                Some(libc::EBADF) => "no such descriptor is open".to_owned(),
                _ => error.to_string(),
            }));
        }
        // SAFETY: the descriptor has just been made, and nobody else owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
        let attachment = attachment(&file).map_err(|errno| {
            refuse(match errno {
                Errno::ENOTTY | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EBADFD => {
                    "it is not that of a tap".to_owned()
                }
                errno => io::Error::from(errno).to_string(),
            })
        })?;
        let name = interface_name(&attachment);
        // SAFETY: all bytes of the union were initialized, and any are a valid integer.
        let flags = c_int::from(unsafe { attachment.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            let reason =
                format!("'{name}' passes packets of IP and not Ethernet frames: it is a tun");
            return Err(refuse(reason));
        }
        if flags & libc::IFF_NO_PI == 0 || flags & libc::IFF_VNET_HDR == 0 {
            // A macvtap can still be told; a tap is as it was attached.
            let mut wanted = interface_request(&name);
            let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            wanted.ifr_ifru.ifru_flags = kind as libc::c_short;
            // SAFETY: the request reads an ifreq and writes the name back to it; it is our own.
            let told = unsafe { request::attach(file.as_raw_fd(), &wanted) };
            if told.is_err() {
                let reason =
                    format!("tap '{name}' must have been attached with IFF_NO_PI and IFF_VNET_HDR");
                return Err(refuse(reason));
            }
        }
        set_nonblocking(&file).map_err(|error| refuse(error.to_string()))?;
        let mut tap = Tap::of(file, &name);
        let found = tap.header_size();
        let found = found.map_err(|errno| tap.io_error("read the header size of", errno))?;
        tap.found_header_size = Some(found);
        tap.set_header_size(PACKET_HEADER_SIZE as c_int)
            .map_err(|errno| tap.io_error("set the header size of", errno))?;
        tap.offloads = tap.probe_offloads();
        tap.selects_frames = tap.set_filter(&FrameFilter::All).is_ok();
        let settled = tap.set_offloads(Offloads::default());
        settled.map_err(|source| TapError::Io {
            name: tap.name.clone(),
            action: "set the offloads of",
            source,
        })?;
        Ok(tap)
    }
}

impl Tap {
    /// Uses a tap whose queues another process has opened by [`Tap::open`], and given up. Its first queue is in use.
    ///
    /// # Errors
    /// If there are no queues, or they are not those of a tap.
    pub fn of_queues(queues: Vec<OwnedFd>) -> Result<Tap, TapError> {
        let mut queues = queues.into_iter().map(File::from);
        let refuse = |fd: RawFd, reason: &str| TapError::Descriptor {
            fd,
            reason: reason.to_owned(),
        };
        let first = queues.next().ok_or_else(|| refuse(-1, "there is none"))?;
        let found = attachment(&first);
        let found = found.map_err(|_| refuse(first.as_raw_fd(), "it is not that of a tap"))?;
        let mut tap = Tap::of(first, &interface_name(&found));
        tap.queues.extend(queues.map(TapQueue));
        tap.offloads = tap.probe_offloads();
        // A macvtap does not.
        tap.selects_frames = tap.set_filter(&FrameFilter::All).is_ok();
        tap.forget_driver().map_err(|source| TapError::Io {
            name: tap.name.clone(),
            action: "set the offloads of",
            source,
        })?;
        Ok(tap)
    }

    /// Gives up the tap, and returns its queues for another process.
    pub fn into_queues(mut self) -> Vec<OwnedFd> {
        // Only the other process knows when an existing tap is to get it back.
        self.found_header_size = None;
        let queues = std::mem::take(&mut self.queues);
        queues
            .into_iter()
            .map(|TapQueue(file)| file.into())
            .collect()
    }
}

/// Asks which interface a descriptor is attached to, and how.
fn attachment(file: &File) -> Result<ifreq, Errno> {
    let mut answer = interface_request("");
    // SAFETY: the request writes an ifreq to the place it is given, if it is one for the file.
    unsafe { request::get_flags(file.as_raw_fd(), &mut answer) }?;
    Ok(answer)
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: the request takes integers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    match flags < 0 || done < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}
