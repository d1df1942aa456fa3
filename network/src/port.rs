//! Places of machines on networks, and the records that tell who has them.
//!
//! The process of a machine holds a lock on its record. The kernel gives the lock up when the process ends, however it
//! ends, so a record without a lock is that of a machine that was killed.

use std::fs::{File, OpenOptions};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use serde::{Deserialize, Serialize};

use crate::folders::{Folders, names_in, read_json, remove_file, write_json};
use crate::{HostName, Mac, NetworkError};

/// What is known about a machine's place on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    /// The interface of the host that leads to the machine.
    pub interface: String,
    /// The network, if it is one that is defined.
    pub network: Option<String>,
    /// Whether the interface outlives the machine's process, and is to be removed.
    pub is_lasting: bool,
    /// The machine's MAC address.
    pub mac: Mac,
    /// The address that is reserved for the machine.
    pub address: Option<Ipv4Addr>,
    /// What the machine is called.
    pub hostname: Option<HostName>,
    /// Whether the machine can send under its own addresses only.
    pub filter: bool,
    /// The machine's process.
    pub pid: u32,
    /// The number of the user of that process.
    #[serde(default)]
    pub uid: u32,
}

/// Keeps the record of a machine that runs.
#[derive(Debug)]
pub(crate) struct RecordLock {
    file: Flock<File>,
}

impl RecordLock {
    /// Returns the file, which has the lock as long as a copy of it is open.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Writes the record of a port, and keeps it until the result is dropped.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn record(folders: &Folders, record: &Record) -> Result<RecordLock, NetworkError> {
    let path = folders.ports().join(&record.interface);
    write_json(&path, record)?;
    let lock = try_lock(&path)?;
    let held = || NetworkError::file("lock", &path)(Errno::EWOULDBLOCK.into());
    lock.map(|file| RecordLock { file }).ok_or_else(held)
}

/// Removes the record of a port.
///
/// # Errors
/// If it stays.
pub(crate) fn forget(folders: &Folders, interface: &str) -> Result<(), NetworkError> {
    remove_file(&folders.ports().join(interface))
}

/// Returns the records of ports: those of machines that run, and those of machines that were killed.
///
/// # Errors
/// If they cannot be read.
pub(crate) fn records(folders: &Folders) -> Result<(Vec<Record>, Vec<Record>), NetworkError> {
    let (mut living, mut dead) = (Vec::new(), Vec::new());
    for name in names_in(&folders.ports())? {
        let path = folders.ports().join(&name);
        let is_dead = try_lock(&path)?.is_some();
        match read_json::<Record>(&path) {
            Ok(Some(record)) if is_dead => dead.push(record),
            Ok(Some(record)) => living.push(record),
            Ok(None) => {}
            // Half a record, of a host that lost its power.
            Err(NetworkError::Broken { .. }) if is_dead => remove_file(&path)?,
            Err(error) => return Err(error),
        }
    }
    Ok((living, dead))
}

/// Locks a record, or returns `None` if the process of a machine has done so.
fn try_lock(path: &Path) -> Result<Option<Flock<File>>, NetworkError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(path);
    let file = file.map_err(NetworkError::file("open", path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => Ok(Some(file)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(NetworkError::file("lock", path)(errno.into())),
    }
}
