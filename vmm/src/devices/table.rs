//! The devices of a machine, as its owner uses them while the guest does.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use std::{io, thread};

use bantam_devices::InterruptLine;
use bantam_devices::activity::Activity;
use bantam_devices::generation::Generation;
use bantam_devices::i8042::I8042;
use bantam_devices::lifecycle::{Device, PAUSE_TIME};
use bantam_devices::opener::Opener;
use bantam_devices::virtio::DriverLink;
use bantam_devices::virtio::block::{self, BlockHandle, SnapshotError};
use bantam_devices::virtio::owner::{DeviceAnswer, DeviceCommand, DeviceError, DeviceHandle};
use bantam_devices::virtio::transport::mmio::MmioTransport;
use bantam_metadata::Metadata;
use bantam_storage::Disk;
use bantam_usernet::ForwardedPort;
use vmm_sys_util::eventfd::EventFd;

use super::LegacyDevice;
use super::streams::StreamPaths;
use super::turn::Turn;
use crate::command::DiskSnapshot;
use crate::config::DeviceName;
use crate::error::Error;
use crate::events::{Event, EventSender};
use crate::lock::lock;
use crate::metrics::MachineMetrics;
use crate::random::random;

/// For how long a device's work has not ended if the host holds it up.
const HOLD_UP: Duration = Duration::from_millis(20);
/// How much longer a command may take than the time after which it gives itself up.
const GIVE_UP_TIME: Duration = Duration::from_millis(500);

/// Controls the devices of a machine that runs or is paused.
pub(crate) struct DeviceTable {
    pub(crate) power_button: EventFd,
    pub(crate) keyboard: Arc<Mutex<I8042>>,
    pub(crate) generation: Arc<Mutex<Generation>>,
    /// The devices at fixed ports and addresses.
    pub(crate) legacy: Vec<LegacyDevice>,
    /// Shows whether a thread works for the serial port.
    pub(crate) serial_activity: Activity,
    /// The virtio devices in the order of their places.
    pub(crate) virtio: Vec<Entry>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) metrics: Arc<MachineMetrics>,
    pub(crate) stream_paths: StreamPaths,
    /// Ports of the host that lead to the guest.
    pub(crate) forwarded_ports: Vec<ForwardedPort>,
    pub(crate) opener: Arc<dyn Opener>,
    pub(crate) events: EventSender,
}

/// A virtio device that has its place in the machine.
pub(crate) struct Entry {
    pub(crate) name: DeviceName,
    pub(crate) device: Arc<Mutex<MmioTransport>>,
    pub(crate) handle: DeviceHandle,
    pub(crate) link: Arc<DriverLink>,
    /// Taken while a command is executed and recorded, so that commands are recorded in the order in which
    /// they were executed.
    pub(crate) turn: Arc<Turn>,
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
                // The device that waited for its thread need not be the one that holds the thread up.
                source: match source.kind() {
                    io::ErrorKind::TimedOut => self.no_answer().unwrap_or(source),
                    _ => source,
                },
            })?;
        }
        Ok(())
    }

    /// Returns the names in the log of the devices that the host holds up now.
    pub(crate) fn held_up(&self) -> Vec<String> {
        let virtio = self
            .virtio
            .iter()
            .map(|entry| (entry.link.name(), entry.link.activity()));
        let serial = ("serial port", &self.serial_activity);
        let at_work: Vec<_> = virtio
            .chain([serial])
            .filter_map(|(name, activity)| Some((name, activity, activity.work_under_way()?)))
            .collect();
        if !at_work.is_empty() {
            thread::sleep(HOLD_UP);
        }
        at_work
            .into_iter()
            .filter(|(_, activity, work)| activity.work_under_way() == Some(*work))
            .map(|(name, ..)| name.to_owned())
            .collect()
    }

    /// Returns an error that names the devices that the host holds up, if there are any.
    pub(crate) fn no_answer(&self) -> Option<io::Error> {
        let held_up = self.held_up();
        (!held_up.is_empty()).then(|| {
            let names = held_up.join(", ");
            let reason = format!("the host does not answer for {names}; try again when it does");
            io::Error::new(io::ErrorKind::TimedOut, reason)
        })
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
        virtio.chain(self.legacy.iter().map(|(_, device)| &**device))
    }

    /// Returns the images of all disks, with what shows whether a thread works for the disk.
    pub(crate) fn disks(&self) -> impl Iterator<Item = (Arc<Disk>, &Activity)> {
        self.virtio.iter().filter_map(|entry| match &entry.handle {
            DeviceHandle::Disk(disk) => Some((disk.disk(), entry.link.activity())),
            _ => None,
        })
    }

    /// Brings what the guest has written to all disks to stable storage.
    ///
    /// # Errors
    /// If one of them cannot be flushed. The others are flushed all the same.
    pub(crate) fn flush_disks(&self) -> Result<(), Error> {
        let mut flushed = Ok(());
        let disks = self.disks().filter(|(disk, _)| !disk.is_read_only());
        for (disk, activity) in disks {
            if let Err(source) = activity.during(|| disk.flush()) {
                let path = disk.path().to_path_buf();
                let error = Error::Flush { path, source };
                tracing::error!("{error}");
                flushed = flushed.and(Err(error));
            }
        }
        flushed
    }

    /// Gives up the images of all disks of a paused machine, with all that was written on stable storage. Others may use
    /// them from then on.
    ///
    /// # Errors
    /// If one of them cannot be given up. Others may be given up by then: [`DeviceTable::take_back_disks`] undoes that.
    pub(crate) fn release_disks(&self) -> Result<(), Error> {
        let deadline = Instant::now() + PAUSE_TIME;
        self.disk_entries().try_for_each(|(name, disk)| {
            disk.release(deadline).map_err(|source| Error::Device {
                name: name.clone(),
                source: source.into(),
            })
        })
    }

    /// Opens and locks the images again that were given up.
    ///
    /// # Errors
    /// If one of them cannot be opened, for example because others use it. The others are there all the same.
    pub(crate) fn take_back_disks(&self) -> Result<(), Error> {
        let deadline = Instant::now() + PAUSE_TIME;
        let mut outcome = Ok(());
        for (name, disk) in self.disk_entries() {
            let taken = disk.take_back(&*self.opener, deadline);
            outcome = outcome.and(taken.map_err(|source| Error::Device {
                name: name.clone(),
                source,
            }));
        }
        outcome
    }

    fn disk_entries(&self) -> impl Iterator<Item = (&DeviceName, &BlockHandle)> {
        self.virtio.iter().filter_map(|entry| match &entry.handle {
            DeviceHandle::Disk(disk) => Some((&entry.name, disk)),
            _ => None,
        })
    }

    /// Cancels the jobs of all disks, which end soon after this.
    pub(crate) fn cancel_jobs(&self) {
        for entry in &self.virtio {
            if let DeviceHandle::Disk(disk) = &entry.handle {
                // There is none, or the guest is about to go on with its copy.
                let _ = disk.cancel_job();
            }
        }
    }

    /// Tells the guest that its machine goes on from saved state, after that state has been set and before the
    /// vCPUs enter the guest. Network cards and the socket device tell their drivers themselves, when they are
    /// resumed.
    ///
    /// # Errors
    /// If the host provides no random bytes, or refuses to deliver the interrupt.
    pub(crate) fn tell_restored(&self) -> Result<(), Error> {
        let (id, marker) = (random()?, u64::from_ne_bytes(random()?));
        let told = lock(&self.generation).change(id, marker);
        told.map_err(|source| Error::DeviceLife {
            action: "tell the guest that it has been restored",
            source,
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

    /// Executes `command` on the device called `name` if `check` allows it, and calls `note` with the command and its
    /// answer if it took effect. A command that uses files is checked and executed on a thread of its own.
    ///
    /// # Errors
    /// Those of `check`; also if there is no such device, or it cannot carry out the command. If the host
    /// does not answer, the command is given up, and its thread ends when the host answers.
    pub(crate) fn execute(
        self: &Arc<DeviceTable>,
        name: &DeviceName,
        command: DeviceCommand,
        check: impl FnOnce() -> Result<(), Error> + Send + 'static,
        note: impl FnOnce(&DeviceCommand, Option<&DeviceAnswer>) + Send + 'static,
    ) -> Result<DeviceAnswer, Error> {
        let index = self.index_of(name)?;
        let device_name = name.clone();
        let error = move |source| Error::Device {
            name: device_name.clone(),
            source,
        };
        let no_answer = || {
            error(DeviceError::NoAnswer {
                seconds: PAUSE_TIME.as_secs(),
            })
        };
        let deadline = Instant::now() + PAUSE_TIME;
        if DeviceHandle::is_question(&command) {
            let handle = &self.virtio[index].handle;
            return handle
                .execute(command, &*self.opener, deadline)
                .map_err(error);
        }
        let turn = self.virtio[index]
            .turn
            .take(deadline)
            .ok_or_else(no_answer)?;
        let uses_files = DeviceHandle::uses_files(&command);
        let devices = self.clone();
        let execute_error = error.clone();
        let execute = move || {
            check()?;
            let handle = &devices.virtio[index].handle;
            let executed = handle.execute(command.clone(), &*devices.opener, deadline);
            let has_effect = executed
                .as_ref()
                .map_or_else(DeviceError::is_done, |_| true);
            if has_effect {
                note(&command, executed.as_ref().ok());
            }
            drop(turn);
            executed.map_err(execute_error)
        };
        if !uses_files {
            return execute();
        }
        on_own_thread(execute, deadline, no_answer)
    }

    /// Takes a snapshot of `disks`, all at one instant, and returns for how long requests to them had to wait. Calls
    /// `note` with each disk and its block size if there is a snapshot.
    ///
    /// # Errors
    /// If there is no such disk, or no snapshot can be taken. If the host does not answer, the command is given up,
    /// and its thread ends when the host answers.
    pub(crate) fn snapshot(
        self: &Arc<DeviceTable>,
        disks: Vec<DiskSnapshot>,
        note: impl Fn(&DiskSnapshot, u32) + Send + 'static,
    ) -> Result<Duration, Error> {
        let mut indices = Vec::with_capacity(disks.len());
        for DiskSnapshot { disk, .. } in &disks {
            let index = self.index_of(disk)?;
            if indices.contains(&index) {
                return Err(SnapshotError::Repeated.into());
            }
            self.disk(index)?;
            indices.push(index);
        }
        let deadline = Instant::now() + PAUSE_TIME;
        let no_answer = || Error::NoAnswer {
            seconds: PAUSE_TIME.as_secs(),
        };
        // In one order, so that two of these commands do not wait for each other.
        let mut in_order = indices.clone();
        in_order.sort_unstable();
        let turns: Option<Vec<_>> = in_order
            .into_iter()
            .map(|index| self.virtio[index].turn.take(deadline))
            .collect();
        let turns = turns.ok_or_else(no_answer)?;
        let devices = self.clone();
        let execute = move || {
            let mut parts = Vec::with_capacity(disks.len());
            for (&index, disk) in indices.iter().zip(&disks) {
                parts.push((devices.disk(index)?, disk.path.as_path()));
            }
            let held_up = block::snapshot(&parts, &*devices.opener, deadline)?;
            for ((handle, _), disk) in parts.iter().zip(&disks) {
                note(disk, handle.disk().logical_block_size());
            }
            drop(turns);
            Ok(held_up)
        };
        on_own_thread(execute, deadline, no_answer)
    }

    fn index_of(&self, name: &DeviceName) -> Result<usize, Error> {
        let index = self.virtio.iter().position(|entry| entry.name == *name);
        index.ok_or_else(|| Error::NoSuchDevice { name: name.clone() })
    }

    /// Returns the disk at this index.
    fn disk(&self, index: usize) -> Result<&BlockHandle, Error> {
        let entry = &self.virtio[index];
        match &entry.handle {
            DeviceHandle::Disk(disk) => Ok(disk),
            _ => Err(Error::Device {
                name: entry.name.clone(),
                source: DeviceError::Kind { kind: "a disk" },
            }),
        }
    }

    pub(crate) fn metadata(&self) -> Result<&Metadata, Error> {
        self.metadata.as_ref().ok_or(Error::NoMetadata)
    }

    /// Returns the path of `stream`, if it leads to a pseudoterminal, file or socket.
    pub(crate) fn stream_path(&self, stream: &super::Stream) -> Option<&Path> {
        self.stream_paths.get(stream).map(PathBuf::as_path)
    }
}

/// Executes a command on a thread of its own, which is given up some time after `deadline`: the error is then that of
/// `no_answer`, and the thread ends when the host answers.
fn on_own_thread<T: Send + 'static>(
    execute: impl FnOnce() -> Result<T, Error> + Send + 'static,
    deadline: Instant,
    no_answer: impl FnOnce() -> Error,
) -> Result<T, Error> {
    let (answer, answered) = mpsc::channel();
    let work = move || {
        // It fails if the answer comes too late.
        let _ = answer.send(execute());
    };
    let thread_name = "bantam-command";
    let started = thread::Builder::new().name(thread_name.into()).spawn(work);
    started.map_err(|source| Error::Thread {
        name: thread_name.to_owned(),
        source,
    })?;
    let left = deadline.saturating_duration_since(Instant::now());
    match answered.recv_timeout(left + GIVE_UP_TIME) {
        Ok(executed) => executed,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(no_answer()),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::Panic),
    }
}
