//! Where networks are kept, and the lock under which they are changed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::NetworkError;

/// Environment variable with the root of the folders, in place of that of the host's file system.
const ROOT_VARIABLE: &str = "BANTAM_NETWORK_ROOT";
/// How long to wait for another command that changes networks.
const LOCK_LIMIT: Duration = Duration::from_secs(15);
/// How long to wait between attempts at the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(2);

/// The folders in which networks are kept.
#[derive(Clone, Debug)]
pub(crate) struct Folders {
    /// What outlives a restart of the host.
    state: PathBuf,
    /// What does not.
    runtime: PathBuf,
}

/// The right to change networks. Dropping it gives it up, as the end of the process does.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Flock<File>,
}

impl Folders {
    /// Returns the folders of the host, or those in the folder that the environment names.
    pub(crate) fn of_host() -> Folders {
        let root = std::env::var_os(ROOT_VARIABLE);
        Folders::in_folder(root.map_or_else(|| PathBuf::from("/"), PathBuf::from))
    }

    fn in_folder(root: PathBuf) -> Folders {
        Folders {
            state: root.join("var/lib/bantam/networks"),
            runtime: root.join("run/bantam/networks"),
        }
    }

    /// Returns both folders.
    pub(crate) fn all(&self) -> [&Path; 2] {
        [&self.state, &self.runtime]
    }

    /// Returns the folder of the definitions.
    pub(crate) fn definitions(&self) -> &Path {
        &self.state
    }

    /// Returns the file of the definition of the network `name`.
    pub(crate) fn definition(&self, name: &str) -> PathBuf {
        self.state.join(format!("{name}.json"))
    }

    /// Returns the file of the leases of the network `name`.
    pub(crate) fn leases(&self, name: &str) -> PathBuf {
        self.state.join(format!("{name}.leases"))
    }

    /// Returns the folder whose folders are those of networks that are started.
    pub(crate) fn started(&self) -> PathBuf {
        self.runtime.join("started")
    }

    /// Returns the folder of the network `name` while it is started.
    pub(crate) fn network(&self, name: &str) -> PathBuf {
        self.started().join(name)
    }

    /// Returns the folder of the records of ports.
    pub(crate) fn ports(&self) -> PathBuf {
        self.runtime.join("ports")
    }

    /// Waits for the right to change networks.
    ///
    /// # Errors
    /// If this user may not have it, or another command keeps it for too long.
    pub(crate) fn lock(&self) -> Result<Lock, NetworkError> {
        create_folder(&self.state)?;
        create_folder(&self.started())?;
        // Nobody else may hold the lock of a record.
        let ports = self.ports();
        let created = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&ports);
        created.map_err(NetworkError::file("create", &ports))?;
        let path = self.runtime.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path);
        let mut file = file.map_err(NetworkError::file("lock", &path))?;
        let deadline = Instant::now() + LOCK_LIMIT;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => return Ok(Lock { _file: file }),
                Err((back, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = back,
                Err((_, Errno::EWOULDBLOCK)) => {
                    let seconds = LOCK_LIMIT.as_secs();
                    return Err(NetworkError::Busy { seconds });
                }
                Err((_, errno)) => return Err(NetworkError::file("lock", &path)(errno.into())),
            }
            thread::sleep(LOCK_INTERVAL);
        }
    }
}

/// Creates a folder that everybody can read, and those above it.
///
/// # Errors
/// If this user may not do it.
pub(crate) fn create_folder(path: &Path) -> Result<(), NetworkError> {
    let created = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path);
    created.map_err(NetworkError::file("create", path))
}

/// Writes a file that everybody can read, in the place of an earlier one: readers find one or the other.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write_file(path: &Path, contents: &[u8]) -> Result<(), NetworkError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Programs that watch the folder ignore names with a dot.
    let new = path.with_file_name(format!(".{name}.new"));
    let write = || {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o644)
            .open(&new)?;
        file.write_all(contents)?;
        fs::rename(&new, path)
    };
    write().map_err(NetworkError::file("write", path))
}

/// Writes `value` as JSON to a file that [`read_json`] reads.
///
/// # Errors
/// Those of [`write_file`].
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), NetworkError> {
    let text = serde_json::to_string_pretty(value).map_err(io::Error::from);
    let text = text.map_err(NetworkError::file("write", path))?;
    write_file(path, format!("{text}\n").as_bytes())
}

/// Reads what [`write_json`] has written; `None` if there is no such file.
///
/// # Errors
/// If it cannot be read, or is something else.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, NetworkError> {
    /// No file of a network is larger.
    const MAX_SIZE: u64 = 1 << 20;
    let text = match fs::metadata(path) {
        Ok(found) if found.len() > MAX_SIZE => Err(io::Error::from(ErrorKind::FileTooLarge)),
        Ok(_) => fs::read(path),
        Err(error) => Err(error),
    };
    let text = match text {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(NetworkError::file("read", path)(error)),
    };
    let value = serde_json::from_slice(&text).map_err(|error| NetworkError::Broken {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(Some(value))
}

/// Returns the names of what is in a folder, in order, without those that begin with a dot; none if there is no such
/// folder.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn names_in(folder: &Path) -> Result<Vec<String>, NetworkError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(NetworkError::file("read", folder)(error)),
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    let names = names.filter_map(|name| name.into_string().ok());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort_unstable();
    Ok(names)
}

/// Removes a file if it is there.
///
/// # Errors
/// If it stays.
pub(crate) fn remove_file(path: &Path) -> Result<(), NetworkError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(NetworkError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes a folder and what is in it, if it is there.
///
/// # Errors
/// If it stays.
pub(crate) fn remove_folder(path: &Path) -> Result<(), NetworkError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(NetworkError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders::in_folder(folder.path().to_owned());
        let lock = folders.lock().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let second = folders.lock().unwrap();
                sender.send(()).unwrap();
                drop(second);
            });
            let early = receiver.recv_timeout(Duration::from_millis(50));
            assert!(early.is_err());
            drop(lock);
            receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        });
    }

    #[test]
    fn files_are_read_back_and_broken_ones_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), None);
        write_json(&path, &[1, 2]).unwrap();
        assert_eq!(read_json(&path).unwrap(), Some(vec![1, 2]));
        assert_eq!(names_in(folder.path()).unwrap(), ["a.json"]);
        fs::write(&path, "{").unwrap();
        let error = read_json::<Vec<u32>>(&path).unwrap_err().to_string();
        assert!(error.contains("a.json"), "{error}");
        assert!(names_in(&folder.path().join("none")).unwrap().is_empty());
    }
}
