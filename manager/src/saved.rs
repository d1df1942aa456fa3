//! Machines whose state is saved when they end, to go on from there later.

use std::fs;
use std::path::Path;
use std::time::Duration;

use bantam_vmm::{Answer, Command, SnapshotFiles, SnapshotOptions, SnapshotTaken};

use crate::error::Error;
use crate::files;
use crate::history::{EndReason, RunOrigin};
use crate::machine::{Change, Machine, file};
use crate::name::MachineName;
use crate::start::Launch;

/// The file, in the directory of a saved state, with the name of the machine.
const MACHINE: &str = "machine";
/// How long a machine may take to write its state.
pub(crate) const WRITE_TIME: Duration = Duration::from_secs(24 * 60 * 60);
/// How long its process may take to end then.
const END_TIME: Duration = Duration::from_secs(60);

impl Machine {
    /// Saves the state of the machine, which runs or is paused, in `directory`, and ends it. [`Machine::restore`] starts it
    /// from there. Its disks must not be changed until then.
    ///
    /// # Errors
    /// If it does not run, another command is at work on it, or the state cannot be written; the machine goes on then.
    pub fn save(&self, directory: &Path) -> Result<SnapshotTaken, Error> {
        let change = self.change("save")?;
        let directory = std::path::absolute(directory).map_err(Error::file("find", directory))?;
        let taken = self.save_to(&change, &directory)?;
        let path = directory.join(MACHINE);
        files::replace(&path, self.name().as_str()).map_err(Error::file("write", &path))?;
        Ok(taken)
    }

    /// Saves the state of the machine, which runs or is paused, and ends it. Its next start goes on from there.
    ///
    /// # Errors
    /// Those of [`Machine::save`].
    pub fn managed_save(&self) -> Result<SnapshotTaken, Error> {
        let change = self.change("save")?;
        self.save_to(&change, &self.file(file::SAVE))
    }

    /// Throws the managed save away.
    ///
    /// # Errors
    /// If there is none, another command is at work on the machine, or it cannot be removed.
    pub fn remove_managed_save(&self) -> Result<(), Error> {
        let _change = self.change("remove the managed save of")?;
        let save = self.file(file::SAVE);
        if !self.has_managed_save() {
            return Err(self.refused("remove the managed save of", "it has none"));
        }
        files::remove_folder(&save).map_err(Error::file("remove", &save))
    }

    fn save_to(&self, _change: &Change, directory: &Path) -> Result<SnapshotTaken, Error> {
        self.require_persistent("save")?;
        if !self.is_active()? {
            let name = self.name().clone();
            return Err(Error::NotRunning {
                action: "save",
                name,
            });
        }
        files::create_folders(directory).map_err(Error::file("create", directory))?;
        let taken = self.take_snapshot(
            "save",
            SnapshotOptions {
                stop: true,
                ..SnapshotOptions::new(SnapshotFiles::in_directory(directory))
            },
        )?;
        if !self.wait_until_shut_off(Some(END_TIME))? {
            return Err(Error::Late {
                name: self.name().clone(),
                state: "is saved, but its process does not end".to_owned(),
                remedy: format!("destroy it (bantam destroy {})", self.name()),
            });
        }
        self.note_end(EndReason::Saved)?;
        Ok(taken)
    }

    /// Has the machine write a snapshot.
    pub(crate) fn take_snapshot(
        &self,
        action: &'static str,
        options: SnapshotOptions,
    ) -> Result<SnapshotTaken, Error> {
        let mut client = self.connect(action)?;
        client.set_answer_time(WRITE_TIME);
        let answer = client.execute(Command::Snapshot(Box::new(options)));
        match answer.map_err(|error| self.control_error(action, error))? {
            Answer::SnapshotTaken(taken) => Ok(taken),
            _ => Err(self.refused(action, "it gives the answer to another command")),
        }
    }

    /// Starts the machine from the state that [`Machine::save`] has written into `directory`, which stays.
    ///
    /// # Errors
    /// If it runs already, another command is at work on it, its disks have been changed since, or the state is damaged.
    pub fn restore(&self, directory: &Path) -> Result<(), Error> {
        let change = self.change("restore")?;
        let directory = fs::canonicalize(directory).map_err(Error::file("find", directory))?;
        self.launch(
            &change,
            &Launch {
                from: Some((&directory, RunOrigin::Restored)),
                ..Launch::default()
            },
        )
    }
}

/// Returns the name of the machine whose state is saved in `directory`; `None` if it is not a state that
/// [`Machine::save`] has written.
pub fn saved_machine(directory: &Path) -> Option<MachineName> {
    let text = files::read(&directory.join(MACHINE)).ok()??;
    text.trim().parse().ok()
}
