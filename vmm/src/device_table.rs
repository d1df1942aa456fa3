//! What a machine's owner does with its devices while the guest uses them.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bantam_devices::InterruptLine;
use bantam_devices::disk::{DiskFile, DiskOptions};
use bantam_devices::i8042::I8042;
use bantam_devices::lifecycle::Device;
use bantam_devices::rate_limiter::Limits;
use bantam_devices::virtio::balloon::{BalloonHandle, BalloonStatistics, HintingCommand};
use bantam_devices::virtio::block::BlockHandle;
use bantam_devices::virtio::net::{NetHandle, NetLimits};
use bantam_devices::virtio::transport::mmio::MmioTransport;
use bantam_metadata::Metadata;
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::metrics::MachineMetrics;
use crate::run_control::lock;
use crate::streams::{StreamPaths, Streams};

/// Handles to the devices of a machine that runs or is paused. Disks and network devices are counted as
/// in the configuration.
pub(crate) struct DeviceTable {
    pub(crate) power_button: EventFd,
    pub(crate) keyboard: Arc<Mutex<I8042>>,
    /// All virtio devices, in the order of their places.
    pub(crate) virtio: Vec<Arc<Mutex<MmioTransport>>>,
    pub(crate) disks: Vec<BlockHandle>,
    pub(crate) networks: Vec<NetHandle>,
    pub(crate) balloon: Option<BalloonHandle>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) metrics: Arc<MachineMetrics>,
    /// Where a user finds the serial port, if it is a pseudoterminal, file or socket.
    pub(crate) serial_path: Option<PathBuf>,
    pub(crate) streams: Streams,
    pub(crate) stream_paths: StreamPaths,
}

impl DeviceTable {
    /// Brings all virtio devices to rest, after the vCPUs.
    ///
    /// # Errors
    /// If one does not come to rest, or the machine ends meanwhile. Others may be at rest by then.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        for transport in &self.virtio {
            let paused = lock(transport).pause();
            paused.map_err(|source| Error::DeviceLife {
                action: "pause the machine",
                source,
            })?;
        }
        Ok(())
    }

    /// Lets all virtio devices go on, before the vCPUs.
    ///
    /// # Errors
    /// If one cannot go on. The others do.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        let mut outcome = Ok(());
        for transport in &self.virtio {
            let resumed = lock(transport).resume();
            outcome = outcome.and(resumed.map_err(|source| Error::DeviceLife {
                action: "let a device go on",
                source,
            }));
        }
        outcome
    }

    pub(crate) fn press_power_button(&self) -> Result<(), Error> {
        let pressed = self.power_button.trigger();
        pressed.map_err(Error::resource("the interrupt of the power button"))
    }

    pub(crate) fn press_ctrl_alt_del(&self) -> Result<(), Error> {
        let pressed = lock(&self.keyboard).press_ctrl_alt_del();
        pressed.map_err(Error::Keyboard)
    }

    fn disk(&self, index: usize) -> Result<&BlockHandle, Error> {
        self.disks.get(index).ok_or(Error::NoSuchDisk {
            index,
            count: self.disks.len(),
        })
    }

    fn network(&self, index: usize) -> Result<&NetHandle, Error> {
        self.networks.get(index).ok_or(Error::NoSuchNetwork {
            index,
            count: self.networks.len(),
        })
    }

    fn balloon(&self) -> Result<&BalloonHandle, Error> {
        self.balloon.as_ref().ok_or(Error::NoBalloon)
    }

    pub(crate) fn update_disk_size(&self, index: usize) -> Result<u64, Error> {
        let disk = self.disk(index)?;
        disk.update_size().map_err(|source| Error::DiskSize {
            path: disk.disk().path().to_path_buf(),
            source,
        })
    }

    pub(crate) fn replace_disk(&self, index: usize, path: &Path) -> Result<(), Error> {
        let disk = self.disk(index)?;
        let before = disk.disk();
        if before.is_at(path).unwrap_or(false) {
            return self.update_disk_size(index).map(drop);
        }
        let options = DiskOptions {
            // The guest knows it, and does not look again.
            block_size: Some(before.logical_block_size()),
            ..before.options().clone()
        };
        // It is not to be kept from being closed.
        drop(before);
        Ok(disk.replace(DiskFile::open(path, &options)?)?)
    }

    pub(crate) fn set_disk_limits(&self, index: usize, limits: &Limits) -> Result<(), Error> {
        let set = self.disk(index)?.set_limits(limits);
        set.map_err(Error::resource("the limits of a disk"))
    }

    pub(crate) fn set_network_limits(&self, index: usize, limits: &NetLimits) -> Result<(), Error> {
        let set = self.network(index)?.set_limits(limits);
        set.map_err(Error::resource("the limits of a network device"))
    }

    pub(crate) fn set_balloon_target(&self, mib: u32) -> Result<(), Error> {
        Ok(self.balloon()?.set_target(mib)?)
    }

    pub(crate) fn set_balloon_interval(&self, seconds: NonZeroU32) -> Result<(), Error> {
        Ok(self.balloon()?.set_statistics_interval(seconds)?)
    }

    pub(crate) fn hint_balloon(&self, command: HintingCommand) -> Result<(), Error> {
        Ok(self.balloon()?.hint(command)?)
    }

    pub(crate) fn balloon_statistics(&self) -> Result<BalloonStatistics, Error> {
        Ok(self.balloon()?.statistics())
    }

    pub(crate) fn metadata(&self) -> Result<&Metadata, Error> {
        self.metadata.as_ref().ok_or(Error::NoMetadata)
    }
}
