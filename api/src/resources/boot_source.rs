//! `/boot-source`: the kernel.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Part, Resource, put_all};
use crate::configuration::{Configuration, check_readable};
use crate::fault::Fault;
use crate::request::{Method, Request};

/// Longest kernel command line in bytes, as in Firecracker: 2048 with the NUL at its end.
const LONGEST_BOOT_ARGS: usize = 2047;

pub(crate) const RESOURCE: Resource = Resource {
    path: "boot-source",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, []) => Ok(Request::put("boot_source", call.json::<BootSource>()?)),
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.boot_source.take(), checked),
    groups: &[],
};

/// Body of `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel image.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line, in place of the usual one.
    #[serde(default)]
    pub boot_args: Option<String>,
}

impl Part for BootSource {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        check_readable("kernel image", &self.kernel_image_path)?;
        if let Some(path) = &self.initrd_path {
            check_readable("initrd", path)?;
        }
        let length = self.boot_args.as_ref().map_or(0, String::len);
        if length > LONGEST_BOOT_ARGS {
            return Err(Fault::Value {
                what: "boot_args",
                reason: format!("they have {length} bytes; {LONGEST_BOOT_ARGS} is the most"),
            });
        }
        configuration.boot_source = Some(self);
        Ok(())
    }
}
