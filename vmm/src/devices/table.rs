//! The devices of a machine, as its owner uses them while the guest does.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bantam_devices::InterruptLine;
use bantam_devices::i8042::I8042;
use bantam_devices::lifecycle::Device;
use bantam_devices::opener::Opener;
use bantam_devices::virtio::owner::{DeviceAnswer, DeviceCommand, DeviceError, DeviceHandle};
use bantam_devices::virtio::transport::mmio::MmioTransport;
use bantam_metadata::Metadata;
use bantam_storage::Disk;
use vmm_sys_util::eventfd::EventFd;

use super::streams::StreamPaths;
use crate::config::DeviceName;
use crate::error::Error;
use crate::events::{Event, EventSender};
use crate::lock::lock;
use crate::metrics::MachineMetrics;

/// Controls the devices of a machine that runs or is paused.
pub(crate) struct DeviceTable {
    pub(crate) power_button: EventFd,
    pub(crate) keyboard: Arc<Mutex<I8042>>,
    /// The devices at fixed ports and addresses.
    pub(crate) legacy: Vec<Arc<Mutex<dyn Device>>>,
    /// The virtio devices in the order of their places.
    pub(crate) virtio: Vec<Entry>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) metrics: Arc<MachineMetrics>,
    pub(crate) stream_paths: StreamPaths,
    pub(crate) opener: Arc<dyn Opener>,
    pub(crate) events: EventSender,
}

/// A virtio device that has its place in the machine.
pub(crate) struct Entry {
    pub(crate) name: DeviceName,
    pub(crate) device: Arc<Mutex<MmioTransport>>,
    pub(crate) handle: DeviceHandle,
    /// Held while a command is executed and recorded, so that commands are recorded in the order in which
    /// they were executed.
    pub(crate) turn: Mutex<()>,
}

impl DeviceTable {
    /// Tells subscribers about the devices that commands and events name.
    pub(crate) fn tell_attached(&self) {
        for device in self.names() {
            self.events.send(|| Event::Attached { device });
        }
    }

    /// Tells subscribers that the devices are no longer there.
    pub(crate) fn tell_detached(&self) {
        for device in self.names() {
            self.events.send(|| Event::Detached { device });
        }
    }

    fn names(&self) -> impl Iterator<Item = DeviceName> {
        let virtio = self.virtio.iter().map(|entry| entry.name.clone());
        std::iter::once(DeviceName::serial()).chain(virtio)
    }

    /// Brings all devices to rest, after the vCPUs.
    ///
    /// # Errors
    /// If a device does not come to rest, or the machine ends meanwhile. Others may be at rest by then.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        for device in self.devices() {
            lock(device).pause().map_err(|source| Error::DeviceLife {
                action: "pause the machine",
                source,
            })?;
        }
        Ok(())
    }

    /// Lets all devices go on, before the vCPUs.
    ///
    /// # Errors
    /// If a device cannot go on. The others do.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for device in self.devices() {
            let resumed = lock(device).resume();
            outcome = outcome.and(resumed.map_err(|source| Error::DeviceLife {
                action: "let a device go on",
                source,
            }));
        }
        outcome
    }

    /// Returns all devices, starting with those that take the longest to come to rest.
    fn devices(&self) -> impl Iterator<Item = &Mutex<dyn Device>> {
        let virtio = self
            .virtio
            .iter()
            .map(|entry| &*entry.device as &Mutex<dyn Device>);
        virtio.chain(self.legacy.iter().map(|device| &**device))
    }

    /// Returns the images of all disks.
    pub(crate) fn disks(&self) -> impl Iterator<Item = Arc<Disk>> {
        self.virtio.iter().filter_map(|entry| match &entry.handle {
            DeviceHandle::Disk(disk) => Some(disk.disk()),
            _ => None,
        })
    }

    pub(crate) fn press_power_button(&self) -> Result<(), Error> {
        let pressed = self.power_button.trigger();
        pressed.map_err(Error::resource("the interrupt of the power button"))
    }

    pub(crate) fn press_ctrl_alt_del(&self) -> Result<(), Error> {
        let pressed = lock(&self.keyboard).press_ctrl_alt_del();
        pressed.map_err(Error::Keyboard)
    }

    /// Executes `command` on the device called `name`, and calls `note` with the command if it took effect.
    pub(crate) fn execute(
        &self,
        name: &DeviceName,
        command: DeviceCommand,
        note: impl FnOnce(&DeviceCommand),
    ) -> Result<DeviceAnswer, Error> {
        let entry = self.virtio.iter().find(|entry| entry.name == *name);
        let entry = entry.ok_or_else(|| Error::NoSuchDevice { name: name.clone() })?;
        let _turn = lock(&entry.turn);
        let executed = entry.handle.execute(command.clone(), &*self.opener);
        if executed
            .as_ref()
            .map_or_else(DeviceError::is_done, |_| true)
        {
            note(&command);
        }
        executed.map_err(|source| Error::Device {
            name: name.clone(),
            source,
        })
    }

    pub(crate) fn metadata(&self) -> Result<&Metadata, Error> {
        self.metadata.as_ref().ok_or(Error::NoMetadata)
    }

    /// Returns the path of `stream`, if it leads to a pseudoterminal, file or socket.
    pub(crate) fn stream_path(&self, stream: &super::Stream) -> Option<&Path> {
        self.stream_paths.get(stream).map(PathBuf::as_path)
    }
}
