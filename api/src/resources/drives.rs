//! `/drives/{drive_id}`: disks.

use std::path::PathBuf;

use bantam_vmm::{DeviceCommand, Error};
use serde::Deserialize;

use crate::bodies::drives::{Drive, DriveFormat};
use crate::bodies::rate_limiter::RateLimiter;
use crate::configuration::Configuration;
use crate::fault::Fault;
use crate::instance::Instance;
use crate::method::Method;
use crate::metrics_groups::Group;
use crate::request::Request;
use crate::resources::resource::Resource;

pub(super) const RESOURCE: Resource = Resource {
    path: "drives",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, [id]) => {
            let drive: Drive = call.json()?;
            call.check_id(id, &drive.drive_id)?;
            Ok(Request::put("drive", drive, Configuration::put_drive))
        }
        (Method::Patch, [id]) => {
            let update: DriveUpdate = call.json()?;
            call.check_id(id, &update.drive_id)?;
            Ok(Request::patch("drive", |instance| update.apply(instance)))
        }
        _ => Err(call.unknown()),
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

/// Body of `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveUpdate {
    /// Which drive.
    drive_id: String,
    /// The new image, if it changes.
    #[serde(default)]
    path_on_host: Option<PathBuf>,
    /// Format of the new image; that of the one before if it is not given. Firecracker does not have this field.
    #[serde(default)]
    format: Option<DriveFormat>,
    /// The limits that change.
    #[serde(default)]
    rate_limiter: Option<RateLimiter>,
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
        let name = configuration.names().drive(&drive.drive_id)?;
        if self.format.is_some() && self.path_on_host.is_none() {
            return Err(Fault::Value {
                what: "format",
                reason: "it is that of a new image: path_on_host is missing".to_string(),
            });
        }
        if let Some(path) = self.path_on_host {
            let mut changed = Configuration::clone(&configuration);
            // An image that is not of the format of the one before is refused rather than damaged.
            drive.format = self.format.unwrap_or(drive.format);
            changed.set_drive(Drive {
                path_on_host: Some(path.clone()),
                ..drive.clone()
            });
            instance.check_outputs(&changed)?;
            let command = DeviceCommand::ReplaceImage {
                path: path.clone(),
                format: Some(drive.format.into()),
            };
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

/// Records a changed drive in the configuration.
fn record(instance: &mut Instance, drive: Drive) {
    instance.record(|configuration| configuration.set_drive(drive));
}
