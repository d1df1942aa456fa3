//! Changes of the machine file.

use std::path::Path;

use bantam_vmm::config::{
    DeviceName, DiskConfig, DiskFormatOption, MachineConfig, NetConfig, VcpuCount,
};
use bantam_vmm::{Command, DeviceCommand};

use crate::definition::{machine_file, parse_machine_file};
use crate::error::Error;
use crate::mac::give_mac_addresses;
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

    /// Adds a disk, which the machine has from its next start on.
    ///
    /// # Errors
    /// If the machine has one of that name, has a managed save, or another command is at work on it.
    pub fn attach_disk(&self, disk: DiskConfig) -> Result<(), Error> {
        self.change_devices("attach a disk to", |config| {
            config.disks.push(disk);
            Ok(())
        })
    }

    /// Takes a disk from the machine from its next start on. Its image stays.
    ///
    /// # Errors
    /// If the machine has no such disk, has a managed save, or another command is at work on it.
    pub fn detach_disk(&self, name: &DeviceName) -> Result<(), Error> {
        const ACTION: &str = "detach a disk from";
        self.change_devices(ACTION, |config| {
            let place = config.disk_names().position(|it| it == *name);
            let place = place.ok_or_else(|| self.has_none(ACTION, "disk", name, "domblklist"))?;
            config.disks.remove(place);
            Ok(())
        })
    }

    /// Adds a network device, which the machine has from its next start on.
    ///
    /// # Errors
    /// Those of [`Machine::attach_disk`].
    pub fn attach_interface(&self, net: NetConfig) -> Result<(), Error> {
        self.change_devices("attach a network device to", |config| {
            config.nets.push(net);
            Ok(())
        })
    }

    /// Takes a network device from the machine from its next start on.
    ///
    /// # Errors
    /// If the machine has no such network device, has a managed save, or another command is at work on it.
    pub fn detach_interface(&self, name: &DeviceName) -> Result<(), Error> {
        const ACTION: &str = "detach a network device from";
        self.change_devices(ACTION, |config| {
            let place = config.net_names().position(|it| it == *name);
            let place =
                place.ok_or_else(|| self.has_none(ACTION, "network device", name, "domiflist"))?;
            config.nets.remove(place);
            Ok(())
        })
    }

    /// Has a disk use another image. If the machine runs, its guest sees the change at once.
    ///
    /// # Errors
    /// If the machine has no such disk, cannot use the image, has a managed save, or another command is at work
    /// on it.
    pub fn change_media(
        &self,
        name: &DeviceName,
        path: &Path,
        format: Option<DiskFormatOption>,
    ) -> Result<(), Error> {
        const ACTION: &str = "change an image of";
        let is_active = self.is_active()?;
        self.change_devices(ACTION, |config| {
            let place = config.disk_names().position(|it| it == *name);
            let place = place.ok_or_else(|| self.has_none(ACTION, "disk", name, "domblklist"))?;
            if is_active {
                let command = DeviceCommand::ReplaceImage {
                    path: path.to_owned(),
                    format: format.map(Into::into),
                };
                let name = name.clone();
                self.execute(ACTION, Command::Device { name, command })?;
            }
            let disk = &mut config.disks[place];
            disk.path = path.to_owned();
            disk.format = format;
            Ok(())
        })
    }

    /// Changes which devices the machine has. A state that was saved goes on with those that it had.
    fn change_devices(
        &self,
        action: &'static str,
        change_config: impl FnOnce(&mut MachineConfig) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let change = self.change(action)?;
        self.mend(&change)?;
        if self.has_managed_save() {
            let reason =
                "it goes on from a managed save with the devices that it had; start it first";
            return Err(self.refused(action, reason));
        }
        let mut config = self.config()?;
        change_config(&mut config)?;
        // A network device keeps its address when others before it go.
        give_mac_addresses(&mut config, &self.settings()?.id);
        config.validate_values()?;
        self.write_config(&machine_file(&config))
    }

    fn has_none(
        &self,
        action: &'static str,
        kind: &str,
        name: &DeviceName,
        command: &str,
    ) -> Error {
        let machine = self.name();
        let reason = format!(
            "it has no {kind} '{name}'; `bantam {command} {machine}` shows those that it has"
        );
        self.refused(action, reason)
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
