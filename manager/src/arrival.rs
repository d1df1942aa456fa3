//! Machines that arrive from another process or host: what the source tells of them, and how they come to be here.
//!
//! Until a machine has arrived, nobody knows its folder (`.new-NAME`), which is locked. It gets its name at the moment in which
//! the machine is this end's. What is left of one that has not arrived, because its process and the command that has started
//! it were killed, is removed by the next command that makes a machine.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bantam_vmm::config::{MachineConfig, SerialConfig};
use bantam_vmm::{Arrival, MigrationConnection};
use serde::{Deserialize, Serialize};

use crate::definition::{RestartPolicy, Settings, machine_file, parse_machine_file};
use crate::error::Error;
use crate::files;
use crate::folders::Folders;
use crate::machine::{Change, Machine, file, write_new};
use crate::manager::{Manager, NEW};
use crate::name::MachineName;
use crate::start::Launch;

/// Longest definition in bytes.
const MAX_DEFINITION: usize = 1 << 20;
/// The file with the configuration of a machine that arrives.
const CONFIG: &str = "arriving.toml";
/// The file with its offer.
const OFFER: &str = "arriving";

/// What a named machine is where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Definition {
    /// Its name.
    pub name: MachineName,
    /// The machine file, whose paths are whole.
    machine_file: String,
    settings: Settings,
    /// The socket of its console.
    console_socket: PathBuf,
}

impl Definition {
    /// Writes what [`Definition::parse`] reads.
    ///
    /// # Errors
    /// If it is longer than a receiver takes, or has a path that is not UTF-8.
    pub fn to_text(&self) -> Result<String, Error> {
        let text = serde_json::to_string(self).map_err(|error| wrong(&error.to_string()))?;
        match text.len() <= MAX_DEFINITION {
            true => Ok(text),
            false => Err(wrong("its machine file is longer than 1 MiB")),
        }
    }

    /// Reads what the source tells of a machine.
    ///
    /// # Errors
    /// If it does not describe one.
    pub fn parse(text: &str) -> Result<Definition, Error> {
        if text.len() > MAX_DEFINITION {
            return Err(wrong("it is longer than 1 MiB"));
        }
        let definition: Definition =
            serde_json::from_str(text).map_err(|error| wrong(&error.to_string()))?;
        let settings = &definition.settings;
        let is_id = settings.id.len() == 36
            && settings
                .id
                .bytes()
                .all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
        let is_printable = |text: &Option<String>| {
            let text = text.as_deref().unwrap_or_default();
            !text.chars().any(char::is_control)
        };
        if !is_id || !is_printable(&settings.title) || !is_printable(&settings.instance_id) {
            return Err(wrong("its id or its title is not one"));
        }
        definition.config()?;
        Ok(definition)
    }

    /// Returns what the machine is at its next start.
    ///
    /// # Errors
    /// If the machine file is not one.
    pub fn config(&self) -> Result<MachineConfig, Error> {
        parse_machine_file(&self.machine_file, Path::new(file::MACHINE))
    }
}

fn wrong(reason: &str) -> Error {
    Error::io("read the definition of a machine that moves")(io::Error::other(reason.to_owned()))
}

impl Machine {
    /// Returns what the receiver of a migration is told of the machine.
    ///
    /// # Errors
    /// If its files cannot be read.
    pub fn definition(&self) -> Result<Definition, Error> {
        let settings = Settings {
            // Snapshots stay here.
            current_snapshot: None,
            ..self.settings()?
        };
        Ok(Definition {
            name: self.name().clone(),
            machine_file: machine_file(&self.config()?),
            settings,
            console_socket: self.console_socket(),
        })
    }

    /// Checks that nothing is lost if the machine, whose disks go on being used elsewhere, is undefined when it has moved.
    ///
    /// # Errors
    /// If something of it would be removed: snapshots, a managed save, or an image in its folder.
    pub fn require_removable_after_move(&self) -> Result<(), Error> {
        const ACTION: &str = "move and undefine";
        if self.has_managed_save() || !self.snapshots()?.is_empty() {
            let reason = "it has snapshots or a managed save, which would be removed";
            return Err(self.refused(ACTION, reason));
        }
        let config = self.config()?;
        let mut images = config.disks.iter().map(|disk| &disk.path);
        match images.find(|path| path.starts_with(self.folder())) {
            Some(path) => {
                let path = path.display();
                let reason = format!("image '{path}' is in its folder, which would be removed");
                Err(self.refused(ACTION, reason))
            }
            None => Ok(()),
        }
    }

    /// Returns the machine of this name that has not arrived yet.
    pub(crate) fn arriving(folders: &Folders, name: MachineName) -> Machine {
        let folder = folders.machines.join(format!("{NEW}{name}"));
        Machine::in_folder(folders, name, folder)
    }
}

/// A machine that is about to arrive. If it does not, nothing is left of it.
#[derive(Debug)]
pub struct ArrivingMachine {
    machine: Machine,
    change: Change,
}

impl Manager {
    /// Makes room for a machine called `name`, which is like `config` now and like `definition` at its next start, or like
    /// `config` too if it comes from no manager. `adapt` gives both of them what the machine uses of this host.
    ///
    /// # Errors
    /// If there is a machine of that name, or of one that differs only by case, or the host does not let it be kept.
    pub fn expect_arrival(
        &self,
        name: &MachineName,
        definition: Option<&Definition>,
        mut config: MachineConfig,
        next: &MachineConfig,
    ) -> Result<ArrivingMachine, Error> {
        let settings = match definition {
            Some(definition) => definition.settings.clone(),
            None => Settings::new(RestartPolicy::Never)?,
        };
        let new = self.begin(name)?;
        let machine = Machine::arriving(self.folders(), name.clone());
        machine.use_own_ends(&mut config, definition);
        let arriving = ArrivingMachine {
            machine,
            change: new.into_change(),
        };
        let machine = &arriving.machine;
        write_new(machine.folder(), &machine_file(next), &settings)?;
        let path = machine.file(CONFIG);
        fs::write(&path, machine_file(&config)).map_err(Error::file("write", &path))?;
        Ok(arriving)
    }

    /// Checks that a machine called `name` could arrive.
    ///
    /// # Errors
    /// If there is a machine of that name, or of one that differs only by case.
    pub fn require_free(&self, name: &MachineName) -> Result<(), Error> {
        match self.find_folded(name)? {
            Some(found) => Err(Error::Exists { found }),
            None => Ok(()),
        }
    }
}

impl Machine {
    /// Has the machine that is like `config` use its own console and name in place of those that it had where it comes from.
    fn use_own_ends(&self, config: &mut MachineConfig, definition: Option<&Definition>) {
        let before = definition.map(|it| SerialConfig::Socket(it.console_socket.clone()));
        let channels = config.channels.iter_mut().map(|channel| &mut channel.end);
        for end in [&mut config.serial, &mut config.console]
            .into_iter()
            .chain(channels)
        {
            if *end == SerialConfig::Stdio || Some(&*end) == before.as_ref() {
                *end = SerialConfig::Socket(self.console_socket());
            }
        }
        for net in &mut config.nets {
            net.name_guest(self.name().as_str());
        }
    }
}

impl ArrivingMachine {
    /// Starts the machine's process, which receives it, and waits until it is here. Returns the machine.
    ///
    /// # Errors
    /// If it does not arrive: the error has the reason that its process gives.
    pub fn receive(self, arrival: Arrival) -> Result<Machine, Error> {
        let connections = arrival.hand_on(&self.machine.file(OFFER))?;
        self.machine.launch(
            &self.change,
            &Launch {
                from: None,
                connections,
            },
        )?;
        let name = self.machine.name().clone();
        Ok(Machine::at(&self.machine.folders, name))
    }
}

impl Drop for ArrivingMachine {
    fn drop(&mut self) {
        self.machine.forget_arrival();
    }
}

impl Machine {
    /// Removes what there is of a machine that has not arrived.
    pub(crate) fn forget_arrival(&self) {
        // It has another folder if it has arrived.
        if !self.folder().exists() {
            return;
        }
        for folder in [self.runtime(), self.folder()] {
            if let Err(error) = files::remove_folder(folder) {
                tracing::warn!("cannot remove '{}': {error}", folder.display());
            }
        }
    }

    /// Opens what the process of a machine that arrives has got: the machine, and its configuration here.
    ///
    /// # Errors
    /// If the command that has started the process has not left it.
    pub fn open_arrival(
        folders: &Folders,
        name: &MachineName,
        connections: Vec<OwnedFd>,
    ) -> Result<(Arrival, MachineConfig), Error> {
        let machine = Machine::arriving(folders, name.clone());
        let mut connections = connections.into_iter().map(MigrationConnection::new);
        let first = connections
            .next()
            .unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
        let mut connection = first.map_err(Error::io("use the connection"))?;
        for other in connections {
            connection.add(other.map_err(Error::io("use the connection"))?);
        }
        let arrival = Arrival::handed_on(connection, &machine.file(OFFER))?;
        let path = machine.file(CONFIG);
        let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        let config = parse_machine_file(&text, &path)?;
        for path in [path, machine.file(OFFER)] {
            files::remove_file(&path).map_err(Error::file("remove", &path))?;
        }
        Ok((arrival, config))
    }

    /// Gives the machine that arrives its name, at the moment in which it is this end's.
    ///
    /// # Errors
    /// If the host refuses it.
    pub fn settle(folders: &Folders, name: &MachineName) -> io::Result<()> {
        let new = Machine::arriving(folders, name.clone());
        fs::rename(new.folder(), folders.of_machine(name))?;
        files::sync_folder(&folders.machines)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn definition() -> Definition {
        Definition {
            name: "web".parse().unwrap(),
            machine_file: "kernel = \"/k\"\n[[disk]]\npath = \"/d\"".to_owned(),
            settings: Settings::new(RestartPolicy::OnFailure).unwrap(),
            console_socket: "/run/console.sock".into(),
        }
    }

    #[test]
    fn a_definition_is_read_as_it_was_written() {
        let definition = definition();
        let text = definition.to_text().unwrap();
        assert_eq!(Definition::parse(&text).unwrap(), definition);
        assert_eq!(definition.config().unwrap().kernel, Path::new("/k"));
    }

    #[test]
    fn what_does_not_describe_a_machine_is_refused() {
        let good = definition().to_text().unwrap();
        for (from, to) in [
            ("\"web\"", "\"../web\""),
            ("kernel", "colonel"),
            ("\"restart\"", "\"resart\""),
            ("\"id\":\"", "\"id\":\"../"),
            ("{", "{\"other\":1,"),
        ] {
            let text = good.replacen(from, to, 1);
            assert_ne!(text, good);
            Definition::parse(&text).unwrap_err();
        }
        let mut named = definition();
        named.settings.title = Some("\u{1b}[2J".to_owned());
        Definition::parse(&named.to_text().unwrap()).unwrap_err();
        named.machine_file = format!("kernel = \"/k\"\n#{}", "x".repeat(MAX_DEFINITION));
        named.to_text().unwrap_err();
        let long = serde_json::to_string(&named).unwrap();
        let error = Definition::parse(&long).unwrap_err();
        assert!(error.to_string().contains("longer than 1 MiB"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_a_definition_or_refused(
            place in 0..400_usize,
            text in "[ -~]{0,8}",
            removed in 0..8_usize,
        ) {
            let mut bytes = definition().to_text().unwrap().into_bytes();
            let place = place.min(bytes.len());
            let end = (place + removed).min(bytes.len());
            bytes.splice(place..end, text.bytes());
            // No panic, and what is read has a name that is one.
            if let Ok(read) = Definition::parse(&String::from_utf8(bytes).unwrap()) {
                prop_assert!(!read.name.as_str().contains('/'));
            }
        }
    }

    #[test]
    fn a_machine_that_has_not_arrived_is_not_there_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders {
            machines: folder.path().join("machines"),
            runtime: folder.path().join("run"),
            units: None,
        };
        let manager = Manager::new(folders.clone());
        let definition = definition();
        let (name, config) = (&definition.name, definition.config().unwrap());
        let expect = || manager.expect_arrival(name, Some(&definition), config.clone(), &config);
        let arriving = expect().unwrap();
        assert!(manager.machines().unwrap().is_empty());
        // Nobody else gets the name meanwhile.
        expect().unwrap_err();
        manager
            .create(name, &config, RestartPolicy::Never)
            .unwrap_err();
        let other = "other".parse().unwrap();
        let other = manager
            .create(&other, &config, RestartPolicy::Never)
            .unwrap();
        manager.rename(&other, name).unwrap_err();
        drop(arriving);
        assert_eq!(manager.machines().unwrap().len(), 1);

        let arriving = expect().unwrap();
        Machine::settle(&folders, name).unwrap();
        drop(arriving);
        let machine = manager.machine(name).unwrap();
        assert_eq!(machine.settings().unwrap(), definition.settings);
        assert_eq!(machine.config().unwrap(), config);
        assert!(manager.require_free(name).is_err());

        // One whose receiver was killed is removed by the next command that makes a machine.
        let killed = "killed".parse().unwrap();
        let arriving = manager
            .expect_arrival(&killed, None, config.clone(), &config)
            .unwrap();
        let left = arriving.machine.folder().to_path_buf();
        fs::remove_file(left.join(file::LOCK)).unwrap();
        fs::write(left.join(file::LOCK), "").unwrap();
        drop(manager.lock_all().unwrap());
        assert!(!left.exists());
    }
}
