//! Requests that every network interface supports, taps included.

use std::ffi::{c_int, c_short};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use libc::ifreq;
use nix::errno::Errno;

use super::{TapError, interface_request};

mod request {
    //! Requests to network interfaces (`linux/sockios.h`).
    use super::ifreq;

    nix::ioctl_read_bad!(get_flags, libc::SIOCGIFFLAGS, ifreq);
    nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, ifreq);
    nix::ioctl_read_bad!(get_mtu, libc::SIOCGIFMTU, ifreq);
    nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, ifreq);
}

/// An interface of the network namespace in which this value was made.
#[derive(Debug)]
pub(super) struct Interface {
    name: String,
    /// Requests go through a socket of any kind.
    socket: UnixDatagram,
}

impl Interface {
    /// Makes a handle to the interface called `name`.
    ///
    /// # Errors
    /// If no socket can be created.
    pub(super) fn new(name: &str) -> Result<Interface, TapError> {
        let name = name.to_string();
        match UnixDatagram::unbound() {
            Ok(socket) => Ok(Interface { name, socket }),
            Err(source) => Err(TapError::Io {
                name,
                action: "open a socket to set up",
                source,
            }),
        }
    }

    /// Brings the interface up.
    ///
    /// # Errors
    /// If this user may not do it, or the interface is gone.
    pub(super) fn bring_up(&self) -> Result<(), TapError> {
        let mut request = interface_request(&self.name);
        // SAFETY: the request reads and writes an ifreq at the place it is given.
        unsafe { request::get_flags(self.socket.as_raw_fd(), &mut request) }
            .map_err(|errno| self.io_error("examine", errno))?;
        // SAFETY: all bytes of the union were initialized, and any are a valid integer.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as c_short;
        // SAFETY: the request reads an ifreq from the place it is given.
        unsafe { request::set_flags(self.socket.as_raw_fd(), &request) }
            .map_err(|errno| self.io_error("bring up", errno))?;
        Ok(())
    }

    /// Sets the MTU in bytes until the result is dropped. Returns `None` if the interface has it already.
    ///
    /// # Errors
    /// If this user may not do it, or an interface of this kind cannot have this MTU.
    pub(super) fn set_mtu_temporarily(self, mtu: u16) -> Result<Option<TemporaryMtu>, TapError> {
        let found = self
            .mtu()
            .map_err(|errno| self.io_error("read the MTU of", errno))?;
        let wanted = c_int::from(mtu);
        if found == wanted {
            return Ok(None);
        }
        self.set_mtu(wanted).map_err(|errno| TapError::Mtu {
            name: self.name.clone(),
            mtu,
            source: errno.into(),
            remedy: match errno {
                Errno::EPERM => format!(
                    "; it is {found}, and as root 'ip link set {} mtu {mtu}' changes it",
                    self.name
                ),
                Errno::EINVAL => "; a tap takes 68 to 65521".to_string(),
                _ => String::new(),
            },
        })?;
        Ok(Some(TemporaryMtu {
            interface: self,
            found,
            set: wanted,
        }))
    }

    fn mtu(&self) -> Result<c_int, Errno> {
        let mut request = interface_request(&self.name);
        // SAFETY: the request reads and writes an ifreq at the place it is given.
        unsafe { request::get_mtu(self.socket.as_raw_fd(), &mut request) }?;
        // SAFETY: all bytes of the union were initialized, and any are a valid integer.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    fn set_mtu(&self, mtu: c_int) -> Result<(), Errno> {
        let mut request = interface_request(&self.name);
        request.ifr_ifru.ifru_mtu = mtu;
        // SAFETY: the request reads an ifreq from the place it is given.
        unsafe { request::set_mtu(self.socket.as_raw_fd(), &request) }?;
        Ok(())
    }

    fn io_error(&self, action: &'static str, errno: Errno) -> TapError {
        TapError::Io {
            name: self.name.clone(),
            action,
            source: errno.into(),
        }
    }
}

/// A temporary MTU of an interface. When this is dropped, the interface gets its previous MTU back, unless
/// someone else has changed it since.
#[derive(Debug)]
pub(super) struct TemporaryMtu {
    interface: Interface,
    found: c_int,
    set: c_int,
}

impl Drop for TemporaryMtu {
    fn drop(&mut self) {
        // An interface that is gone has no MTU to restore.
        if self.interface.mtu() != Ok(self.set) {
            return;
        }
        if let Err(errno) = self.interface.set_mtu(self.found) {
            let Interface { name, .. } = &self.interface;
            let (found, error) = (self.found, io::Error::from(errno));
            tracing::warn!(
                "cannot set the MTU of tap '{name}' back to {found}: {error}; as root \
                 'ip link set {name} mtu {found}' does it"
            );
        }
    }
}
