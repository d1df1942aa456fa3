//! `/serial`: the serial port.

use std::path::PathBuf;

use bantam_vmm::config::SerialConfig;
use serde::{Deserialize, Serialize};

use super::Configuration;
use super::rate_limiter::TokenBucket;
use super::{Part, Resource, put_all};
use crate::fault::Fault;
use crate::metrics_groups::Group;
use crate::request::{Method, Request};

pub(crate) const RESOURCE: Resource = Resource {
    path: "serial",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, []) => Ok(Request::put("serial", call.json::<Serial>()?)),
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.serial.take(), checked),
    configure: |configuration, machine| {
        let serial = configuration.serial.clone().unwrap_or_default();
        machine.serial = match serial.serial_out_path {
            Some(path) => SerialConfig::File(path),
            None => SerialConfig::Stdio,
        };
        let limit = serial.rate_limiter.as_ref();
        machine.serial_limit = limit.and_then(TokenBucket::rate_limit).into();
        Ok(())
    },
    groups: &[Group::new(
        "uart",
        "error_count flush_count missed_read_count missed_write_count read_count write_count",
    )],
};

/// Body of `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// File or named pipe to which the guest's output goes, in place of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Limit of the bytes of output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

impl Part for Serial {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        configuration.serial = Some(self);
        Ok(())
    }
}
