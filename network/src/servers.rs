//! Processes that serve a network: how they are found, and how they are ended.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::NetworkError;
use crate::folders::Folders;

/// How long a server may take to end before it is killed.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long to wait between looks at whether it has ended.
const END_INTERVAL: Duration = Duration::from_millis(2);

/// A kind of server, of which a network has at most one.
pub(crate) struct Kind {
    /// What messages call its process.
    pub(crate) name: &'static str,
    /// Returns the folder of the network that a process with these arguments serves, if it is such a server.
    pub(crate) folder: fn(&[&OsStr]) -> Option<PathBuf>,
}

impl Kind {
    /// Returns the process whose number is in the file `name` of `folder`, if it is the server of that network.
    pub(crate) fn running(&self, folder: &Path, name: &str) -> Option<Pid> {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?);
        (self.folder_of(pid)? == folder).then_some(pid)
    }

    /// Ends the server of the network whose folder is `folder`, even if it has not written yet which process it is.
    ///
    /// # Errors
    /// If it does not end.
    pub(crate) fn stop(&self, folders: &Folders, folder: &Path) -> Result<(), NetworkError> {
        for (pid, served) in self.all(folders) {
            if served == folder {
                self.end(pid)?;
            }
        }
        Ok(())
    }

    /// Ends all servers of networks that are not started.
    ///
    /// # Errors
    /// If one does not end.
    pub(crate) fn end_orphans(
        &self,
        folders: &Folders,
        is_started: impl Fn(&str) -> bool,
    ) -> Result<(), NetworkError> {
        for (pid, folder) in self.all(folders) {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            if !is_started(&name) {
                self.end(pid)?;
            }
        }
        Ok(())
    }

    fn end(&self, pid: Pid) -> Result<(), NetworkError> {
        let deadline = Instant::now() + END_LIMIT;
        let mut signal = Some(Signal::SIGTERM);
        while self.folder_of(pid).is_some() {
            if Instant::now() > deadline {
                signal = Some(Signal::SIGKILL);
            }
            if let Some(signal) = signal.take()
                && let Err(errno) = kill(pid, signal)
                && errno != Errno::ESRCH
            {
                let action = format!("end {}, process {pid}", self.name);
                return Err(NetworkError::netlink(action)(errno.into()));
            }
            thread::sleep(END_INTERVAL);
        }
        Ok(())
    }

    /// Returns the servers of networks in this network namespace: processes, and the folders of their networks.
    fn all(&self, folders: &Folders) -> Vec<(Pid, PathBuf)> {
        let started = folders.started();
        let namespace = fs::read_link("/proc/thread-self/ns/net").ok();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = processes.filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            let pid = Pid::from_raw(pid);
            let folder = self.folder_of(pid)?;
            let is_here = fs::read_link(format!("/proc/{pid}/ns/net")).ok() == namespace;
            (is_here && folder.starts_with(&started)).then_some((pid, folder))
        });
        processes.collect()
    }

    /// Returns the folder of the network that a process serves, if it is such a server and has not ended.
    fn folder_of(&self, pid: Pid) -> Option<PathBuf> {
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments: Vec<_> = command
            .split(|&byte| byte == 0)
            .map(OsStr::from_bytes)
            .collect();
        (self.folder)(&arguments)
    }
}
