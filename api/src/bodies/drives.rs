//! Disks.

use std::path::PathBuf;

use bantam_vmm::config::{
    BlockEngineOption, CacheModeOption, DiskConfig, DiskFormatOption, DiskId, DiskLockOption,
};
use bantam_vmm::{ImageFormat, check_disk};
use serde::{Deserialize, Deserializer, Serialize};

use crate::bodies::rate_limiter::RateLimiter;
use crate::device_ids::check_id;
use crate::fault::Fault;
use crate::host_files::check_readable;

/// Longest serial number of a disk.
const LONGEST_SERIAL: usize = 20;

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
    /// Format of the image. Firecracker knows only raw images, and does not have this field.
    #[serde(default, skip_serializing_if = "is_default")]
    pub format: DriveFormat,
    /// Whether the image may have backing files, which are then opened too. Firecracker does not have this field.
    #[serde(default, skip_serializing_if = "is_default")]
    pub backing: bool,
}

/// Format of the image of a drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DriveFormat {
    /// The bytes of the file are those of the drive.
    #[default]
    Raw,
    /// The format of QEMU.
    Qcow2,
}

impl From<DriveFormat> for ImageFormat {
    fn from(format: DriveFormat) -> ImageFormat {
        match format {
            DriveFormat::Raw => ImageFormat::Raw,
            DriveFormat::Qcow2 => ImageFormat::Qcow2,
        }
    }
}

impl From<ImageFormat> for DriveFormat {
    fn from(format: ImageFormat) -> DriveFormat {
        match format {
            ImageFormat::Raw => DriveFormat::Raw,
            ImageFormat::Qcow2 => DriveFormat::Qcow2,
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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

impl Drive {
    /// Checks it by itself, without the other drives.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        check_id(&self.drive_id)?;
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
        Ok(())
    }

    /// The machine's configuration of it, without a name.
    pub(crate) fn config(&self) -> Result<DiskConfig, Fault> {
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
            format: Some(match self.format {
                DriveFormat::Raw => DiskFormatOption::Raw,
                DriveFormat::Qcow2 => DiskFormatOption::Qcow2,
            }),
            backing: self.backing,
            // As Firecracker does it, which has no locks.
            lock: DiskLockOption::WherePossible,
            any_size: true,
            ..DiskConfig::new(path)
        })
    }
}

/// The drives in the order in which the guest finds them: the root device is the first.
pub(crate) fn in_order(drives: &[Drive]) -> impl Iterator<Item = &Drive> {
    let root = drives.iter().filter(|drive| drive.is_root_device);
    root.chain(drives.iter().filter(|drive| !drive.is_root_device))
}

/// The words of the kernel command line for the drive with the root file system.
pub(crate) fn root_device_words(drives: &[Drive]) -> Option<String> {
    let root = drives.iter().find(|drive| drive.is_root_device)?;
    let place = match &root.partuuid {
        Some(partition) => format!("PARTUUID={partition}"),
        None => "/dev/vda".to_string(),
    };
    let access = if root.is_read_only { "ro" } else { "rw" };
    Some(format!("root={place} {access}"))
}

/// Reads a field that clients may set to null to say nothing of it.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
