//! `/boot-source`: the kernel.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Configuration;
use super::{Part, Resource, put_all};
use crate::fault::Fault;
use crate::host_files::check_readable;
use crate::request::{Method, Request};

/// The kernel command line if the client gives none, as in Firecracker.
const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                 i8042.dumbkbd swiotlb=noforce";

/// Longest kernel command line in bytes, as in Firecracker: 2048 with the NUL at its end.
const LONGEST_BOOT_ARGS: usize = 2047;

pub(crate) const RESOURCE: Resource = Resource {
    path: "boot-source",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, []) => Ok(Request::put("boot_source", call.json::<BootSource>()?)),
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.boot_source.take(), checked),
    configure: |configuration, machine| {
        if let Some(boot_source) = &configuration.boot_source {
            machine.initrd = boot_source.initrd_path.clone();
            let boot_args = boot_source.boot_args.as_deref();
            machine.cmdline = Some(boot_args.unwrap_or(DEFAULT_BOOT_ARGS).to_string());
        }
        Ok(())
    },
    ..Resource::DEFAULT
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
