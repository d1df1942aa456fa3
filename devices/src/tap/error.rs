//! Errors of taps, with what may help.

use std::io;
use std::os::fd::RawFd;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::CONTROL_DEVICE;

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
    /// There is no such tap, and this user may not create one.
    #[error(
        "cannot create tap '{name}': not permitted; run as root, or have root create it by \
         'ip tuntap add dev {name} mode tap user USER && ip link set {name} up'"
    )]
    MayNotCreate {
        /// The tap.
        name: String,
    },
    /// There is such a tap, but it does not belong to this user.
    #[error(
        "cannot attach to tap '{name}': not permitted, as it belongs to another user; run as root, \
         or have root create it anew with 'user USER'"
    )]
    MayNotAttach {
        /// The tap.
        name: String,
    },
    /// Another program uses the tap.
    #[error("cannot attach to tap '{name}': it is in use by another machine or program")]
    InUse {
        /// The tap.
        name: String,
    },
    /// The interface of that name is not a tap.
    #[error(
        "cannot attach to tap '{name}': an interface of that name exists, but it is not a tap; \
         choose another name"
    )]
    NoTap {
        /// The interface.
        name: String,
    },
    /// A descriptor that was passed on cannot be used.
    #[error("cannot use descriptor {fd} as a tap: {reason}")]
    Descriptor {
        /// The descriptor.
        fd: RawFd,
        /// What is wrong with it.
        reason: String,
    },
    /// The tap was made with one queue, and more are needed.
    #[error(
        "cannot attach to tap '{name}' with {queues} queues: it was made with a single one; ask for \
         one, or have it created anew by 'ip tuntap add dev {name} mode tap multi_queue'"
    )]
    SingleQueue {
        /// The tap.
        name: String,
        /// How many queues were asked for.
        queues: usize,
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

pub(super) fn control_error(name: &str, source: io::Error) -> TapError {
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

pub(super) fn attach_error(name: &str, errno: Errno) -> TapError {
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
