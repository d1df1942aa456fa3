//! Machines that are defined by a document which says more than a machine file: libvirt's domain XML.

use std::fs;
use std::path::Path;

use bantam_vmm::config::{MachineConfig, Uuid};

use crate::definition::{RestartPolicy, Settings, machine_file};
use crate::error::Error;
use crate::files;
use crate::mac::give_mac_addresses;
use crate::machine::{Change, Machine, file, write_new};
use crate::manager::Manager;
use crate::name::MachineName;
use crate::start::StartOptions;

const DEFINE: &str = "define";

/// What a document says of a machine.
#[derive(Debug)]
pub struct DocumentedMachine<'a> {
    /// The machine. Relative paths are relative to its folder.
    pub config: &'a MachineConfig,
    /// Its id, if that is given.
    pub id: Option<Uuid>,
    /// Its title.
    pub title: Option<&'a str>,
    /// When it is started again.
    pub restart: RestartPolicy,
    /// The text of the machine file that the change was made of, if it was a change of one that there is.
    pub before: Option<&'a str>,
}

impl Manager {
    /// Defines a machine, or changes the one of that name, which then is another one at its next start. `document` writes
    /// the document that is kept with it, of the machine with its MAC addresses.
    ///
    /// # Errors
    /// If the id is that of another machine, or the machine has another id; those of [`Manager::define`] and of `document`;
    /// if the machine file has been changed by others since it was `before`.
    pub fn define_by_document(
        &self,
        name: &MachineName,
        documented: &DocumentedMachine<'_>,
        document: impl Fn(&Machine, &MachineConfig, &Settings) -> Result<String, String>,
    ) -> Result<Machine, Error> {
        let _all = self.lock_all()?;
        let machine = Machine::at(self.folders(), name.clone());
        let id = documented.id.map(|id| id.to_string());
        if let Some(id) = &id {
            self.require_unused_id(&machine, id)?;
        }
        if machine.exists() {
            let _change = machine.change(DEFINE)?;
            let mut settings = machine.settings()?;
            if let Some(id) = id.filter(|id| !settings.id.eq_ignore_ascii_case(id)) {
                let own = &settings.id;
                let reason = format!(
                    "there is one with the UUID {own}, and not {id}; remove <uuid> or write the same, or undefine it first"
                );
                return Err(machine.refused(DEFINE, reason));
            }
            if let Some(before) = documented.before
                && machine.machine_file_text()? != before
            {
                let reason = "its machine file has been changed meanwhile; do it again";
                return Err(machine.refused(DEFINE, reason));
            }
            machine.make_persistent()?;
            let (config, text) = complete(&machine, documented, &document, &mut settings)?;
            machine.write_settings(&settings)?;
            write_document(machine.folder(), &text)?;
            machine.write_config(&config)?;
            return Ok(machine);
        }
        self.create_by_document(&machine, documented, document, |_| Ok(()))?;
        Ok(machine)
    }

    /// Defines a machine that there is not yet, and starts it. It vanishes when it has ended, and its disks stay.
    ///
    /// # Errors
    /// If there is a machine of that name or id, it cannot be started, or the host does not let it be kept; then there is
    /// nothing of it.
    pub fn start_transient(
        &self,
        name: &MachineName,
        documented: &DocumentedMachine<'_>,
        document: impl Fn(&Machine, &MachineConfig, &Settings) -> Result<String, String>,
    ) -> Result<Machine, Error> {
        let machine = Machine::at(self.folders(), name.clone());
        let change = {
            let _all = self.lock_all()?;
            if let Some(id) = &documented.id {
                self.require_unused_id(&machine, &id.to_string())?;
            }
            self.create_by_document(&machine, documented, document, |new| {
                let path = new.join(file::TRANSIENT);
                fs::write(&path, "").map_err(Error::file("write", &path))?;
                // It would have vanished if nobody were at work on it.
                Change::of_new(new)
            })?
        };
        if let Err(error) = machine.start_with(&change, &StartOptions::default()) {
            drop(change);
            // This removes it, as it has vanished. The first error says more.
            let _ = self.lock_all();
            return Err(error);
        }
        Ok(machine)
    }

    /// Makes the folder of a machine that there is not yet, and has `finish` add to it before anybody knows it.
    fn create_by_document<T>(
        &self,
        machine: &Machine,
        documented: &DocumentedMachine<'_>,
        document: impl Fn(&Machine, &MachineConfig, &Settings) -> Result<String, String>,
        finish: impl FnOnce(&Path) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let name = machine.name();
        if let Some(found) = self.find_folded(name)? {
            return Err(Error::Exists { found });
        }
        let new = self.new_folder(name);
        fs::create_dir(&new).map_err(Error::file("create", &new))?;
        let made = Settings::new(documented.restart).and_then(|mut settings| {
            if let Some(id) = &documented.id {
                settings.id = id.to_string();
            }
            let (config, text) = complete(machine, documented, &document, &mut settings)?;
            write_document(&new, &text)?;
            write_new(&new, &config, &settings)?;
            let finished = finish(&new)?;
            self.put_in_place(&new, name)?;
            Ok(finished)
        });
        if made.is_err() {
            // The first error says more.
            let _ = files::remove_folder(&new);
        }
        made
    }

    /// Returns an error if a machine other than `machine` has the id.
    fn require_unused_id(&self, machine: &Machine, id: &str) -> Result<(), Error> {
        let has_id = |other: &Machine| {
            let settings = other.settings();
            other.name() != machine.name()
                && settings.is_ok_and(|settings| settings.id.eq_ignore_ascii_case(id))
        };
        match self.machines()?.into_iter().find(has_id) {
            Some(other) => {
                let other = other.name();
                let reason = format!(
                    "the UUID {id} is that of machine '{other}'; remove <uuid>, or write another"
                );
                Err(machine.refused(DEFINE, reason))
            }
            None => Ok(()),
        }
    }
}

impl Machine {
    /// Returns the document that is kept with the machine, if it was defined by one.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn document(&self) -> Result<Option<String>, Error> {
        let path = self.file(file::DOCUMENT);
        files::read(&path).map_err(Error::file("read", &path))
    }

    /// Reads the machine file: what the machine is at its next start, with the MAC addresses that it has then.
    ///
    /// # Errors
    /// Those of [`Machine::config`].
    pub fn addressed_config(&self) -> Result<MachineConfig, Error> {
        let mut config = self.config()?;
        give_mac_addresses(&mut config, &self.settings()?.id);
        Ok(config)
    }

    /// Writes the document of this machine, if it has one, into the folder of one that is like it.
    pub(crate) fn copy_document(&self, folder: &Path) -> Result<(), Error> {
        match self.document()? {
            Some(text) => write_document(folder, &text),
            None => Ok(()),
        }
    }
}

/// Completes the settings by what a document says of a machine. Returns the texts of the machine file and of the document.
fn complete(
    machine: &Machine,
    documented: &DocumentedMachine<'_>,
    document: impl Fn(&Machine, &MachineConfig, &Settings) -> Result<String, String>,
    settings: &mut Settings,
) -> Result<(String, String), Error> {
    settings.restart = documented.restart;
    settings.title = documented.title.map(str::to_owned);
    let mut config = documented.config.clone();
    config.rebase_paths(machine.folder());
    give_mac_addresses(&mut config, &settings.id);
    config.validate_values()?;
    let text = document(machine, &config, settings);
    let text = text.map_err(|reason| machine.refused(DEFINE, reason))?;
    Ok((machine_file(&config), text))
}

/// Writes the document of the machine in `folder`.
fn write_document(folder: &Path, text: &str) -> Result<(), Error> {
    let path = folder.join(file::DOCUMENT);
    files::replace(&path, text).map_err(Error::file("write", &path))
}

#[cfg(test)]
mod tests {
    use bantam_vmm::config::ChannelConfig;

    use super::*;
    use crate::folders::Folders;

    const ID: &str = "9a1b2c3d-0000-4000-8000-0123456789ab";

    fn manager(folder: &Path) -> Manager {
        Manager::new(Folders {
            machines: folder.join("machines"),
            runtime: folder.join("run"),
            units: None,
        })
    }

    fn config() -> MachineConfig {
        let mut config = MachineConfig::new("/k");
        config.nets.push("user".parse().unwrap());
        let channel = "name=a,socket=a.sock".parse::<ChannelConfig>();
        config.channels.push(channel.unwrap());
        config
    }

    fn define(
        manager: &Manager,
        name: &str,
        id: Option<&str>,
        before: Option<&str>,
    ) -> Result<Machine, String> {
        let documented = DocumentedMachine {
            config: &config(),
            id: id.map(|id| id.parse().unwrap()),
            title: Some("A title"),
            restart: RestartPolicy::OnFailure,
            before,
        };
        let document = |machine: &Machine, config: &MachineConfig, settings: &Settings| {
            assert_eq!(settings.title.as_deref(), Some("A title"));
            let mac = config.nets[0].mac.ok_or("there is no address")?;
            Ok(format!("{} {} {mac}", machine.name(), settings.id))
        };
        let defined = manager.define_by_document(&name.parse().unwrap(), &documented, document);
        defined.map_err(|error| error.to_string())
    }

    #[test]
    fn the_document_is_that_of_the_machine_with_its_id_and_addresses() {
        let folder = tempfile::tempdir().unwrap();
        let manager = manager(folder.path());
        let machine = define(&manager, "web", Some(ID), None).unwrap();
        let settings = machine.settings().unwrap();
        assert_eq!(settings.id, ID);
        assert_eq!(settings.restart, RestartPolicy::OnFailure);
        let config = machine.addressed_config().unwrap();
        let mac = config.nets[0].mac.unwrap();
        let document = machine.document().unwrap();
        assert_eq!(document.unwrap(), format!("web {ID} {mac}"));
        let text = machine.machine_file_text().unwrap();
        let socket = machine.folder().join("a.sock");
        assert!(text.contains(&*socket.to_string_lossy()), "{text}");
        // A machine of a machine file has none.
        let name = "other".parse().unwrap();
        let other = manager.create(&name, &config, RestartPolicy::Never);
        assert_eq!(other.unwrap().document().unwrap(), None);
    }

    #[test]
    fn ids_stay_and_are_never_double() {
        let folder = tempfile::tempdir().unwrap();
        let manager = manager(folder.path());
        let first = define(&manager, "web", None, None).unwrap();
        let id = first.settings().unwrap().id;
        define(&manager, "web", None, None).unwrap();
        define(&manager, "web", Some(&id), None).unwrap();
        assert_eq!(first.settings().unwrap().id, id);
        let error = define(&manager, "web", Some(ID), None).unwrap_err();
        assert!(error.contains(&id) && error.contains(ID), "{error}");
        let error = define(&manager, "other", Some(&id), None).unwrap_err();
        assert!(error.contains("that of machine 'web'"), "{error}");
        assert_eq!(manager.machines().unwrap().len(), 1);
    }

    #[test]
    fn a_change_of_what_has_changed_meanwhile_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let manager = manager(folder.path());
        let machine = define(&manager, "web", None, None).unwrap();
        let before = machine.machine_file_text().unwrap();
        machine.set_vcpus(2.try_into().unwrap()).unwrap();
        let error = define(&manager, "web", None, Some(&before)).unwrap_err();
        assert!(error.contains("changed meanwhile"), "{error}");
        assert_eq!(machine.config().unwrap().cpus.get(), 2);
        let now = machine.machine_file_text().unwrap();
        define(&manager, "web", None, Some(&now)).unwrap();
        assert_eq!(machine.config().unwrap().cpus.get(), 1);
    }
}
