//! Tap interfaces: the host's end of a guest's network card.

use std::ffi::{c_char, c_int, c_short};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;

use libc::ifreq;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

/// The device that makes taps.
const CONTROL_DEVICE: &str = "/dev/net/tun";

/// Size of the header that precedes each packet, in bytes: `struct virtio_net_hdr` with its
/// `num_buffers` (virtio 1.3, section 5.1.6).
pub const PACKET_HEADER_SIZE: usize = 12;

/// Most packets that [`Tap::discard_queued`] throws away, so that a flood does not hold it for
/// ever. A tap queues 1000 unless its administrator says otherwise.
const MAX_DISCARDED_PACKETS: usize = 4096;

mod request {
    //! Requests to a tap (`linux/if_tun.h`) and to any network interface (`linux/sockios.h`). They
    //! are numbered with another size than that of what they take, or with none, so nix's "bad"
    //! forms are the right ones.
    use super::{c_int, ifreq};

    nix::ioctl_write_ptr_bad!(attach, libc::TUNSETIFF, ifreq);
    nix::ioctl_read_bad!(get_flags, libc::TUNGETIFF, ifreq);
    nix::ioctl_write_int_bad!(set_offloads, libc::TUNSETOFFLOAD);
    nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, c_int);

    nix::ioctl_read_bad!(get_interface_flags, libc::SIOCGIFFLAGS, ifreq);
    nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, ifreq);
    nix::ioctl_read_bad!(get_mtu, libc::SIOCGIFMTU, ifreq);
    nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, ifreq);
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can have this name.
    #[error("cannot use tap '{name}': {reason}")]
    Name {
        /// The name given.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The device that makes taps cannot be opened.
    #[error("cannot open {CONTROL_DEVICE} for tap '{name}': {source}{remedy}")]
    Control {
        /// The tap.
        name: String,
        /// Why not.
        source: io::Error,
        /// What may help, as a continuation of the line.
        remedy: &'static str,
    },
    /// There is no such tap, and this user may not make one.
    #[error(
        "cannot create tap '{name}': not permitted; run as root, or have root create it by \
         'ip tuntap add dev {name} mode tap user USER && ip link set {name} up'"
    )]
    MayNotCreate {
        /// The tap.
        name: String,
    },
    /// There is such a tap, and it is not this user's.
    #[error(
        "cannot attach to tap '{name}': not permitted, as it belongs to another user; run as root, \
         or have root create it anew with 'user USER'"
    )]
    MayNotAttach {
        /// The tap.
        name: String,
    },
    /// Something else has the tap.
    #[error("cannot attach to tap '{name}': it is in use by another machine or program")]
    InUse {
        /// The tap.
        name: String,
    },
    /// The interface of that name is something else.
    #[error(
        "cannot attach to tap '{name}': an interface of that name exists, but it is not a tap with \
         a single queue; choose another name"
    )]
    NoTap {
        /// The interface.
        name: String,
    },
    /// The tap's largest packet cannot be set.
    #[error("cannot set the MTU of tap '{name}' to {mtu}: {source}{remedy}")]
    Mtu {
        /// The tap.
        name: String,
        /// The size asked for, in bytes.
        mtu: u16,
        /// Why not.
        source: io::Error,
        /// What may help, as a continuation of the line.
        remedy: String,
    },
    /// The host refused something else.
    #[error("cannot {action} tap '{name}': {source}")]
    Io {
        /// The tap.
        name: String,
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Work on packets that their reader is ready to do, so that the host need not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// It takes packets whose checksum is not complete. None of the others goes without this.
    pub checksum: bool,
    /// It takes TCP segments over IPv4 that are larger than the MTU.
    pub tcp4_segmentation: bool,
    /// It takes TCP segments over IPv6 that are larger than the MTU.
    pub tcp6_segmentation: bool,
    /// Such TCP segments may carry explicit congestion notification.
    pub ecn: bool,
    /// It takes several UDP datagrams, over IPv4 or IPv6, as one that is larger than the MTU.
    pub udp_segmentation: bool,
}

impl Offloads {
    /// The `TUN_F_*` bits, of which the host refuses those that lack what they build upon.
    fn bits(self) -> libc::c_uint {
        if !self.checksum {
            return 0;
        }
        let tcp = self.tcp4_segmentation || self.tcp6_segmentation;
        [
            (true, libc::TUN_F_CSUM),
            (self.tcp4_segmentation, libc::TUN_F_TSO4),
            (self.tcp6_segmentation, libc::TUN_F_TSO6),
            (tcp && self.ecn, libc::TUN_F_TSO_ECN),
            (self.udp_segmentation, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ]
        .into_iter()
        .filter_map(|(wanted, bits)| wanted.then_some(bits))
        .sum()
    }
}

/// An open tap. Each read takes one packet that the host sent to the interface, and each write
/// sends one to the host, preceded by a header of [`PACKET_HEADER_SIZE`] bytes. Neither waits.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    created: bool,
    segments_udp: bool,
}

impl Tap {
    /// Attaches to the tap called `name`, which is created and brought up where there is none.
    ///
    /// A tap that exists stays as its administrator set it up, up or down; but where `mtu` is
    /// given, in bytes, it is set on either kind.
    ///
    /// # Errors
    /// When the host has no taps, the name is not that of a free tap, or this user may not do it.
    pub fn open(name: &str, mtu: Option<u16>) -> Result<Tap, TapError> {
        check_name(name)?;
        let file = open_control_device().map_err(|source| control_error(name, source))?;
        Tap::attach(file, name, mtu)
    }

    fn attach(file: File, name: &str, mtu: Option<u16>) -> Result<Tap, TapError> {
        let mut attachment = interface_request(name);
        attachment.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as c_short;
        // SAFETY: the request reads an ifreq and writes the name back to it; it is our own.
        unsafe { request::attach(file.as_raw_fd(), &attachment) }
            .map_err(|errno| attach_error(name, errno))?;

        let mut tap = Tap {
            file,
            name: name.to_string(),
            created: false,
            segments_udp: false,
        };
        tap.created = !tap.is_persistent()?;
        // SAFETY: the request reads an int from the place it is given.
        unsafe { request::set_header_size(tap.as_raw_fd(), &(PACKET_HEADER_SIZE as c_int)) }
            .map_err(|errno| tap.io_error("set the header size of", errno))?;
        let udp_segmentation = Offloads {
            checksum: true,
            udp_segmentation: true,
            ..Offloads::default()
        };
        tap.segments_udp = tap.set_offloads(udp_segmentation).is_ok();
        // Also those that the last user of an existing tap may have left.
        tap.set_offloads(Offloads::default())
            .map_err(|source| TapError::Io {
                name: name.to_string(),
                action: "set the offloads of",
                source,
            })?;
        if let Some(mtu) = mtu {
            tap.set_mtu(mtu)?;
        }
        if tap.created {
            tap.bring_up()?;
        }
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether [`Tap::open`] has created the interface. If so, it vanishes with this value.
    pub fn created(&self) -> bool {
        self.created
    }

    /// Whether the host can keep UDP datagrams together on their way through the tap.
    pub fn segments_udp(&self) -> bool {
        self.segments_udp
    }

    /// Says which packets the host may hand out unfinished from now on.
    ///
    /// # Errors
    /// As the `TUNSETOFFLOAD` request: the host does not know them, or the tap is gone.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: the request takes its argument by value.
        unsafe { request::set_offloads(self.as_raw_fd(), offloads.bits() as c_int) }?;
        Ok(())
    }

    /// Throws away the packets that the host has sent and nobody has read.
    pub fn discard_queued(&self) {
        // A packet of which only the header is read is gone all the same.
        let mut header = [0; PACKET_HEADER_SIZE];
        for _ in 0..MAX_DISCARDED_PACKETS {
            if !matches!((&self.file).read(&mut header), Ok(1..)) {
                break;
            }
        }
    }

    fn is_persistent(&self) -> Result<bool, TapError> {
        let mut answer = interface_request(&self.name);
        // SAFETY: the request writes an ifreq to the place it is given.
        unsafe { request::get_flags(self.as_raw_fd(), &mut answer) }
            .map_err(|errno| self.io_error("examine", errno))?;
        // SAFETY: all bytes of the union were initialized, and any are a valid integer.
        let flags = unsafe { answer.ifr_ifru.ifru_flags };
        Ok(c_int::from(flags) & libc::IFF_PERSIST != 0)
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), TapError> {
        let socket = self.interface_socket()?;
        let mut request = interface_request(&self.name);
        // SAFETY: the request reads and writes an ifreq at the place it is given.
        unsafe { request::get_mtu(socket.as_raw_fd(), &mut request) }
            .map_err(|errno| self.io_error("read the MTU of", errno))?;
        // SAFETY: all bytes of the union were initialized, and any are a valid integer.
        let present = unsafe { request.ifr_ifru.ifru_mtu };
        if present == c_int::from(mtu) {
            return Ok(());
        }
        request.ifr_ifru.ifru_mtu = c_int::from(mtu);
        // SAFETY: the request reads an ifreq from the place it is given.
        let set = unsafe { request::set_mtu(socket.as_raw_fd(), &request) };
        set.map_err(|errno| TapError::Mtu {
            name: self.name.clone(),
            mtu,
            source: errno.into(),
            remedy: match errno {
                Errno::EPERM => format!(
                    "; it is {present}, and as root 'ip link set {} mtu {mtu}' changes it",
                    self.name
                ),
                Errno::EINVAL => "; a tap takes 68 to 65521".to_string(),
                _ => String::new(),
            },
        })?;
        Ok(())
    }

    fn bring_up(&self) -> Result<(), TapError> {
        let socket = self.interface_socket()?;
        let mut request = interface_request(&self.name);
        // SAFETY: the request reads and writes an ifreq at the place it is given.
        unsafe { request::get_interface_flags(socket.as_raw_fd(), &mut request) }
            .map_err(|errno| self.io_error("examine", errno))?;
        // SAFETY: all bytes of the union were initialized, and any are a valid integer.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as c_short;
        // SAFETY: the request reads an ifreq from the place it is given.
        unsafe { request::set_interface_flags(socket.as_raw_fd(), &request) }
            .map_err(|errno| self.io_error("bring up", errno))?;
        Ok(())
    }

    /// Requests to interfaces go by way of a socket of any kind.
    fn interface_socket(&self) -> Result<UnixDatagram, TapError> {
        UnixDatagram::unbound().map_err(|source| TapError::Io {
            name: self.name.clone(),
            action: "open a socket to set up",
            source,
        })
    }

    fn io_error(&self, action: &'static str, errno: Errno) -> TapError {
        TapError::Io {
            name: self.name.clone(),
            action,
            source: errno.into(),
        }
    }
}

/// A stand-in for a tap: anything that keeps packets apart.
#[cfg(test)]
impl From<std::os::fd::OwnedFd> for Tap {
    fn from(socket: std::os::fd::OwnedFd) -> Tap {
        Tap {
            file: File::from(socket),
            name: "stand-in".to_string(),
            created: false,
            segments_udp: false,
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn open_control_device() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(CONTROL_DEVICE)
}

/// Whether `error`, of a read or a write, says that the interface has been removed.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV))
}

/// What the host takes for a name, less '%', by which it would choose another.
fn check_name(name: &str) -> Result<(), TapError> {
    let reason = if name.is_empty() {
        "an interface has a name"
    } else if name.len() >= libc::IFNAMSIZ {
        "an interface's name has at most 15 bytes"
    } else if name == "." || name == ".." {
        "an interface cannot be called so"
    } else if name.bytes().any(|byte| {
        matches!(byte, b'/' | b':' | b'%') || byte.is_ascii_whitespace() || byte.is_ascii_control()
    }) {
        "an interface's name has no '/', ':', '%' or white space"
    } else {
        return Ok(());
    };
    let name = name.to_string();
    Err(TapError::Name { name, reason })
}

/// A request about the interface called `name`; of a longer name than there is, the start.
fn interface_request(name: &str) -> ifreq {
    // SAFETY: it consists of integers and pointers, all of which may be zero.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let room = libc::IFNAMSIZ - 1;
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *target = byte as c_char;
    }
    request
}

fn control_error(name: &str, source: io::Error) -> TapError {
    let remedy = match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "; as root 'modprobe tun' loads the driver"
        }
        Some(libc::EACCES | libc::EPERM) => "; run as root, or as a user who may open it",
        _ => "",
    };
    TapError::Control {
        name: name.to_string(),
        source,
        remedy,
    }
}

fn attach_error(name: &str, errno: Errno) -> TapError {
    let exists = if_nametoindex(name).is_ok();
    let name = name.to_string();
    match errno {
        Errno::EPERM | Errno::EACCES if exists => TapError::MayNotAttach { name },
        Errno::EPERM | Errno::EACCES => TapError::MayNotCreate { name },
        Errno::EBUSY => TapError::InUse { name },
        Errno::EINVAL if exists => TapError::NoTap { name },
        errno => TapError::Io {
            name,
            action: "attach to",
            source: errno.into(),
        },
    }
}

#[cfg(test)]
mod tests;
