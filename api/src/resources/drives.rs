//! `/drives/{drive_id}`: disks.

use std::path::PathBuf;

use bantam_vmm::config::{
    BlockEngineOption, CacheModeOption, DiskConfig, DiskFormatOption, DiskId, DiskLockOption,
};
use bantam_vmm::{DeviceCommand, Error, check_disk};
use serde::{Deserialize, Serialize};

use super::Configuration;
use super::rate_limiter::RateLimiter;
use super::{Part, Resource, null_as_default, put_all, put_by};
use crate::fault::Fault;
use crate::host_files::check_readable;
use crate::instance::Instance;
use crate::metrics_groups::Group;
use crate::request::{Method, Request, check_name};

/// Longest serial number of a disk.
const LONGEST_SERIAL: usize = 20;

pub(crate) const RESOURCE: Resource = Resource {
    path: "drives",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, [id]) => {
            let drive: Drive = call.json()?;
            call.check_id(id, &drive.drive_id)?;
            Ok(Request::put("drive", drive))
        }
        (Method::Patch, [id]) => {
            let update: DriveUpdate = call.json()?;
            call.check_id(id, &update.drive_id)?;
            Ok(Request::patch("drive", |instance| update.apply(instance)))
        }
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.drives.drain(..), checked),
    configure: |configuration, machine| {
        machine.append = root_device_words(configuration);
        for drive in configuration.drives_in_order() {
            machine.disks.push(DiskConfig {
                name: Some(configuration.drive_name(&drive.drive_id)?),
                ..drive.config()?
            });
        }
        Ok(())
    },
    groups: &[Group::new(
        "block",
        "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count \
         flush_count queue_event_count rate_limiter_event_count update_count update_fails \
         read_bytes write_bytes read_count write_count read_agg write_agg \
         rate_limiter_throttled_events io_engine_throttled_events remaining_reqs_count",
    )
    .and_each()],
};

/// Body of `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// The drive's name.
    pub drive_id: String,
    /// Partition of this drive that is the root file system, if it is not the whole drive.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether the guest boots from it.
    pub is_root_device: bool,
    /// What happens when the guest flushes.
    #[serde(default, deserialize_with = "null_as_default")]
    pub cache_type: CacheType,
    /// Whether the guest cannot write to it.
    #[serde(default, deserialize_with = "null_as_default")]
    pub is_read_only: bool,
    /// The image, in a file or block device.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Limits of reads and writes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// How requests are done; by default, as is best for each.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Socket of a vhost-user backend, in place of an image.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// What happens when the guest flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Nothing.
    #[default]
    Unsafe,
    /// What was written goes to stable storage.
    Writeback,
}

/// How requests of a drive are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One after the other.
    Sync,
    /// By io_uring.
    Async,
}

/// Body of `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which drive.
    pub drive_id: String,
    /// The new image, if it changes.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// The limits that change.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl Drive {
    fn config(&self) -> Result<DiskConfig, Fault> {
        let path = self.path_on_host.clone().unwrap_or_default();
        // One that was cut off could be that of another self.
        let has_serial = self.drive_id.len() <= LONGEST_SERIAL;
        let serial = has_serial.then(|| DiskId::try_from(self.drive_id.clone()));
        Ok(DiskConfig {
            readonly: self.is_read_only,
            id: serial.transpose().map_err(Fault::value("drive_id"))?,
            cache: match self.cache_type {
                CacheType::Unsafe => CacheModeOption::Unsafe,
                CacheType::Writeback => CacheModeOption::Writeback,
            },
            engine: match self.io_engine {
                None => BlockEngineOption::Auto,
                Some(IoEngine::Sync) => BlockEngineOption::Sync,
                Some(IoEngine::Async) => BlockEngineOption::IoUring,
            },
            limits: RateLimiter::limits(self.rate_limiter.as_ref()).into(),
            // As Firecracker does it, which has neither formats nor locks.
            format: Some(DiskFormatOption::Raw),
            lock: DiskLockOption::WherePossible,
            any_size: true,
            ..DiskConfig::new(path)
        })
    }
}

/// The words of the kernel command line for the drive with the root file system.
fn root_device_words(configuration: &Configuration) -> Option<String> {
    let root = configuration
        .drives
        .iter()
        .find(|drive| drive.is_root_device)?;
    let place = match &root.partuuid {
        Some(partition) => format!("PARTUUID={partition}"),
        None => "/dev/vda".to_string(),
    };
    let access = if root.is_read_only { "ro" } else { "rw" };
    Some(format!("root={place} {access}"))
}

impl Configuration {
    /// The drives in the order in which the guest finds them: the root device is the first.
    pub(crate) fn drives_in_order(&self) -> impl Iterator<Item = &Drive> {
        let root = self.drives.iter().filter(|drive| drive.is_root_device);
        root.chain(self.drives.iter().filter(|drive| !drive.is_root_device))
    }
}

impl Part for Drive {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        check_name(&self.drive_id)?;
        if self.socket.is_some() {
            return Err(Fault::NotSupported {
                what: "vhost-user drives".to_string(),
            });
        }
        let Some(path) = &self.path_on_host else {
            return Err(Fault::Value {
                what: "drive",
                reason: "path_on_host is missing".to_string(),
            });
        };
        check_readable("drive image", path)?;
        check_disk(&self.config()?)?;
        let is_other_root =
            |other: &&Drive| other.is_root_device && other.drive_id != self.drive_id;
        if self.is_root_device
            && let Some(root) = configuration.drives.iter().find(is_other_root)
        {
            return Err(Fault::SecondRootDevice {
                id: root.drive_id.clone(),
            });
        }
        put_by(&mut configuration.drives, self, |drive| &drive.drive_id);
        Ok(())
    }
}

impl DriveUpdate {
    fn apply(self, instance: &mut Instance) -> Result<(), Fault> {
        instance.view().require_started()?;
        let configuration = instance.view().configuration();
        let mut drives = configuration.drives.iter();
        let Some(drive) = drives.find(|drive| drive.drive_id == self.drive_id) else {
            return Err(Fault::NoSuchDevice {
                kind: "drive",
                id: self.drive_id,
            });
        };
        let mut drive = drive.clone();
        let name = configuration.drive_name(&drive.drive_id)?;
        if let Some(path) = self.path_on_host {
            let command = DeviceCommand::ReplaceImage { path: path.clone() };
            let replaced = instance.controller().device(&name, command);
            // The drive has the new image even if the old one could not be flushed.
            let is_there = match &replaced {
                Ok(_) => true,
                Err(Error::Device { source, .. }) => source.is_done(),
                Err(_) => false,
            };
            if is_there {
                drive.path_on_host = Some(path);
                record(instance, drive.clone());
            }
            replaced?;
        }
        if let Some(limiter) = self.rate_limiter {
            let limiter = limiter.applied_to(drive.rate_limiter);
            let limits = RateLimiter::limits(Some(&limiter));
            let command = DeviceCommand::SetLimits(limits);
            instance.controller().device(&name, command)?;
            drive.rate_limiter = Some(limiter);
            record(instance, drive);
        }
        Ok(())
    }
}

/// Notes a changed drive in the configuration.
fn record(instance: &mut Instance, drive: Drive) {
    instance.record(|configuration| {
        put_by(&mut configuration.drives, drive, |drive| &drive.drive_id);
    });
}
