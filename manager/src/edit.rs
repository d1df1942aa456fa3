//! Changes of the machine file.

use bantam_vmm::config::{MachineConfig, VcpuCount};

use crate::definition::{machine_file, parse_machine_file};
use crate::error::Error;
use crate::machine::Machine;

impl Machine {
    /// Puts `text` in the place of the machine file, whose text was `before` when it was read. A machine that runs changes
    /// at its next start.
    ///
    /// # Errors
    /// If it is not a machine file, the machine file has been changed by others since, or another command is at work on
    /// the machine.
    pub fn replace_machine_file(&self, before: &str, text: &str) -> Result<(), Error> {
        parse_machine_file(text, &self.machine_file())?;
        let _change = self.change("edit")?;
        if self.machine_file_text()? != before {
            let reason = "its machine file has been changed meanwhile; edit it again";
            return Err(self.refused("edit", reason));
        }
        self.write_config(text)
    }

    /// Sets the number of vCPUs from the next start on.
    ///
    /// # Errors
    /// If the number does not fit the rest of the machine file, or another command is at work on the machine.
    pub fn set_vcpus(&self, count: VcpuCount) -> Result<(), Error> {
        let _change = self.change("set the number of vCPUs of")?;
        self.update_config(|config| config.cpus = count)
    }

    /// Changes the machine file.
    pub(crate) fn update_config(
        &self,
        change: impl FnOnce(&mut MachineConfig),
    ) -> Result<(), Error> {
        let mut config = self.config()?;
        change(&mut config);
        config.validate_values()?;
        self.write_config(&machine_file(&config))
    }
}
