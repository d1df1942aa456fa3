//! The host's end of the serial port, the console or a channel.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use bantam_devices::opener::Opener;
use bantam_devices::serial::SerialEndpoint;
use bantam_storage::{FileAccess, Lock, lock_patiently};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::stat::{SFlag, fstat};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use crate::config::SerialConfig;
use crate::console::Console;
use crate::error::Error;

/// An open endpoint, and the resources that must outlive it.
pub(crate) struct OpenSerial {
    pub(crate) endpoint: Option<SerialEndpoint>,
    pub(crate) guard: SerialGuard,
}

/// Keeps what the endpoint needs besides its descriptors.
#[derive(Default)]
pub(crate) struct SerialGuard {
    path: Option<PathBuf>,
    /// A pseudoterminal hangs up when its other end is not open, so the machine keeps that open.
    _pty_user_end: Option<OwnedFd>,
}

impl SerialGuard {
    /// Returns the path of the pseudoterminal, file or socket.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

/// Opens the endpoint that `config` names for `stream`, such as "the serial port".
pub(crate) fn open(
    opener: &dyn Opener,
    stream: &str,
    config: &SerialConfig,
    console: Console,
) -> Result<OpenSerial, Error> {
    match config {
        SerialConfig::Stdio => open_console(console),
        SerialConfig::Pty => open_pty().map_err(|source| Error::Serial {
            action: format!("open a pseudoterminal for {stream}"),
            source,
            remedy: "",
        }),
        SerialConfig::File(path) => open_file(opener, stream, path),
        SerialConfig::Socket(path) => open_socket(opener, stream, path),
        SerialConfig::None => Ok(OpenSerial {
            endpoint: None,
            guard: SerialGuard::default(),
        }),
    }
}

fn open_console(console: Console) -> Result<OpenSerial, Error> {
    for (end, descriptor) in [("input", &console.input), ("output", &console.output)] {
        if let Some(descriptor) = descriptor
            && may_block(descriptor).map_err(Error::resource("the serial console"))?
        {
            return Err(Error::BlockingConsole { end });
        }
    }
    Ok(OpenSerial {
        endpoint: Some(SerialEndpoint::Descriptors {
            input: console.input,
            output: console.output,
        }),
        guard: SerialGuard::default(),
    })
}

/// Whether a read or write can wait for the other end.
fn may_block(descriptor: &impl AsFd) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_NONBLOCK) {
        return Ok(false);
    }
    let kind = SFlag::from_bits_truncate(fstat(descriptor)?.st_mode) & SFlag::S_IFMT;
    Ok(kind != SFlag::S_IFREG)
}

fn open_pty() -> io::Result<OpenSerial> {
    let pty = openpty(None, None)?;
    // The guest does its own echo and line editing.
    let mut settings = tcgetattr(&pty.slave)?;
    cfmakeraw(&mut settings);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &settings)?;
    let path = nix::unistd::ttyname(&pty.slave)?;
    set_nonblocking(&pty.master)?;
    let input = pty.master.try_clone()?;
    Ok(OpenSerial {
        endpoint: Some(SerialEndpoint::Descriptors {
            input: Some(input),
            output: Some(pty.master),
        }),
        guard: SerialGuard {
            path: Some(path),
            _pty_user_end: Some(pty.slave),
        },
    })
}

fn set_nonblocking(descriptor: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn open_file(opener: &dyn Opener, stream: &str, path: &Path) -> Result<OpenSerial, Error> {
    let error = |remedy| {
        move |source| Error::Serial {
            action: format!("open '{}' for the output of {stream}", path.display()),
            source,
            remedy,
        }
    };
    // Appending keeps what the file holds, whatever it is.
    let file = opener.file(path, FileAccess::Append);
    let file = file.map_err(|source| match source.raw_os_error() {
        Some(libc::ENXIO) => {
            error(": it is a pipe that nobody reads; start its reader first")(source)
        }
        _ => error("")(source),
    })?;
    // A pipe or the like, unlike a file, can have several writers.
    if file.metadata().map_err(error(""))?.is_file() {
        lock_patiently(&file, Lock::Exclusive).map_err(error(
            "; it is in use by another machine, or is a disk of this one",
        ))?;
    }
    Ok(OpenSerial {
        endpoint: Some(SerialEndpoint::Descriptors {
            input: None,
            output: Some(file.into()),
        }),
        guard: SerialGuard {
            path: Some(path.to_path_buf()),
            _pty_user_end: None,
        },
    })
}

fn open_socket(opener: &dyn Opener, stream: &str, path: &Path) -> Result<OpenSerial, Error> {
    let listener = opener.listen(path).map_err(|source| Error::Listen {
        path: path.to_path_buf(),
        purpose: stream.to_string(),
        source,
    })?;
    Ok(OpenSerial {
        endpoint: Some(SerialEndpoint::Listener(listener)),
        guard: SerialGuard {
            path: Some(path.to_path_buf()),
            _pty_user_end: None,
        },
    })
}
