//! All machines of a user: how they come to be, and how they go.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bantam_vmm::config::MachineConfig;

use crate::definition::{RestartPolicy, Settings, machine_file};
use crate::error::Error;
use crate::files;
use crate::folders::{Folders, name_of};
use crate::lock::{self, Purpose};
use crate::mac::give_mac_addresses;
use crate::machine::{Machine, MachineState, file, write_new};
use crate::name::MachineName;
use crate::provision::Provision;
use crate::states::states;

/// Begins the name of the folder of a machine that is being made.
pub(crate) const NEW: &str = ".new-";
/// Begins the name of the folder of a machine that is being removed.
const GONE: &str = ".gone-";
/// The lock of the folder of all machines.
const ALL_LOCK: &str = ".lock";
/// How long a command may wait for others that make, rename or remove machines.
const ALL_LOCK_TIME: Duration = Duration::from_secs(10);

/// The machines of one user.
#[derive(Clone, Debug)]
pub struct Manager {
    folders: Folders,
}

/// A machine in a list.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The machine.
    pub machine: Machine,
    /// What it does.
    pub state: MachineState,
}

/// What of a machine is removed beside its definition.
#[derive(Clone, Copy, Debug, Default)]
pub struct Removal {
    /// The images of the disks that it writes to, unless another machine uses them.
    pub storage: bool,
    /// Its snapshots.
    pub snapshots: bool,
    /// Its managed save.
    pub managed_save: bool,
}

impl Manager {
    /// Returns the manager of the machines in `folders`.
    pub fn new(folders: Folders) -> Manager {
        Manager { folders }
    }

    /// Returns the manager of the machines of this process's user.
    ///
    /// # Errors
    /// Those of [`Folders::of_user`].
    pub fn of_user() -> Result<Manager, Error> {
        Folders::of_user().map(Manager::new)
    }

    /// Returns the folders.
    pub fn folders(&self) -> &Folders {
        &self.folders
    }

    /// Returns the machine called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn machine(&self, name: &MachineName) -> Result<Machine, Error> {
        let machine = Machine::at(&self.folders, name.clone());
        match machine.exists() {
            true => Ok(machine),
            false => Err(machine.not_found()),
        }
    }

    /// Returns all machines, in the order of their names.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn machines(&self) -> Result<Vec<Machine>, Error> {
        let folder = &self.folders.machines;
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("read", folder)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::file("read", folder))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.extend(name_of(Path::new(&entry.file_name())));
            }
        }
        names.sort();
        let machines = names
            .into_iter()
            .map(|name| Machine::at(&self.folders, name));
        Ok(machines.filter(Machine::exists).collect())
    }

    /// Returns the machines with their states, all of them or those with a process. Machines that run are asked at the
    /// same time, so one that does not answer holds up nobody else.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn list(&self, all: bool) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for machine in self.machines()? {
            let is_active = match machine.is_active() {
                Ok(is_active) => is_active,
                // It was undefined meanwhile.
                Err(Error::NotFound { .. }) => continue,
                Err(error) => return Err(error),
            };
            if is_active || all {
                let state = match is_active {
                    true => MachineState::Unresponsive,
                    false => MachineState::ShutOff,
                };
                entries.push(Entry { machine, state });
            }
        }
        let active: Vec<_> = (0..)
            .zip(&entries)
            .filter(|(_, it)| it.state != MachineState::ShutOff)
            .map(|(place, _)| place)
            .collect();
        let machines: Vec<_> = active
            .iter()
            .map(|&place: &usize| &entries[place].machine)
            .collect();
        let found = states(&machines);
        for (place, state) in active.into_iter().zip(found) {
            let entry = &mut entries[place];
            entry.state = match state {
                MachineState::Running | MachineState::Paused => state,
                // It may have ended meanwhile.
                _ if !entry.machine.is_active().unwrap_or(false) => MachineState::ShutOff,
                state => state,
            };
        }
        entries.retain(|it| all || it.state != MachineState::ShutOff);
        Ok(entries)
    }

    /// Defines a machine that is like `config`.
    ///
    /// # Errors
    /// If there is a machine of that name, or of one that differs only by case, or the host does not let it be kept.
    pub fn create(
        &self,
        name: &MachineName,
        config: &MachineConfig,
        restart: RestartPolicy,
    ) -> Result<Machine, Error> {
        self.provision(name, config, restart, &Provision::default())
    }

    /// Defines a machine that is like `config`, and makes the files that `provision` says.
    ///
    /// # Errors
    /// Those of [`Manager::create`]; also if the image cannot be used, or the disk for cloud-init cannot be made.
    pub fn provision(
        &self,
        name: &MachineName,
        config: &MachineConfig,
        restart: RestartPolicy,
        provision: &Provision,
    ) -> Result<Machine, Error> {
        let _all = self.lock_all()?;
        if let Some(found) = self.find_folded(name)? {
            return Err(Error::Exists { found });
        }
        let new = self.new_folder(name);
        if new.exists() {
            let found = name.to_string();
            return Err(Error::Exists { found });
        }
        fs::create_dir(&new).map_err(Error::file("create", &new))?;
        let made = Settings::new(restart)
            .and_then(|mut settings| {
                let mut config = config.clone();
                give_mac_addresses(&mut config, &settings.id);
                let machine = Machine::at(&self.folders, name.clone());
                provision.make(&new, &machine, &mut config, &mut settings)?;
                write_new(&new, &machine_file(&config), &settings)
            })
            .and_then(|()| self.put_in_place(&new, name));
        if made.is_err() {
            // The first error says more.
            let _ = files::remove_folder(&new);
        }
        made
    }

    /// Defines a machine that is like `config`, or changes the one of that name; a machine that runs changes at its next
    /// start. Without `restart` its policy stays as it is.
    ///
    /// # Errors
    /// If the name differs from that of another machine only by case, another command is at work on the machine, or the
    /// host does not let it be kept.
    pub fn define(
        &self,
        name: &MachineName,
        config: &MachineConfig,
        restart: Option<RestartPolicy>,
    ) -> Result<Machine, Error> {
        let machine = Machine::at(&self.folders, name.clone());
        if !machine.exists() {
            return self.create(name, config, restart.unwrap_or_default());
        }
        let _change = machine.change("define")?;
        machine.make_persistent()?;
        let mut settings = machine.settings()?;
        let mut config = config.clone();
        give_mac_addresses(&mut config, &settings.id);
        if let Some(restart) = restart {
            settings.restart = restart;
            machine.write_settings(&settings)?;
        }
        machine.write_config(&machine_file(&config))?;
        Ok(machine)
    }

    /// Removes a machine that does not run, and what `removal` says. Returns the images that were kept although storage was
    /// to be removed, with the reason.
    ///
    /// # Errors
    /// If it runs, has snapshots or a managed save that are not to be removed, another command is at work on it, or the
    /// host refuses it.
    pub fn undefine(
        &self,
        machine: &Machine,
        removal: Removal,
    ) -> Result<Vec<(PathBuf, String)>, Error> {
        let _all = self.lock_all()?;
        let name = machine.name();
        let gone = {
            let _change = machine.change("undefine")?;
            machine.require_shut_off("undefine")?;
            self.require_unlinked(machine, "undefine")?;
            if machine.has_managed_save() && !removal.managed_save {
                let reason = "it has a managed save; remove that too (--managed-save)";
                return Err(machine.refused("undefine", reason));
            }
            if !removal.snapshots && !machine.snapshots()?.is_empty() {
                let reason = "it has snapshots; remove them too (--snapshots)";
                return Err(machine.refused("undefine", reason));
            }
            machine.set_autostart(false)?;
            let gone = self.folders.machines.join(format!("{GONE}{name}"));
            // What was left of an earlier one has been removed with the lock of all machines.
            fs::rename(machine.folder(), &gone).map_err(Error::file("remove", machine.folder()))?;
            gone
        };
        let kept = match removal.storage {
            true => self.remove_storage(&gone, machine.folder()),
            false => Vec::new(),
        };
        files::remove_folder(&gone).map_err(Error::file("remove", &gone))?;
        machine.remove_runtime()?;
        Ok(kept)
    }

    /// Gives a machine that does not run another name.
    ///
    /// # Errors
    /// If it runs or has snapshots or a managed save, there is a machine of the new name, another command is at work on
    /// it, or the host refuses it.
    pub fn rename(&self, machine: &Machine, name: &MachineName) -> Result<Machine, Error> {
        let _all = self.lock_all()?;
        let _change = machine.change("rename")?;
        machine.require_shut_off("rename")?;
        if machine.has_managed_save() || !machine.snapshots()?.is_empty() {
            let reason = "its snapshots or its managed save know it by its name; remove them first";
            return Err(machine.refused("rename", reason));
        }
        machine.require_independent_images("rename")?;
        self.require_unlinked(machine, "rename")?;
        match self.find_folded(name)? {
            // Only the case of its letters changes.
            Some(found) if found == machine.name().as_str() && found != name.as_str() => {}
            Some(found) => return Err(Error::Exists { found }),
            None if self.new_folder(name).exists() => {
                let found = name.to_string();
                return Err(Error::Exists { found });
            }
            None => {}
        }
        let has_own_files = machine.make_own_paths_relative()?;
        let is_autostarted = machine.is_autostarted();
        machine.set_autostart(false)?;
        let renamed = self.put_in_place(machine.folder(), name)?;
        if has_own_files {
            // The paths are whole again, for those who read the machine file somewhere else.
            renamed.update_config(|_| ())?;
        }
        if is_autostarted {
            renamed.set_autostart(true)?;
        }
        machine.remove_runtime()?;
        Ok(renamed)
    }

    /// Returns the folder of a machine that is being made.
    pub(crate) fn new_folder(&self, name: &MachineName) -> PathBuf {
        self.folders.machines.join(format!("{NEW}{name}"))
    }

    pub(crate) fn put_in_place(&self, folder: &Path, name: &MachineName) -> Result<Machine, Error> {
        let machine = Machine::at(&self.folders, name.clone());
        fs::rename(folder, machine.folder())
            .and_then(|()| files::sync_folder(&self.folders.machines))
            .map_err(Error::file("create", machine.folder()))?;
        Ok(machine)
    }

    /// Keeps all other commands from making, renaming and removing machines, and removes what such a command has left
    /// when it was killed.
    pub(crate) fn lock_all(&self) -> Result<File, Error> {
        let folder = &self.folders.machines;
        files::create_folders(folder).map_err(Error::file("create", folder))?;
        let path = folder.join(ALL_LOCK);
        let file = lock::create(&path).map_err(Error::file("open", &path))?;
        let begin = Instant::now();
        while !lock::try_lock(&file, Purpose::Change).map_err(Error::file("lock", &path))? {
            if begin.elapsed() >= ALL_LOCK_TIME {
                let reason = "another command has been at work on it for a long time";
                return Err(Error::file("lock", folder)(io::Error::other(reason)));
            }
            thread::sleep(Duration::from_millis(2));
        }
        for entry in fs::read_dir(folder).map_err(Error::file("read", folder))? {
            let entry = entry.map_err(Error::file("read", folder))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let path = entry.path();
            if name.starts_with(GONE) || (name.starts_with(NEW) && !is_being_made(&path)) {
                files::remove_folder(&path).map_err(Error::file("remove", &path))?;
            }
            if let Some(name) = name_of(&path) {
                let machine = Machine::at(&self.folders, name);
                if machine.has_vanished() {
                    self.remove(&machine)?;
                    machine.remove_runtime()?;
                }
            }
        }
        Ok(file)
    }

    /// Removes a transient machine, whose process calls this as the last thing that it does. One that another command is at
    /// work on stays, as it may be started again, and has vanished when that is done.
    pub(crate) fn remove_transient(&self, machine: &Machine) -> Result<(), Error> {
        let _all = self.lock_all()?;
        match machine.change("remove") {
            Ok(_change) => self.remove(machine),
            Err(Error::Busy { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes the folder of a machine, at once for all who look.
    fn remove(&self, machine: &Machine) -> Result<(), Error> {
        let gone = self
            .folders
            .machines
            .join(format!("{GONE}{}", machine.name()));
        fs::rename(machine.folder(), &gone).map_err(Error::file("remove", machine.folder()))?;
        files::remove_folder(&gone).map_err(Error::file("remove", &gone))
    }

    /// Returns the name of a machine that is the same as `name` or differs only by case.
    pub(crate) fn find_folded(&self, name: &MachineName) -> Result<Option<String>, Error> {
        let machines = self.machines()?;
        let mut names = machines.iter().map(Machine::name);
        let found = names.find(|it| it.folded() == name.folded());
        Ok(found.map(ToString::to_string))
    }

    /// Removes the images of the machine that is now in `folder`, and was in `home`, if no other machine has them.
    fn remove_storage(&self, folder: &Path, home: &Path) -> Vec<(PathBuf, String)> {
        let images = |path: &Path| -> Result<Vec<PathBuf>, Error> {
            let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
            let config = crate::definition::parse_machine_file(&text, path)?;
            let written = config.disks.into_iter().filter(|disk| !disk.readonly);
            Ok(written.map(|disk| disk.path).collect())
        };
        let own = match images(&folder.join(file::MACHINE)) {
            Ok(own) => own,
            Err(error) => return vec![(home.join(file::MACHINE), error.to_string())],
        };
        let others = self.machines().unwrap_or_default();
        let used: Vec<_> = others
            .iter()
            .flat_map(|machine| machine.needed_images().files)
            .collect();
        let mut kept = Vec::new();
        // Those in its own folder go with it.
        for image in own
            .into_iter()
            .filter(|image| ![home, folder].iter().any(|it| image.starts_with(it)))
        {
            let remove = || {
                let real = fs::canonicalize(&image).map_err(|error| error.to_string())?;
                if used.contains(&real) {
                    return Err("another machine uses it".to_owned());
                }
                let kind = fs::metadata(&real).map_err(|error| error.to_string())?;
                if kind.file_type().is_block_device() {
                    return Err("it is a block device".to_owned());
                }
                fs::remove_file(&image).map_err(|error| error.to_string())
            };
            if let Err(reason) = remove() {
                kept.push((image, reason));
            }
        }
        kept
    }
}

/// Whether a command is at work on a machine whose folder is not complete, or the process of a machine that arrives.
fn is_being_made(folder: &Path) -> bool {
    let Ok(lock) = File::open(folder.join(file::LOCK)) else {
        return false;
    };
    [Purpose::Change, Purpose::Life]
        .into_iter()
        .any(|purpose| lock::is_locked(&lock, purpose).unwrap_or(false))
}
