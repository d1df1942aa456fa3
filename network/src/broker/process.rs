//! The process of a broker: how it is started, found and ended.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::unistd::Gid;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

use crate::folders::{Folders, remove_file, write_file};
use crate::program::Program;
use crate::servers::Kind;
use crate::{GroupName, NetworkError};

/// The processes that give users places.
pub(crate) const BROKERS: Kind = Kind {
    name: "the broker of a network",
    folder: folder_of,
};

/// What the program calls the command that is a broker.
const COMMAND: [&str; 2] = ["network", "broker"];
/// How many connections may wait to be accepted.
const BACKLOG: i32 = 128;
/// The socket of a broker, and the files with the number and the last words of its process, in the folder of its network.
const SOCKET: &str = "broker.socket";
const PROCESS: &str = "broker.pid";
const LOG: &str = "broker.log";

/// The program that is a broker, for a process that is another one.
const BANTAM: Program = Program {
    name: "bantam",
    package: "bantam",
};

/// The broker of a network that is started.
pub(crate) struct Broker<'a> {
    folders: &'a Folders,
    network: &'a str,
}

impl<'a> Broker<'a> {
    /// Returns the broker of the network called `network`.
    pub(crate) fn of(folders: &'a Folders, network: &'a str) -> Broker<'a> {
        Broker { folders, network }
    }

    fn folder(&self) -> PathBuf {
        self.folders.network(self.network)
    }

    /// Returns the socket on which the broker listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder().join(SOCKET)
    }

    /// Whether the broker runs.
    pub(crate) fn is_running(&self) -> bool {
        BROKERS.running(&self.folder(), PROCESS).is_some()
    }

    /// Ends the broker, if it runs. Machines keep their places.
    ///
    /// # Errors
    /// If it does not end.
    pub(crate) fn stop(&self) -> Result<(), NetworkError> {
        BROKERS.stop(self.folders, &self.folder())?;
        remove_file(&self.socket())
    }

    /// Starts the broker, for the members of `group`.
    ///
    /// # Errors
    /// If there is no such group, the socket cannot be made, or the process cannot be started.
    pub(crate) fn start(&self, group: &GroupName) -> Result<(), NetworkError> {
        self.stop()?;
        let listener = self.listen(group.id()?)?;
        let log = self.folder().join(LOG);
        let file = File::create(&log).map_err(NetworkError::file("write", &log))?;
        let action = format!("start the broker of network '{}'", self.network);
        let program = program()?;
        let start = || -> io::Result<Child> {
            let (mut ready, starting) = io::pipe()?;
            let mut command = Command::new(program);
            command.arg0(BANTAM.name).args(COMMAND).arg(self.folder());
            command.stdin(listener).stdout(starting).stderr(file);
            command.current_dir("/");
            let mut child = command.spawn()?;
            // The command has an end of the pipe too.
            drop(command);
            if ready.read(&mut [0])? == 0 {
                let _ = child.wait();
                let reason = fs::read_to_string(&log).unwrap_or_default();
                return Err(io::Error::other(reason.trim().replace('\n', " ")));
            }
            Ok(child)
        };
        let child = start().map_err(NetworkError::netlink(action))?;
        write_file(
            &self.folder().join(PROCESS),
            format!("{}\n", child.id()).as_bytes(),
        )
    }

    /// Makes the socket, to which only root and members of `group` can connect.
    fn listen(&self, group: Gid) -> Result<OwnedFd, NetworkError> {
        let path = self.socket();
        let listen = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            bind(&socket, &SocketAddrUnix::new(&path)?)?;
            // Nobody can connect before `listen`.
            chown(&path, None, Some(group.as_raw()))?;
            fs::set_permissions(&path, Permissions::from_mode(0o660))?;
            listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        listen().map_err(NetworkError::file("listen at", &path))
    }
}

/// Returns the folder of the network whose broker has these arguments.
fn folder_of(arguments: &[&OsStr]) -> Option<PathBuf> {
    match arguments {
        [name, first, second, folder, ..] if *name == BANTAM.name => {
            let is_broker = [*first, *second] == COMMAND;
            is_broker.then(|| PathBuf::from(folder))
        }
        _ => None,
    }
}

/// Returns this program, even if its file has been replaced since, or the one in the search path if this is another one.
fn program() -> Result<PathBuf, NetworkError> {
    let own = env::current_exe().unwrap_or_default();
    if own.file_name().is_some_and(|name| name == BANTAM.name) && own.exists() {
        return Ok(own);
    }
    let is_replaced =
        own.file_name() == Some(&OsString::from(format!("{} (deleted)", BANTAM.name)));
    match is_replaced {
        true => Ok(Path::new("/proc/self/exe").to_owned()),
        false => BANTAM.find(),
    }
}
