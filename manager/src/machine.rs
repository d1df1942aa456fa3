//! One named machine: what is kept of it, and whether it runs.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{process, thread};

use bantam_control::ControlClient;
use bantam_vmm::State;
use bantam_vmm::config::{MachineConfig, SerialConfig, read_text_file};
use nix::unistd::Pid;

use crate::definition::{Settings, parse_machine_file};
use crate::error::Error;
use crate::files;
use crate::folders::Folders;
use crate::history::{EndReason, Run, RunEnd};
use crate::lock::{self, ChangeLock, Purpose};
use crate::mac::give_mac_addresses;
use crate::name::MachineName;
use crate::states::states;

/// Names of files in the folder of a machine.
pub(crate) mod file {
    /// The machine file.
    pub(crate) const MACHINE: &str = "machine.toml";
    /// The settings of the manager.
    pub(crate) const SETTINGS: &str = "settings.toml";
    /// Is there if the machine vanishes when it has ended.
    pub(crate) const TRANSIENT: &str = "transient";
    /// The document that the machine was defined by, if it was: libvirt's domain XML.
    pub(crate) const DOCUMENT: &str = "domain.xml";
    /// The locks.
    pub(crate) const LOCK: &str = "lock";
    /// How the last run began and ended.
    pub(crate) const RUN: &str = "run.json";
    /// The log of the machine's process.
    pub(crate) const LOG: &str = "log";
    /// The state of a managed save.
    pub(crate) const SAVE: &str = "save";
    /// Snapshots.
    pub(crate) const SNAPSHOTS: &str = "snapshots";
    /// The disk whose overlay is being merged while the machine runs.
    pub(crate) const MERGING: &str = "merging";
    /// Overlays of disks.
    pub(crate) const DISKS: &str = "disks";
    /// Overlays of disks with another identity.
    pub(crate) const SYSPREP: &str = "sysprep";
}

/// How long a process may hold a lock that is about to be released.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long a command that copies a machine waits for others that do the same.
const COPY_ACCESS_TIME: Duration = Duration::from_secs(2);
/// The longest time between two looks at a lock.
const LONGEST_INTERVAL: Duration = Duration::from_millis(10);

/// A named machine.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(crate) folders: Folders,
    name: MachineName,
    folder: PathBuf,
    runtime: PathBuf,
}

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// It has no process.
    ShutOff,
    /// Its process builds it, or waits to start it again.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest stands still.
    Paused,
    /// Its process ends.
    Ending,
    /// Its process does not answer.
    Unresponsive,
}

impl MachineState {
    /// Returns the state as virsh calls it, if virsh has it.
    pub fn as_str(self) -> &'static str {
        match self {
            MachineState::ShutOff => "shut off",
            MachineState::Starting => "starting",
            MachineState::Running => "running",
            MachineState::Paused => "paused",
            MachineState::Ending => "in shutdown",
            MachineState::Unresponsive => "no answer",
        }
    }

    pub(crate) fn of(state: State) -> MachineState {
        match state {
            State::NotConfigured | State::Configured | State::Starting => MachineState::Starting,
            State::Running | State::Pausing | State::Resuming => MachineState::Running,
            State::Paused => MachineState::Paused,
            State::Stopped => MachineState::Ending,
        }
    }
}

/// The right to change what belongs to a machine, until this is dropped. No two commands have it at once.
#[derive(Debug)]
pub(crate) struct Change {
    lock: ChangeLock,
}

/// What a command may do with a machine that it copies, until this is dropped.
#[derive(Debug)]
pub(crate) enum CopyAccess {
    /// Read what belongs to a machine that does not run. Others may read it too, and nobody can change it.
    Shared {
        /// Is shared with others.
        _lock: ChangeLock,
    },
    /// Change a machine that runs.
    Exclusive(Change),
}

impl Change {
    /// Takes the right for a machine that is being made in `folder`, before anybody knows it.
    pub(crate) fn of_new(folder: &Path) -> Result<Change, Error> {
        let path = folder.join(file::LOCK);
        let lock = lock::create(&path).map_err(Error::file("open", &path))?;
        lock::try_lock(&lock, Purpose::Change).map_err(Error::file("lock", &path))?;
        let lock = ChangeLock::of(lock);
        Ok(Change { lock })
    }
}

impl Machine {
    /// Returns the machine, whether it exists or not.
    pub(crate) fn at(folders: &Folders, name: MachineName) -> Machine {
        let folder = folders.of_machine(&name);
        Machine::in_folder(folders, name, folder)
    }

    /// Returns the machine of this name that is kept in `folder`.
    pub(crate) fn in_folder(folders: &Folders, name: MachineName, folder: PathBuf) -> Machine {
        Machine {
            folder,
            runtime: folders.runtime_of(&name),
            folders: folders.clone(),
            name,
        }
    }

    /// Returns the name.
    pub fn name(&self) -> &MachineName {
        &self.name
    }

    /// Returns the folder in which the machine is kept.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the folder of the sockets, which exists while the machine runs.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Returns the path of the machine file.
    pub fn machine_file(&self) -> PathBuf {
        self.folder.join(file::MACHINE)
    }

    /// Returns the path of the log. Earlier lines are in a file of the same name with `.1`.
    pub fn log(&self) -> PathBuf {
        self.folder.join(file::LOG)
    }

    /// Returns the path of the control socket, which exists while the machine runs.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }

    /// Returns the path of the socket of the console, which exists while the machine runs.
    pub fn console_socket(&self) -> PathBuf {
        self.runtime.join("console.sock")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Returns whether the machine has been defined, and is not a transient one that has ended.
    pub fn exists(&self) -> bool {
        self.folder.is_dir() && !self.has_vanished()
    }

    /// Returns whether the machine is transient: whether it vanishes when it has ended.
    pub fn is_transient(&self) -> bool {
        self.file(file::TRANSIENT).exists()
    }

    /// Returns whether the machine is a transient one that has ended, and whose folder nobody has removed yet.
    pub(crate) fn has_vanished(&self) -> bool {
        self.is_transient() && {
            let lock = File::open(self.file(file::LOCK));
            let is_free = |purpose| {
                let lock = lock.as_ref().ok();
                lock.is_none_or(|lock| !lock::is_locked(lock, purpose).unwrap_or(true))
            };
            is_free(Purpose::Life) && is_free(Purpose::Change)
        }
    }

    /// Has the machine stay when it has ended.
    pub(crate) fn make_persistent(&self) -> Result<(), Error> {
        let path = self.file(file::TRANSIENT);
        files::remove_file(&path).map_err(Error::file("remove", &path))
    }

    /// Returns an error if the machine vanishes when it has ended.
    pub(crate) fn require_persistent(&self, action: &'static str) -> Result<(), Error> {
        match self.is_transient() {
            true => {
                let reason = "it is transient, and vanishes when it has ended; define it first (bantam define), and it stays";
                Err(self.refused(action, reason))
            }
            false => Ok(()),
        }
    }

    /// Reads the text of the machine file.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn machine_file_text(&self) -> Result<String, Error> {
        let path = self.machine_file();
        match read_text_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.exists() => {
                Err(self.not_found())
            }
            text => text.map_err(Error::file("read", &path)),
        }
    }

    /// Reads the machine file: what the machine is at its next start.
    ///
    /// # Errors
    /// If it cannot be read, or is not a machine file.
    pub fn config(&self) -> Result<MachineConfig, Error> {
        parse_machine_file(&self.machine_file_text()?, &self.machine_file())
    }

    /// Returns the configuration for the machine's process: `stdio` is the socket of the console, networks know the machine
    /// by its name, and its guest by its id.
    ///
    /// # Errors
    /// Those of [`Machine::config`].
    pub fn process_config(&self) -> Result<MachineConfig, Error> {
        let mut config = self.config()?;
        let id = self.settings()?.id;
        give_mac_addresses(&mut config, &id);
        let socket = self.console_socket();
        let channels = config.channels.iter_mut().map(|channel| &mut channel.end);
        for end in [&mut config.serial, &mut config.console]
            .into_iter()
            .chain(channels)
        {
            if *end == SerialConfig::Stdio {
                *end = SerialConfig::Socket(socket.clone());
            }
        }
        for net in &mut config.nets {
            net.name_guest(self.name.as_str());
        }
        let smbios = config.smbios.get_or_insert_default();
        if smbios.uuid.is_none() {
            smbios.uuid = id.parse().ok();
        }
        Ok(config)
    }

    /// Reads the settings.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn settings(&self) -> Result<Settings, Error> {
        let path = self.file(file::SETTINGS);
        let text = files::read(&path).map_err(Error::file("read", &path))?;
        match text {
            Some(text) => Settings::parse(&text, &path),
            None => Err(match self.exists() {
                true => Error::file("read", &path)(io::ErrorKind::NotFound.into()),
                false => self.not_found(),
            }),
        }
    }

    /// Returns whether the machine has a process: that is, whether a process has its lock.
    ///
    /// # Errors
    /// If the lock cannot be looked at, or there is no such machine.
    pub fn is_active(&self) -> Result<bool, Error> {
        let path = self.file(file::LOCK);
        match File::open(&path) {
            Ok(file) => lock::is_locked(&file, Purpose::Life).map_err(Error::file("test", &path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match self.exists() {
                true => Ok(false),
                false => Err(self.not_found()),
            },
            Err(error) => Err(Error::file("open", &path)(error)),
        }
    }

    /// Returns what the machine does.
    ///
    /// # Errors
    /// Those of [`Machine::is_active`].
    pub fn state(&self) -> Result<MachineState, Error> {
        if !self.is_active()? {
            return Ok(MachineState::ShutOff);
        }
        match states(&[self])[..] {
            [state @ (MachineState::Running | MachineState::Paused)] => Ok(state),
            // It may have ended meanwhile.
            _ if !self.is_active()? => Ok(MachineState::ShutOff),
            [state] => Ok(state),
            _ => Ok(MachineState::Unresponsive),
        }
    }

    /// Returns how the last run began, and how it ended if it has; `None` if the machine has not run yet.
    ///
    /// # Errors
    /// Those of [`Machine::is_active`].
    pub fn last_run(&self) -> Result<Option<Run>, Error> {
        let is_active = self.is_active()?;
        let mut run = Run::read(&self.file(file::RUN));
        if let Some(run) = &mut run {
            match is_active {
                true => run.end = None,
                false => {
                    run.end.get_or_insert(RunEnd {
                        time: None,
                        reason: EndReason::Killed,
                        detail: None,
                    });
                }
            }
        }
        Ok(run)
    }

    pub(crate) fn write_run(&self, run: &Run) -> Result<(), Error> {
        let path = self.file(file::RUN);
        run.write(&path).map_err(Error::file("write", &path))
    }

    /// Returns whether there is a saved state that the next start goes on from.
    pub fn has_managed_save(&self) -> bool {
        self.file(file::SAVE).join("state").exists()
    }

    /// Returns the process of the machine: the one that has its lock as standard input. `None` if there is none that this
    /// user can see.
    pub fn process(&self) -> Option<Pid> {
        let identity = |path: &Path| {
            let file = fs::metadata(path).ok()?;
            Some((file.dev(), file.ino()))
        };
        let lock = identity(&self.file(file::LOCK))?;
        let processes = fs::read_dir("/proc").ok()?;
        processes.flatten().find_map(|process| {
            let number = process.file_name().to_str()?.parse().ok()?;
            let input = process.path().join("fd/0");
            (identity(&input)? == lock).then(|| Pid::from_raw(number))
        })
    }

    pub(crate) fn not_found(&self) -> Error {
        let name = self.name.clone();
        Error::NotFound { name }
    }

    pub(crate) fn refused(&self, action: &'static str, reason: impl Into<String>) -> Error {
        Error::Refused {
            action,
            name: self.name.clone(),
            reason: reason.into(),
        }
    }

    /// Takes the right to change what belongs to the machine, to `action` it.
    pub(crate) fn change(&self, action: &'static str) -> Result<Change, Error> {
        match self.lock_by(action, lock::try_lock)? {
            Some(lock) => Ok(Change { lock }),
            None => Err(self.busy(action)),
        }
    }

    /// Takes what a command needs to copy the machine, to `action` it, and finishes what a killed command has left.
    pub(crate) fn copy_access(&self, action: &'static str) -> Result<CopyAccess, Error> {
        let begin = Instant::now();
        loop {
            if let Some(lock) = self.lock_by(action, lock::try_lock)? {
                let change = Change { lock };
                self.mend(&change)?;
                if self.is_active()? {
                    return Ok(CopyAccess::Exclusive(change));
                }
                let Change { lock } = change;
                let path = self.file(file::LOCK);
                lock.share().map_err(Error::file("lock", &path))?;
                return Ok(CopyAccess::Shared { _lock: lock });
            }
            if let Some(lock) = self.lock_by(action, lock::try_share)?
                && !self.needs_mending()
                && !self.is_active()?
            {
                return Ok(CopyAccess::Shared { _lock: lock });
            }
            // Another that copies the machine has the lock alone for a moment.
            if begin.elapsed() >= COPY_ACCESS_TIME {
                return Err(self.busy(action));
            }
            thread::sleep(LONGEST_INTERVAL);
        }
    }

    /// Opens the lock of commands and takes it by `take`, to `action` the machine. Returns `None` if another has it.
    fn lock_by(
        &self,
        action: &'static str,
        take: impl Fn(&File, Purpose) -> io::Result<bool>,
    ) -> Result<Option<ChangeLock>, Error> {
        let path = self.file(file::LOCK);
        if !self.exists() {
            return Err(self.not_found());
        }
        let file = lock::create(&path).map_err(Error::file("open", &path))?;
        if !take(&file, Purpose::Change).map_err(Error::file("lock", &path))? {
            return Ok(None);
        }
        // The machine may have gone, or another may have its name, since the file was opened.
        let is_it = fs::metadata(&path).and_then(|now| Ok(now.ino() == file.metadata()?.ino()));
        if !is_it.unwrap_or(false) {
            return Err(self.not_found());
        }
        // It only makes messages better.
        let note = format!("{action} {}\n", process::id());
        let _ = file
            .set_len(0)
            .and_then(|()| file.write_all_at(note.as_bytes(), 0));
        Ok(Some(ChangeLock::of(file)))
    }

    fn busy(&self, action: &'static str) -> Error {
        Error::Busy {
            action,
            name: self.name.clone(),
            holder: holder(&self.file(file::LOCK)),
        }
    }

    /// Takes the lock of the machine's process for the process that is going to be started.
    pub(crate) fn take_life(&self) -> Result<File, Error> {
        let path = self.file(file::LOCK);
        let file = lock::create(&path).map_err(Error::file("open", &path))?;
        let begin = Instant::now();
        loop {
            if lock::try_lock(&file, Purpose::Life).map_err(Error::file("lock", &path))? {
                return Ok(file);
            }
            // One that was just killed may still be on its way out.
            let is_served = ControlClient::connect(&self.control_socket()).is_ok();
            if is_served || begin.elapsed() >= PATIENCE {
                return Err(self.running("start", "there is nothing to do"));
            }
            thread::sleep(LONGEST_INTERVAL);
        }
    }

    pub(crate) fn running(&self, action: &'static str, remedy: impl Into<String>) -> Error {
        Error::Running {
            action,
            name: self.name.clone(),
            remedy: remedy.into(),
        }
    }

    /// Returns an error if the machine runs.
    pub(crate) fn require_shut_off(&self, action: &'static str) -> Result<(), Error> {
        match self.is_active()? {
            true => {
                let name = &self.name;
                Err(self.running(
                    action,
                    format!("end it first (bantam shutdown {name}, or bantam destroy {name})"),
                ))
            }
            false => Ok(()),
        }
    }

    /// Waits until the machine has no process any more. Returns `false` if it still has one after `limit`.
    ///
    /// # Errors
    /// Those of [`Machine::is_active`].
    pub fn wait_until_shut_off(&self, limit: Option<Duration>) -> Result<bool, Error> {
        let begin = Instant::now();
        let mut interval = Duration::from_micros(200);
        loop {
            match self.is_active() {
                Ok(false) => return Ok(true),
                // It was undefined meanwhile.
                Err(Error::NotFound { .. }) => return Ok(true),
                Err(error) => return Err(error),
                Ok(true) => {}
            }
            if limit.is_some_and(|limit| begin.elapsed() >= limit) {
                return Ok(false);
            }
            thread::sleep(interval);
            interval = (interval * 2).min(LONGEST_INTERVAL);
        }
    }

    /// Writes the machine file.
    pub(crate) fn write_config(&self, text: &str) -> Result<(), Error> {
        let path = self.machine_file();
        files::replace(&path, text).map_err(Error::file("write", &path))
    }

    /// Writes the settings.
    pub(crate) fn write_settings(&self, settings: &Settings) -> Result<(), Error> {
        let path = self.file(file::SETTINGS);
        files::replace(&path, settings.to_toml()).map_err(Error::file("write", &path))
    }
}

/// Says which command has a lock, as it has written into the lock file.
fn holder(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    match text.trim().rsplit_once(' ') {
        // One that has just taken the lock may not have written yet.
        Some((action, process)) if Path::new("/proc").join(process).exists() => {
            format!("another command ({action}, process {process})")
        }
        _ => "another command".to_owned(),
    }
}

/// Writes the first files of a machine into a folder that nobody knows yet.
pub(crate) fn write_new(
    folder: &Path,
    machine_file: &str,
    settings: &Settings,
) -> Result<(), Error> {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(Error::file("write", &path))
    };
    write(file::SETTINGS, &settings.to_toml())?;
    write(file::LOCK, "")?;
    write(file::MACHINE, machine_file)?;
    files::sync_folder(folder).map_err(Error::file("write", folder))
}
